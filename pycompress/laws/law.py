"""A fitted compression law: what it predicts, how far a model may be compressed, how sure that is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pycompress._files import finite

Features = dict[str, Any]


@dataclass(frozen=True)
class LawForm:
    """`log L` as a sum of coefficients times features of the ratio r, the dense value L0 and D, tokens in units.

    `always`: coefficients that are given. `constant`: what a coefficient is where its feature does not vary in the
    data. `ratio`: the one term in which r is; `inverse`: r from that feature. `recovers`: whether D is in it.
    """

    equation: str
    features: Callable[[Any, Any, Any], Features]
    ratio: str
    inverse: Callable[[float], float]
    recovers: bool
    always: dict[str, float]
    constant: dict[str, float]


FORMS = {
    "v1": LawForm(
        equation="log L = α log L0 + β log(1 + r) + γ log(1 + 1/(D + 1))",
        features=lambda r, dense, D: {"α": np.log(dense), "β": np.log1p(r), "γ": np.log1p(1 / (D + 1))},
        ratio="β",
        inverse=math.expm1,
        recovers=True,
        always={},
        constant={"α": 1.0, "γ": 0.0},
    ),
    "v2": LawForm(
        equation="log L = log L0 + log P0 + α log(1 - r)",
        features=lambda r, dense, D: {"L0": np.log(dense), "log P0": np.ones_like(r), "α": np.log1p(-r)},
        ratio="α",
        inverse=lambda u: -math.expm1(u),
        recovers=False,
        always={"L0": 1.0},
        constant={},
    ),
}


@dataclass(frozen=True)
class Coefficient:
    """A fitted coefficient: its least-squares value and standard error, its confidence interval, and the percentile
    interval of fits to resampled runs, None where too few of these could be fitted.
    """

    name: str
    value: float
    stderr: float
    low: float
    high: float
    bootstrap: tuple[float, float] | None


@dataclass(frozen=True)
class HeldOut:
    """A fit to `fitted` runs judged on `tested` others: the mean of `|predicted - measured| / measured`.

    `kind`: "ratios" above `above`, or the "model" called `model`.
    """

    kind: str
    fitted: int
    tested: int
    error: float
    above: float | None = None
    model: str | None = None

    def __str__(self) -> str:
        return f"ratios above {self.above:.2g}" if self.kind == "ratios" else f"model {self.model}"


@dataclass(frozen=True)
class Estimate:
    """A value with its interval; `extrapolated`: from outside what was measured."""

    value: float
    low: float
    high: float
    extrapolated: bool = False

    def __str__(self) -> str:
        beyond = ", beyond what was measured" if self.extrapolated else ""
        return f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g}{beyond})"


@dataclass(frozen=True)
class Law:
    """A law fitted by least squares on logarithms; `fit` makes it.

    `law`: "v1" or "v2". `quantity`: "loss" in nats a token or "accuracy" in [0, 1]. `unit`: tokens to one of D.
    `level`: of every interval; `quantile`: Student's for it. `fixed`: coefficients that were given or whose term does
    not vary. `covariance`: of the fitted ones. `residual`: standard deviation of log L about the law, with `degrees` of
    freedom. `adjusted_r2`, `f`, `f_p`: the fit's; R² is about the mean where `centred`, else about zero, as it is for a
    law without a constant. `ratios`, `tokens`, `dense`: lowest and highest of the `count` runs. `held_out`: errors on
    runs that a fit has not seen.
    """

    law: str
    quantity: str
    unit: float
    level: float
    quantile: float
    coefficients: tuple[Coefficient, ...]
    fixed: dict[str, float]
    covariance: tuple[tuple[float, ...], ...]
    residual: float
    degrees: int
    adjusted_r2: float
    f: float
    f_p: float
    centred: bool
    count: int
    ratios: tuple[float, float]
    tokens: tuple[int, int]
    dense: tuple[float, float]
    held_out: tuple[HeldOut, ...] = ()
    notes: tuple[str, ...] = ()

    def predict(
        self, ratio: float, dense: float | None = None, tokens: float | None = None, *, extrapolate: bool = False
    ) -> Estimate:
        """The quantity at a compression ratio below 1, with the interval that one new run falls in.

        `dense`: the dense model's, by default that of all the runs. `tokens`: of recovery, by default the fewest
        measured. Raises `ValueError` outside the ratios, tokens and dense values that were measured, unless
        `extrapolate` is set, which the result then says.
        """
        dense, tokens = self._defaults(dense, tokens)
        beyond = self._beyond(dense, tokens) + self._outside("ratio", ratio, self.ratios)
        if not -1 < ratio < 1:
            raise ValueError(f"a compression ratio is below 1, and above -1 where a model grew; got {ratio}")
        self._refuse(beyond, extrapolate)
        x, offset = self._terms(ratio, dense, tokens)
        middle = float(offset + x @ self._values())
        wide = self.quantile * math.sqrt(self.residual**2 + float(x @ np.array(self.covariance) @ x))
        return Estimate(math.exp(middle), math.exp(middle - wide), math.exp(middle + wide), bool(beyond))

    def critical_ratio(
        self, sigma: float, dense: float | None = None, tokens: float | None = None, *, extrapolate: bool = False
    ) -> Estimate:
        """The ratio at which the law reaches `sigma` times the dense value, in [0, 1], with its confidence interval.

        v1: `(σ L0^(1-α) / (1 + 1/(D+1))^γ)^(1/β) - 1`, arXiv:2504.04342 for `tokens=math.inf`; v2: `1 - (σ/P0)^(1/α)`.
        The interval holds the ratios at which the law's own confidence interval covers the target (Fieller's). A law
        that is there from the start has 0, one that never gets there 1. Other arguments and errors as `predict`.
        """
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma must be a number above 0, got {sigma}")
        dense, tokens = self._defaults(dense, tokens)
        x, offset = self._terms(0.0, dense, tokens)
        values, covariance = self._values(), np.array(self.covariance)
        at = [c.name for c in self.coefficients].index(FORMS[self.law].ratio)
        # The law is linear in the feature u of the ratio: it reaches the target where slope u is the gap.
        slope, gap = float(values[at]), math.log(sigma * dense) - float(offset + x @ values)
        crossing = self._inverse(gap / slope) if slope else -1.0
        start_is_past = gap < 0 if self.quantity == "loss" else gap > 0
        value = min(crossing, 1.0) if crossing >= 0 else 0.0 if start_is_past else 1.0
        low, high = 0.0, 1.0
        square = slope**2 - self.quantile**2 * float(covariance[at, at])
        half = gap * slope + self.quantile**2 * float(covariance[at] @ x)
        root = half**2 - square * (gap**2 - self.quantile**2 * float(x @ covariance @ x))
        # Otherwise the slope may be zero, and every ratio is possible.
        if square > 0 and root >= 0 and (crossing >= 0 or start_is_past):
            ends = (self._inverse((half + sign * math.sqrt(root)) / square) for sign in (-1, 1))
            low, high = sorted(min(max(end, 0.0), 1.0) for end in ends)
        beyond = self._beyond(dense, tokens) + self._outside("critical ratio", value, self.ratios)
        self._refuse(beyond, extrapolate)
        return Estimate(value, low, high, bool(beyond))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite is None."""
        plain = asdict(self) | {"equation": FORMS[self.law].equation}
        found: dict[str, Any] = finite(plain)
        return found

    def _defaults(self, dense: float | None, tokens: float | None) -> tuple[float, float]:
        if dense is None and self.dense[0] < self.dense[1]:
            raise ValueError(
                f"the law is of models with dense values from {self.dense[0]:.4g} to {self.dense[1]:.4g}; give dense"
            )
        dense = self.dense[0] if dense is None else dense
        if not (dense > 0 and math.isfinite(dense)):
            raise ValueError(f"dense must be a number above 0, got {dense}")
        tokens = self.tokens[0] if tokens is None else tokens
        if not tokens >= 0:
            raise ValueError(f"tokens must be at least 0, got {tokens}")
        return dense, tokens

    def _beyond(self, dense: float, tokens: float) -> list[str]:
        """What of these lies outside the measured ranges, in words."""
        return self._outside("dense value", dense, self.dense) + self._outside("tokens", tokens, self.tokens)

    @staticmethod
    def _outside(name: str, value: float, measured: tuple[float, float]) -> list[str]:
        low, high = measured
        slack = 1e-9 * max(abs(low), abs(high))
        if low - slack <= value <= high + slack:
            return []
        return [f"{name} {value:.6g} is outside the measured {low:.6g} to {high:.6g}"]

    @staticmethod
    def _refuse(beyond: list[str], extrapolate: bool) -> None:
        if beyond and not extrapolate:
            raise ValueError(f"{'; '.join(beyond)}; extrapolate=True predicts all the same")

    def _terms(self, ratio: float, dense: float, tokens: float) -> tuple[np.ndarray, float]:
        """The fitted terms' features `[coefficients]`, and the sum of the fixed terms."""
        features = FORMS[self.law].features(np.float64(ratio), dense, tokens / self.unit)
        offset = sum(float(features[name]) * value for name, value in self.fixed.items())
        return np.array([float(features[c.name]) for c in self.coefficients]), offset

    def _values(self) -> np.ndarray:
        return np.array([c.value for c in self.coefficients])

    def _inverse(self, feature: float) -> float:
        """The ratio of a value of its feature, at least -1; past 1 as far as floats go."""
        return FORMS[self.law].inverse(min(max(feature, -700.0), 700.0))
