"""Render docs/laws-gemma-3-270m.md from the runs in bench/results: part of `make performance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pycompress import laws, runs
from pycompress.laws.summary import Summary, Table, coefficients, critical, front, held_out, summarise
from pycompress.runs import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "laws-gemma-3-270m.jsonl"
PAGE = ROOT / "docs" / "laws-gemma-3-270m.md"
# Tokens to one of D. In the paper's millions the few thousand tokens here would all be next to none.
UNIT = 1e3
# What arXiv:2504.04342 says, version 1: exponents, and shares.
EXPONENTS = {"loss": 2.0, "accuracy": -1.0}
GAIN = 0.55
KEPT = {"without recovery": 0.57, "with recovery": 0.84}
FASTER = {"large models": 0.60, "models up to 7B": 0.35}
# Nats above the dense loss, and a speed-up of prefill, for which advice is shown.
RISES = (0.5, 1.0)
SPEEDUP = 2

BEGIN = """# Compression laws of Gemma-3-270M

`pycompress sweep bench/laws-gemma-3-270m.yaml -o build/laws` measured {count} runs, which are recorded in
`bench/results/{file}`; `pycompress laws bench/results/{file} --unit {unit:g}` prints these laws
and draws them on one HTML page; `make performance` renders this page. Loss: nats a token on 8 windows of 512 tokens of
WikiText-2's raw test text, dense {dense:.4f}. Accuracy: the first {questions} questions of {tasks}, dense
{accuracy:.3f}. What the methods do: [methods](methods.md). What a law is and what `pycompress advise` makes of it:
[laws](laws.md).

The ratio r is the removed share of the decoder blocks' bytes. Losses without recovery, by the `keep` asked for:

"""
RECOVERED = """
Losses with recovery:

"""
CLAIMS = """
## What arXiv:2504.04342 says, on this model

"""
ADVICE = """
## Advice

What `pycompress advise bench/results/{file} --unit {unit:g}` answers:
"""
SPEED = """
## Speed

Prefill of 128 tokens and decoding, tokens a second over the dense model's, in turns with it in the same run. On a CPU,
{threads} thread a run, two runs at a time, which makes single figures rough. Gemma's embedding and head are 63% of its
parameters and are not compressed, so decoding, which reads the head for every token, gains little here;
[performance](performance.md) has a model of 1.1B whose decoder dominates.

"""


def render(found: Sequence[Run]) -> str:
    """The page."""
    first, second = (summarise(found, law, UNIT) for law in ("v1", "v2"))
    some = next(run for run in first.finished if run.tasks)
    (count,) = {task["count"] for run in first.finished for task in run.tasks.values()}
    begin = BEGIN.format(
        count=len(found),
        file=RESULTS.name,
        unit=UNIT,
        dense=some.dense_loss,
        questions=count,
        tasks=", ".join(some.tasks),
        accuracy=some.dense_accuracy,
    )
    parts = [begin, markdown(losses(first)), RECOVERED, markdown(recovered(first))]
    for summary in (first, second):
        tables = [make(summary, what) for what in ("loss", "accuracy") for make in (coefficients, held_out)]
        parts += [section(table, f"{summary.law}: ") for table in tables]
    parts += [section(critical(first, "loss"), "v1: "), section(front(first)), CLAIMS, *claims(first)]
    parts += [ADVICE.format(file=RESULTS.name, unit=UNIT), *advice(found, some.dense_loss or 0.0)]
    threads = sorted({run.versions["threads"] for run in found if run.versions})
    parts += [SPEED.format(threads=", ".join(threads)), markdown(speeds(first))]
    return "".join(parts)


def section(table: Table, of: str = "") -> str:
    """A table under its title, which begins with `of`; nothing for one without rows."""
    note = f"\n{table.note}\n" if table.note else ""
    return f"\n## {of}{table.title}\n\n{markdown(table)}{note}" if table.rows else ""


def markdown(table: Table) -> str:
    lines = [table.columns, ("---",) * len(table.columns), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _plain(summary: Summary) -> dict[str, dict[float, Run]]:
    """By method and keep the runs without recovery."""
    found: dict[str, dict[float, Run]] = {}
    for run in summary.finished:
        if not run.recovery_tokens and run.keep_asked is not None:
            found.setdefault(run.method, {})[run.keep_asked] = run
    return found


def _by_keep(summary: Summary, title: str, cell: Callable[[Run], str]) -> Table:
    lines = _plain(summary)
    keeps = sorted({keep for line in lines.values() for keep in line}, reverse=True)
    rows = [(name, *(cell(line[k]) if k in line else "" for k in keeps)) for name, line in lines.items()]
    return Table(title, ("method", *(f"{keep:g}" for keep in keeps)), tuple(rows))


def losses(summary: Summary) -> Table:
    """Losses without recovery, and true ratios."""
    return _by_keep(summary, "Losses", lambda run: f"{run.loss:.3f} at r {run.ratio:.2f}")


def speeds(summary: Summary) -> Table:
    return _by_keep(
        summary, "Speed", lambda run: f"{run.speedup('prefill') or 0:.2f}x, {run.speedup('decode') or 0:.2f}x"
    )


def gains(summary: Summary) -> list[tuple[Run, float, float]]:
    """Each run with recovery, the loss without it, and the share of that which recovery took away."""
    plain = _plain(summary)
    found = []
    for run in summary.finished:
        before = plain.get(run.method, {}).get(run.keep_asked or 0.0)
        if run.recovery_tokens and before is not None and run.loss is not None and before.loss is not None:
            found.append((run, before.loss, 1 - run.loss / before.loss))
    return found


def recovered(summary: Summary) -> Table:
    lines: dict[tuple[str, str], list[str]] = {}
    found = sorted(
        gains(summary), key=lambda gain: (summary.methods.index(gain[0].method), -(gain[0].keep_asked or 0.0))
    )
    counts = sorted({run.recovery_tokens for run, _, _ in found})
    for run, before, gain in found:
        line = lines.setdefault((run.method, f"{run.keep_asked:g}"), [f"{before:.3f}", *[""] * len(counts)])
        line[1 + counts.index(run.recovery_tokens)] = f"{run.loss:.3f} ({-gain:+.1%})"
    columns = ("method", "keep", "no recovery", *(f"{count:,} tokens" for count in counts))
    return Table("Recovery", columns, tuple((*name, *cells) for name, cells in lines.items()), left=2)


def claims(summary: Summary) -> list[str]:
    """What the paper claims, each with what was found."""
    # The recovery term is not 1 without recovery, and shifts what the exponents have to explain.
    plain = summarise([run for run in summary.finished if not run.recovery_tokens], summary.law, summary.unit)
    parts = [exponents(plain, "loss", "The loss rises quadratically with 1 + r: β is about 2.")]
    parts += [exponents(plain, "accuracy", "Accuracy falls linearly: β is about -1.")]
    run, _, gain = max(gains(summary), key=lambda found: found[2])
    most = max(run.recovery_tokens for run in summary.finished)
    parts.append(
        f"- *Recovery lowers the test loss by up to {GAIN:.0%}* (1M to 25M tokens). Here by up to {gain:.1%}: "
        f"{run.method} at keep {run.keep_asked:g} with {run.recovery_tokens:,} tokens; {most:,} were the most tried.\n"
    )
    parts += [accuracy_kept(summary), faster(summary)]
    return parts


def exponents(summary: Summary, quantity: str, claim: str) -> str:
    """Whether the exponent of the ratio that the paper's words mean is in the interval of each method's."""
    told, inside = [], 0
    for method, law in summary.laws[quantity].items():
        (beta,) = (c for c in law.coefficients if c.name == "β")
        holds = beta.low <= EXPONENTS[quantity] <= beta.high
        inside += holds
        told.append(f"{method} {beta.value:.2f} ({beta.low:.2f} to {beta.high:.2f})")
    said = f"Without recovery so it is, within its interval, of {inside} of {len(told)} methods"
    return f"- *{claim}* {said}: {', '.join(told)}.\n"


def accuracy_kept(summary: Summary) -> str:
    """The mean share of the dense model's accuracy that is left below a ratio of one half."""
    told = []
    for (name, said), with_it in zip(KEPT.items(), (False, True), strict=True):
        near = [r for r in summary.finished if r.ratio < 0.5 and r.tasks and bool(r.recovery_tokens) == with_it]
        shares = [(run.accuracy or 0.0) / (run.dense_accuracy or 1.0) for run in near]
        if shares:
            told.append(f"{name} {fmean(shares):.0%} over {len(shares)} runs (paper {said:.0%})")
    return f"- *Below a ratio of 0.5 a share of the accuracy is kept*, guessing counted: {', '.join(told)}.\n"


def faster(summary: Summary) -> str:
    """The speed-up at the largest ratio of each method, beside the paper's at 90%."""
    said = ", ".join(f"{share:.0%} for {what}" for what, share in FASTER.items())
    told = []
    for method, line in _plain(summary).items():
        run = line[min(line)]
        speed = {phase: run.speedup(phase) for phase in ("prefill", "decode")}
        if all(speed.values()):
            both = ", ".join(f"{value - 1:+.0%} {phase}" for phase, value in speed.items() if value is not None)
            told.append(f"{method} at r {run.ratio:.2f} {both}")
    return f"- *Inference is faster at 90% by up to {said}.* Here: {'; '.join(told)}.\n"


def advice(found: Sequence[Run], dense: float) -> list[str]:
    """The answers for rises of the loss, in nats, and for a speed-up."""
    asked: list[dict[str, Any]] = [{"max_loss": round(dense + rise, 3)} for rise in RISES]
    asked.append({"min_speedup": SPEEDUP, "phase": "prefill"})
    parts = []
    for limits in asked:
        said = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in limits.items())
        try:
            answer = str(laws.advise(found, unit=UNIT, **limits))
        except ValueError as error:
            answer = str(error)
        parts.append(f"\n`{said}`:\n\n```\n{answer}\n```\n")
    return parts


def main() -> None:
    """Write the page, where there are runs."""
    if RESULTS.exists():
        PAGE.write_text(render(runs.load(RESULTS)), encoding="utf-8")
        print(PAGE)
