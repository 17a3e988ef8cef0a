"""Least squares on logarithms: a law from runs, its intervals, and its errors on runs that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from pycompress.laws.law import FORMS, Coefficient, Features, HeldOut, Law
from pycompress.runs import Run

# Ratios at which runs are split into those that are fitted and those that are predicted.
CUTS = (0.25, 0.35, 0.45, 0.55, 0.65, 0.75)


def fit(
    runs: Iterable[Run],
    law: str = "v1",
    quantity: str = "loss",
    unit: float = 1e6,
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    cuts: Sequence[float] = CUTS,
) -> Law:
    """Fit a law to the runs that have the quantity; failed ones do not count.

    `law`: "v1" is `L = L0^α (1+r)^β (1 + 1/(D+1))^γ` with D the recovery tokens in `unit`s, arXiv:2504.04342; "v2" is
    `L = L0 P0 (1-r)^α`, without recovery, of its later version. L is `quantity`, "loss" or "accuracy". A term that does
    not vary in the data is left out, with α = 1 or γ = 0, and `Law.notes` says so. `level`: of the intervals.
    `resamples`: of the runs, drawn by `seed`, for the bootstrap's. `cuts`: ratios up to which runs are fitted, and
    those above predicted; the runs of each model are predicted by a law fitted to the others'.

    Raises `ValueError` where there are too few runs or too little varies, `ImportError` without statsmodels.
    """
    _check(law, unit, level)
    table, notes = _table(runs, law, quantity)
    fitted = _fitted(table, law, quantity, unit, level, (resamples, seed), notes)
    held = tuple(_held_out(table, law, quantity, unit, cuts))
    return Law(**fitted, held_out=held)


def fit_methods(
    runs: Iterable[Run], law: str = "v1", quantity: str = "loss", unit: float = 1e6, **settings: Any
) -> tuple[dict[str, Law], dict[str, str]]:
    """A law for each method's runs, and for methods without one the reason why; settings and errors as of `fit`."""
    _check(law, unit, settings.get("level", 0.95))
    runs = list(runs)
    laws: dict[str, Law] = {}
    reasons: dict[str, str] = {}
    for method in dict.fromkeys(run.method for run in runs):
        try:
            laws[method] = fit([run for run in runs if run.method == method], law, quantity, unit, **settings)
        except ValueError as error:
            reasons[method] = str(error)
    return laws, reasons


@dataclass(frozen=True)
class _Observations:
    """Columns of floats `[runs]`, and the model of each."""

    ratio: np.ndarray
    dense: np.ndarray
    tokens: np.ndarray
    value: np.ndarray
    model: np.ndarray

    def where(self, chosen: np.ndarray) -> _Observations:
        return _Observations(**{name: column[chosen] for name, column in vars(self).items()})

    def __len__(self) -> int:
        return len(self.ratio)


def _check(law: str, unit: float, level: float) -> None:
    if law not in FORMS:
        raise ValueError(f"law must be one of {', '.join(map(repr, FORMS))}, got {law!r}")
    if not unit > 0:
        raise ValueError(f"unit must be a number of tokens above 0, got {unit!r}")
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level!r}")


def _table(runs: Iterable[Run], law: str, quantity: str) -> tuple[_Observations, list[str]]:
    """The runs that can be fitted, and what was left out."""
    rows, zeros = [], 0
    for run in runs:
        measured = run.measured(quantity)
        if measured is None:
            continue
        value, dense = measured
        if min(value, dense) <= 0:
            zeros += 1
        else:
            rows.append((run.ratio, dense, float(run.recovery_tokens), value, run.model))
    notes = [f"{zeros} runs with {quantity} 0 have no logarithm and are left out"] if zeros else []
    numbers = np.array([row[:4] for row in rows], dtype=float).reshape(-1, 4).T
    table = _Observations(
        numbers[0], numbers[1], numbers[2], numbers[3], np.array([row[4] for row in rows], dtype=object)
    )
    if not FORMS[law].recovers and len(set(table.tokens)) > 1:
        fewest = table.tokens.min()
        other = table.tokens != fewest
        notes.append(f"law {law} has no recovery: {other.sum()} runs with other than {fewest:,.0f} tokens are left out")
        table = table.where(~other)
    return table, notes


def _design(table: _Observations, law: str, unit: float) -> tuple[np.ndarray, np.ndarray, list[str], dict[str, float]]:
    """The features `[runs, terms]` and the target `[runs]` of the regression, its terms, and the fixed coefficients.

    Raises ValueError where the terms cannot be told apart.
    """
    form = FORMS[law]
    if len(np.unique(table.ratio.round(9))) < 2:
        raise ValueError(f"a law needs runs of at least 2 compression ratios, got {len(table)} runs of one or none")
    features: Features = form.features(table.ratio, table.dense, table.tokens / unit)
    fixed = form.always | {name: value for name, value in form.constant.items() if np.ptp(features[name]) < 1e-12}
    terms = [name for name in features if name not in fixed]
    if len(table) <= len(terms):
        raise ValueError(
            f"law {law} has {len(terms)} coefficients ({', '.join(terms)}) to fit and needs more runs than that, "
            f"got {len(table)}"
        )
    design = np.stack([features[name] for name in terms], axis=1)
    if np.linalg.matrix_rank(design) < len(terms):
        raise ValueError(
            f"the {len(table)} runs do not tell {', '.join(terms)} apart; vary ratio, tokens and model independently"
        )
    target = np.log(table.value) - sum(features[name] * value for name, value in fixed.items())
    return design, target, terms, fixed


def _fitted(
    table: _Observations,
    law: str,
    quantity: str,
    unit: float,
    level: float,
    resampling: tuple[int, int],
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """All fields of the law but its errors on held-out runs."""
    design, target, terms, fixed = _design(table, law, unit)
    found = _regression()(target, design).fit()
    ends = found.conf_int(1 - level)
    bootstrap = _bootstrap(design, target, level, *resampling)
    coefficients = tuple(
        Coefficient(
            name, float(found.params[i]), float(found.bse[i]), float(ends[i][0]), float(ends[i][1]), bootstrap[i]
        )
        for i, name in enumerate(terms)
    )
    why = {
        "α": "all runs are of one dense value: α is 1",
        "γ": f"all runs have {table.tokens[0]:,.0f} recovery tokens: γ is left out",
    }
    left_out = [why[name] for name in fixed if name not in FORMS[law].always]
    return {
        "law": law,
        "quantity": quantity,
        "unit": unit,
        "level": level,
        "quantile": float(import_module("scipy.stats").t.ppf((1 + level) / 2, found.df_resid)),
        "coefficients": coefficients,
        "fixed": fixed,
        "covariance": tuple(tuple(map(float, row)) for row in found.cov_params()),
        "residual": float(found.scale**0.5),
        "degrees": int(found.df_resid),
        "adjusted_r2": float(found.rsquared_adj),
        "f": float(found.fvalue),
        "f_p": float(found.f_pvalue),
        "centred": bool(found.k_constant),
        "count": len(table),
        "ratios": (float(table.ratio.min()), float(table.ratio.max())),
        "tokens": (int(table.tokens.min()), int(table.tokens.max())),
        "dense": (float(table.dense.min()), float(table.dense.max())),
        "notes": (*left_out, *notes),
    }


def _bootstrap(
    design: np.ndarray, target: np.ndarray, level: float, resamples: int, seed: int
) -> list[tuple[float, float] | None]:
    """Percentile intervals of each coefficient over fits to runs drawn with replacement."""
    count, terms = design.shape
    if resamples < 1:
        return [None] * terms
    drawn = np.random.default_rng(seed).integers(count, size=(resamples, count))
    # Draws of too few different runs do not determine the coefficients.
    regular = drawn[np.linalg.matrix_rank(design[drawn]) == terms]
    if len(regular) < resamples / 2:
        return [None] * terms
    coefficients = (np.linalg.pinv(design[regular]) @ target[regular][..., None])[..., 0]
    low, high = np.quantile(coefficients, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def _held_out(table: _Observations, law: str, quantity: str, unit: float, cuts: Sequence[float]) -> Iterable[HeldOut]:
    fitted = [int((table.ratio <= cut).sum()) for cut in cuts]
    for cut in [cut for i, cut in enumerate(cuts) if fitted[i] not in fitted[:i]]:
        yield from _split(table, table.ratio <= cut, (law, quantity, unit), HeldOut("ratios", 0, 0, 0.0, above=cut))
    models = dict.fromkeys(table.model)
    for model in models if len(models) > 1 else ():
        held = HeldOut("model", 0, 0, 0.0, model=model)
        yield from _split(table, table.model != model, (law, quantity, unit), held)


def _split(table: _Observations, seen: np.ndarray, how: tuple[str, str, float], held: HeldOut) -> Iterable[HeldOut]:
    """The error on the runs not seen, or nothing where those that are seen cannot be fitted."""
    unseen = table.where(~seen)
    if not len(unseen):
        return
    try:
        law = Law(**_fitted(table.where(seen), *how, level=0.95, resampling=(0, 0)))
    except ValueError:
        return
    columns = zip(unseen.ratio, unseen.dense, unseen.tokens, strict=True)
    predicted = np.array([law.predict(*row, extrapolate=True).value for row in columns])
    error = float(np.mean(np.abs(predicted - unseen.value) / unseen.value))
    yield HeldOut(held.kind, int(seen.sum()), len(unseen), error, held.above, held.model)


def _regression() -> Callable[..., Any]:
    try:
        return import_module("statsmodels.api").OLS
    except ImportError as error:
        raise ImportError("laws are fitted by statsmodels: pip install pycompress[laws]") from error
