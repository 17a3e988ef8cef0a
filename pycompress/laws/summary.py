"""What a sweep's runs say, as tables: laws, critical ratios, errors on unseen runs, the Pareto front, what failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pycompress._files import finite
from pycompress._tables import aligned
from pycompress.laws.fitting import fit_methods
from pycompress.laws.law import FORMS, Estimate, Law
from pycompress.runs import QUANTITIES, Run

# Multiples of the dense model's value for which the critical ratio is given.
SIGMAS = {"loss": (1.1, 1.25, 1.5, 2.0), "accuracy": (0.9, 0.8, 0.65, 0.5)}


@dataclass(frozen=True)
class Table:
    """A title, a head, rows of text, the first `left` columns of which are names, and a note below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    left: int = 1

    def __str__(self) -> str:
        return "\n".join([self.title, "", aligned([self.columns, *self.rows], self.left), *filter(None, [self.note])])


@dataclass(frozen=True)
class Summary:
    """The runs, finished and failed, and by quantity the law of each method or why it has none."""

    finished: list[Run]
    failed: list[Run]
    law: str
    unit: float
    laws: dict[str, dict[str, Law]] = field(default_factory=dict)
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(run.model for run in self.finished))

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(run.method for run in self.finished))

    @property
    def quantities(self) -> list[str]:
        """Those that were measured."""
        return list(self.laws)

    def tokens(self, method: str) -> list[int]:
        """The counts of recovery tokens a method was run with."""
        return sorted({run.recovery_tokens for run in self.finished if run.method == method})

    def tables(self) -> list[Table]:
        """Every table that has rows."""
        tables = [
            *(make(self, quantity) for quantity in self.quantities for make in (coefficients, critical, held_out)),
            front(self),
            failures(self),
        ]
        return [table for table in tables if table.rows]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: the laws, and the tables but for theirs; what is not finite is None."""
        by_quantity = {
            quantity: {method: law.to_dict() for method, law in laws.items()} for quantity, laws in self.laws.items()
        }
        plain: dict[str, Any] = {"law": self.law, "unit": self.unit, "laws": by_quantity}
        plain |= {
            "without_a_law": self.reasons,
            "critical_ratios": [
                row | {"ratio": asdict(row["ratio"])}
                for quantity in self.quantities
                for row in critical_ratios(self, quantity)
            ],
            "failed": {run.key: run.error for run in self.failed},
        }
        found: dict[str, Any] = finite(plain)
        return found


def summarise(runs: Iterable[Run], law: str = "v1", unit: float = 1e6) -> Summary:
    """Fit every method's runs. Raises `ValueError` where no run has finished, and as `fit` does for a wrong setting."""
    runs = list(runs)
    finished = [run for run in runs if run.error is None and run.keep is not None]
    if not finished:
        why = f"; the first failed with {runs[0].error}" if runs else ""
        raise ValueError(f"none of the {len(runs)} runs has finished{why}")
    laws: dict[str, dict[str, Law]] = {}
    reasons: dict[str, dict[str, str]] = {}
    for quantity in QUANTITIES:
        measured = [run for run in finished if run.measured(quantity) is not None]
        if measured:
            laws[quantity], reasons[quantity] = fit_methods(measured, law, quantity, unit)
    failed = [run for run in runs if run not in finished]
    return Summary(finished, failed, law, unit, laws, reasons)


def coefficients(summary: Summary, quantity: str) -> Table:
    """A row a coefficient."""
    rows: list[tuple[str, ...]] = []
    for method, law in summary.laws[quantity].items():
        for i, c in enumerate(law.coefficients):
            drawn = "-" if c.bootstrap is None else _span(*c.bootstrap)
            fit = (f"{law.adjusted_r2:.4f}", f"{law.f:,.1f}", f"{law.f_p:.2g}", str(law.count)) if i == 0 else ("",) * 4
            rows.append((method if i == 0 else "", c.name, f"{c.value:.4f}", f"{c.stderr:.4f}", _span(c.low, c.high)))
            rows[-1] += (drawn, *fit)
    notes: dict[str, list[str]] = {}
    for method, law in summary.laws[quantity].items():
        for note in law.notes:
            notes.setdefault(note, []).append(method)
    for method, reason in summary.reasons[quantity].items():
        notes.setdefault(f"no law, since {reason}", []).append(method)
    about = "" if FORMS[summary.law].always else " Without a constant, R² is taken about zero."
    said = [f"{', '.join(methods)}: {note}" for note, methods in notes.items()]
    note = f"{FORMS[summary.law].equation}, L the {quantity}; D in units of {summary.unit:,.0f} tokens.{about}"
    columns = ("method", "", "value", "std. error", "95% interval", "bootstrap 95%", "adj. R²", "F", "p(F)", "runs")
    return Table(f"Fitted law of the {quantity}", columns, tuple(rows), "\n".join([note, *said]), left=2)


def critical_ratios(summary: Summary, quantity: str) -> list[dict[str, Any]]:
    """The critical ratio of each method, model, tokens of recovery and sigma, as plain values."""
    rows = []
    for method, law in summary.laws[quantity].items():
        for model, dense in _dense(summary, method, quantity).items():
            for tokens in summary.tokens(method):
                if not law.tokens[0] <= tokens <= law.tokens[1]:
                    continue
                for sigma in SIGMAS[quantity]:
                    found = law.critical_ratio(sigma, dense, tokens, extrapolate=True)
                    what = {"quantity": quantity, "method": method, "model": model, "tokens": tokens, "sigma": sigma}
                    rows.append(what | {"ratio": found})
    return rows


def critical(summary: Summary, quantity: str) -> Table:
    """How far each method may go until the law reaches a multiple of the dense value."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for row in critical_ratios(summary, quantity):
        name = (row["method"], *([row["model"]] if len(summary.models) > 1 else []), f"{row['tokens']:,}")
        rows.setdefault(name, []).append(_critical(row["ratio"]))
    names = ("method", *(["model"] if len(summary.models) > 1 else []), "recovery tokens")
    worse = "rises" if quantity == "loss" else "falls"
    return Table(
        f"Critical ratios of the {quantity}",
        (*names, *(f"σ = {sigma:g}" for sigma in SIGMAS[quantity])),
        tuple((*name, *cells) for name, cells in rows.items()),
        f"The compression ratio at which the {quantity} {worse} to σ times the dense model's, with its 95% interval. "
        "* beyond the measured ratios, where the law is a guess.",
        left=len(names) - 1,
    )


def held_out(summary: Summary, quantity: str) -> Table:
    """Errors on runs that the law has not seen."""
    rows = [
        (method, str(held), str(held.fitted), str(held.tested), f"{100 * held.error:.2f}%")
        for method, law in summary.laws[quantity].items()
        for held in law.held_out
    ]
    columns = ("method", "predicted", "runs fitted", "runs predicted", "mean error")
    note = f"Mean of |predicted - measured| / measured {quantity}; fitted to the other runs of the method."
    return Table(f"Errors of the {quantity} on unseen runs", columns, tuple(rows), note, left=2)


def pareto(runs: Sequence[Run]) -> list[Run]:
    """Of one model's runs those with no other of fewer bytes and a lower loss, the smallest first."""
    best: list[Run] = []
    for run in sorted(runs, key=lambda run: (run.bytes, run.loss)):
        if not best or (run.loss or 0.0) < (best[-1].loss or 0.0):
            best.append(run)
    return best


def front(summary: Summary) -> Table:
    """The Pareto front of bytes and loss of each model."""
    rows = []
    for model in summary.models:
        for run in pareto([r for r in summary.finished if r.model == model and r.bytes and r.loss is not None]):
            speed, dense = run.speedup(), run.dense_bytes or 0
            rows.append(
                (
                    *([model] if len(summary.models) > 1 else []),
                    run.method,
                    _asked(run),
                    f"{run.recovery_tokens:,}",
                    f"{(run.bytes or 0) / 1e6:.1f} of {dense / 1e6:.1f}",
                    f"{run.loss:.4f}",
                    "-" if speed is None else f"{speed:.2f}",
                )
            )
    names = ("model",) if len(summary.models) > 1 else ()
    columns = (*names, "method", "keep", "recovery tokens", "MB", "loss", "decode speed-up")
    note = "Runs that no other run beats in bytes and loss at once."
    return Table("Pareto front of bytes and loss", columns, tuple(rows), note, left=len(names) + 1)


def failures(summary: Summary) -> Table:
    """Runs that ended in an error."""
    rows = [(run.method, _asked(run), f"{run.recovery_tokens:,}", run.model, run.error or "") for run in summary.failed]
    return Table("Failed runs", ("method", "keep", "recovery tokens", "model", "error"), tuple(rows), left=5)


def _dense(summary: Summary, method: str, quantity: str) -> dict[str, float]:
    """The dense value of each model that a method has runs of."""
    values: dict[str, float] = {}
    for run in summary.finished:
        measured = run.measured(quantity)
        if run.method == method and measured is not None:
            values[run.model] = measured[1]
    return values


def _asked(run: Run) -> str:
    return "-" if run.keep_asked is None else f"{run.keep_asked:g}"


def _critical(found: Estimate) -> str:
    if found.value in (0.0, 1.0):
        return "at once" if found.value == 0 else "never"
    return f"{found.value:.2f}{'*' if found.extrapolated else ''} ({found.low:.2f} to {found.high:.2f})"


def _span(low: float, high: float) -> str:
    return f"{low:.3f} to {high:.3f}"
