"""Which method, how far, and how much recovery for a given loss, speed-up or size, by the laws of a sweep's runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from pycompress._files import finite
from pycompress.laws.fitting import fit_methods
from pycompress.laws.law import Estimate, Law
from pycompress.runs import Run

STEPS = 201
# What extrapolation may try.
WIDEST = (0.01, 0.95)


@dataclass(frozen=True)
class Advice:
    """A method, the `keep` to ask it for, the true kept share of the decoder blocks that gives, and tokens of recovery.

    `loss`: predicted, with the interval that one run falls in. `speedup`: of the phase asked for, over the dense model;
    None where the runs measured none. `bytes`: of the whole model. `extrapolated`: beyond the method's runs.
    """

    model: str
    method: str
    keep: float | None
    kept: float
    recovery_tokens: float
    loss: Estimate
    speedup: float | None
    bytes: int
    extrapolated: bool

    def __str__(self) -> str:
        asked = f"{self.method}" if self.keep is None else f"{self.method}(keep={self.keep:.3g})"
        lines = [
            f"{asked} on {self.model}, {self.recovery_tokens:,.0f} tokens of recovery",
            f"keeps {self.kept:.3f} of the decoder blocks; {self.bytes / 1e6:.1f} MB in all",
            f"predicted loss {self.loss}",
            f"speed-up {'not measured' if self.speedup is None else f'{self.speedup:.2f}'}",
        ]
        if self.extrapolated:
            lines.append("this is beyond what was measured: a guess to be checked by a run")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite is None."""
        plain: dict[str, Any] = finite(asdict(self))
        return plain


@dataclass(frozen=True)
class Limits:
    """What the answer must not exceed; None is no limit."""

    max_loss: float | None = None
    min_speedup: float | None = None
    max_bytes: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        if not given:
            raise ValueError("give max_loss, min_speedup or max_bytes, or several of them")
        for name, value in given.items():
            if not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")

    def allow(self, advice: Advice) -> bool:
        return (
            (self.max_loss is None or advice.loss.value <= self.max_loss)
            and (self.min_speedup is None or (advice.speedup is not None and advice.speedup >= self.min_speedup))
            and (self.max_bytes is None or advice.bytes <= self.max_bytes)
        )

    def cost(self, advice: Advice) -> tuple[float, ...]:
        """What is to be least: the bytes where a loss is given, else the loss; then recovery."""
        first, second = advice.loss.value, float(advice.bytes)
        if self.max_loss is not None:
            first, second = second, first
        return first, second, advice.recovery_tokens

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:g}" for name, value in asdict(self).items() if value is not None)


def advise(
    runs: Iterable[Run],
    *,
    max_loss: float | None = None,
    min_speedup: float | None = None,
    max_bytes: float | None = None,
    model: str | None = None,
    tokens: float | Sequence[float] | None = None,
    law: str = "v1",
    unit: float = 1e6,
    phase: str = "decode",
    extrapolate: bool = False,
) -> Advice:
    """The method and ratio whose fitted law stays within the limits: with `max_loss` (nats a token) the fewest bytes,
    else the lowest loss at `min_speedup` in a `phase` ("decode", "prefill") and `max_bytes` of the whole model.

    `model`: which, where the runs have several. `tokens`: of recovery, those to choose among; by default the counts the
    method was measured with. Speed-ups, bytes and the `keep` to ask for are interpolated between the model's own runs.
    Raises `ValueError` where no measured ratio is within the limits; with `extrapolate` any ratio may then be taken, on
    straight lines through the runs, and the advice says so.
    """
    limits = Limits(max_loss, min_speedup, max_bytes)
    runs = [run for run in runs if run.measured("loss") is not None]
    model = _model(runs, model)
    if phase not in ("decode", "prefill"):
        raise ValueError(f"phase must be 'decode' or 'prefill', got {phase!r}")
    laws, reasons = fit_methods(runs, law, unit=unit, resamples=0, cuts=())
    offers = [
        _Offer(model, method, fitted, [run for run in runs if (run.method, run.model) == (method, model)], phase)
        for method, fitted in laws.items()
        if any((run.method, run.model) == (method, model) for run in runs)
    ]
    if not offers:
        raise ValueError(f"no method has a law: {'; '.join(f'{name}: {why}' for name, why in reasons.items())}")
    given = None if tokens is None else [tokens] if isinstance(tokens, int | float) else list(tokens)
    for beyond in (False, True) if extrapolate else (False,):
        found = [advice for offer in offers for advice in offer.advice(given, beyond) if limits.allow(advice)]
        if found:
            return min(found, key=limits.cost)
    measured = "; ".join(str(offer) for offer in offers)
    raise ValueError(f"nothing measured has {limits} on {model}; measured: {measured}" + _hint(extrapolate))


def _hint(extrapolate: bool) -> str:
    return ", and nothing beyond either" if extrapolate else "; extrapolate=True looks beyond"


def _model(runs: Sequence[Run], model: str | None) -> str:
    models = list(dict.fromkeys(run.model for run in runs))
    if not models:
        raise ValueError("no run has a loss; a sweep must have finished some")
    if model is None and len(models) > 1:
        raise ValueError(f"the runs are of {', '.join(models)}; say which model")
    if model is not None and model not in models:
        raise ValueError(f"model must be one of {', '.join(models)}, got {model!r}")
    return model or models[0]


class _Offer:
    """What one method offers for one model."""

    def __init__(self, model: str, method: str, law: Law, runs: list[Run], phase: str) -> None:
        self.model, self.method, self.law, self.runs, self.phase = model, method, law, runs, phase
        self.dense = float(np.mean([run.dense_loss for run in runs if run.dense_loss is not None]))
        ratios = [run.ratio for run in runs]
        self.measured = min(ratios), max(ratios)
        self.counts = sorted({float(run.recovery_tokens) for run in runs})

    def advice(self, tokens: list[float] | None, beyond: bool) -> list[Advice]:
        """Every ratio's, at each count of tokens; only beyond what was measured or only within."""
        low, high = self.law.tokens
        counts = [count for count in tokens or self.counts if beyond or low <= count <= high]
        ratios = np.linspace(*(WIDEST if beyond else self.measured), STEPS)
        keep, size, speed = (self._line(value, ratios) for value in (_asked, _bytes, self._time))
        if size is None:
            return []
        return [
            Advice(
                self.model,
                self.method,
                None if keep is None else float(min(1.0, keep[i])),
                float(1 - ratio),
                count,
                loss := self.law.predict(float(ratio), self.dense, count, extrapolate=beyond),
                None if speed is None or speed[i] <= 0 else float(1 / speed[i]),
                round(float(size[i])),
                loss.extrapolated or not self.measured[0] - 1e-9 <= ratio <= self.measured[1] + 1e-9,
            )
            for count in counts
            for i, ratio in enumerate(ratios)
        ]

    def _line(self, value: Any, ratios: np.ndarray) -> np.ndarray | None:
        """A quantity of the runs over the ratio: through their means inside, a least-squares line outside."""
        points: dict[float, list[float]] = {}
        for run in self.runs:
            if (y := value(run)) is not None:
                points.setdefault(round(run.ratio, 6), []).append(y)
        if not points:
            return None
        xs = np.array(sorted(points))
        ys = np.array([np.mean(points[x]) for x in xs])
        inside = np.interp(ratios, xs, ys)
        if len(xs) < 2:
            return inside
        outside = np.polyval(np.polyfit(xs, ys, 1), ratios)
        return np.where((ratios < xs[0]) | (ratios > xs[-1]), outside, inside)

    def _time(self, run: Run) -> float | None:
        """Time a token over the dense model's, which is nearly linear in the ratio."""
        speedup = run.speedup(self.phase)
        return None if speedup is None else 1 / speedup

    def __str__(self) -> str:
        low, high = self.measured
        losses = [run.loss for run in self.runs if run.loss is not None]
        counts = ", ".join(f"{count:,.0f}" for count in self.counts)
        return (
            f"{self.method} ratios {low:.2f} to {high:.2f} at {counts} tokens, losses {min(losses):.3f} to "
            f"{max(losses):.3f}"
        )


def _asked(run: Run) -> float | None:
    return run.keep_asked


def _bytes(run: Run) -> float | None:
    return run.bytes
