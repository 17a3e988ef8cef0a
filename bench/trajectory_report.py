"""Render docs/trajectory.md and its plot from bench/results/trajectory.json: part of `make performance`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from quality_report import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "trajectory.json"
PAGE = ROOT / "docs" / "trajectory.md"
PLOT = ROOT / "docs" / "img" / "trajectory.svg"
NAMES = {"trajectory": "trajectory", "magnitude": "magnitude", "wanda": "Wanda", "sparsegpt": "SparseGPT"}
# From which rise of the loss on we call it significant; the rate up to which the paper saw none.
SIGNIFICANT, MODERATE = 0.01, 0.6
SHARP = 3  # how many times as steep a sharp rise is

PAGE_TEXT = """# Weights along training

`PYCOMPRESS_DATA=folder {command}` trains a GPT-2 of 6 blocks and width 384 ({parameters:.1f}M parameters) on
tinyshakespeare with a `TrajectoryTracker`, prunes all linears of its blocks at each rate by each score, and records the
loss on held-out text in `bench/results/{file}`; `make performance` renders this page from there.
Training: {training} characters, seeds {seeds}; loss in nats a character, means over the seeds; dense {dense:.3f}.

{table}
![Loss over pruning rate](img/{plot})

What arXiv:2502.17071 says of its importance, on these models:

- *No significant loss up to {moderate:.0%}* {first}
- *A sharp rise beyond* {second}
- *Moderate pruning lowers the loss* {third}

A record takes {record:.1f} ms, a training step {step:.0f} ms, so a record every {every} steps takes {overhead:.2%} of
the time and one in every step {each:.1%}. The records of a running sum take {record_mb:.1f} MB beside
{weight_mb:.1f} MB of weights.
"""

Rows = dict[str, dict[str, Any]]


def rises(rows: Rows, score: str, place: int) -> list[float]:
    """Rise of the loss over the dense model's at one rate, a seed each."""
    return [row[score][place] / row["dense"] - 1 for row in rows.values()]


def verdict(holds: bool) -> str:
    return "holds" if holds else "does not hold"


def first_claim(rows: Rows, rates: list[float]) -> str:
    found = {score: rises(rows, score, rates.index(MODERATE)) for score in NAMES}
    told = ", ".join(f"{NAMES[score]} {min(each):+.1%} to {max(each):+.1%}" for score, each in found.items())
    return f"{verdict(max(found['trajectory']) < SIGNIFICANT)}. Rise at {MODERATE:.0%} over the seeds: {told}."


def second_claim(rows: Rows, rates: list[float]) -> str:
    beyond = rates[rates.index(MODERATE) + 2]
    before, after = (fmean(rises(rows, "trajectory", rates.index(rate))) for rate in (MODERATE, beyond))
    up_to, then = before / MODERATE / 10, (after - before) / (beyond - MODERATE) / 10
    slopes = f"{up_to:+.2%} up to {MODERATE:.0%}, {then:+.2%} from there to {beyond:.0%}"
    return f"{verdict(then > SHARP * max(up_to, 0.0))}. Rise for each tenth of zeros: {slopes}."


def third_claim(rows: Rows, rates: list[float]) -> str:
    moderate = range(rates.index(MODERATE))
    lower = {s: [min(row[s][place] for place in moderate) < row["dense"] for row in rows.values()] for s in NAMES}
    best = min(min(rises(rows, "trajectory", place)) for place in moderate)
    told = ", ".join(f"{NAMES[score]} {sum(found)} of {len(found)}" for score, found in lower.items())
    return (
        f"{verdict(all(lower['trajectory']))}. Seeds with a loss below the dense one at some rate below "
        f"{MODERATE:.0%}: {told}; trajectory at best {best:+.2%}."
    )


def longest(content: dict[str, Any]) -> tuple[str, Rows]:
    """The longest training on file, and its seeds."""
    name = max(content["training"], key=lambda name: int(name.split()[0]))
    return name, content["training"][name]


def render(content: dict[str, Any]) -> str:
    """The page."""
    training, rows = longest(content)
    rates = content["rates"]
    mean = {what: fmean(row[what] for row in rows.values()) for what in ("dense", "step_seconds", "record_seconds")}
    lines: dict[str, list[float | None]] = {
        name: [fmean(values) for values in zip(*(row[score] for row in rows.values()), strict=True)]
        for score, name in NAMES.items()
    }
    any_row = next(iter(rows.values()))
    return PAGE_TEXT.format(
        command=content["command"],
        file=RESULTS.name,
        plot=PLOT.name,
        training=training,
        seeds=", ".join(rows),
        parameters=any_row["parameters"] / 1e6,
        dense=mean["dense"],
        table=table(["score", *(f"{rate:.0%}" for rate in rates)], lines, "column", decimals=3),
        moderate=MODERATE,
        first=first_claim(rows, rates),
        second=second_claim(rows, rates),
        third=third_claim(rows, rates),
        record=1e3 * mean["record_seconds"],
        step=1e3 * mean["step_seconds"],
        every=any_row["every"],
        overhead=mean["record_seconds"] / any_row["every"] / mean["step_seconds"],
        each=mean["record_seconds"] / mean["step_seconds"],
        record_mb=any_row["record_bytes"] / 1e6,
        weight_mb=any_row["weight_bytes"] / 1e6,
    )


def draw(content: dict[str, Any]) -> Callable[[Figure], None]:
    """Loss over rate, a line a score, its seeds as a band."""

    def plot(figure: Figure) -> None:
        figure.set_size_inches(7, 4.5)
        axis = figure.subplots()
        _, rows = longest(content)
        rates = [0.0, *content["rates"]]
        for place, (score, name) in enumerate(NAMES.items()):
            seeds = list(zip(*([row["dense"], *row[score]] for row in rows.values()), strict=True))
            axis.plot(rates, list(map(fmean, seeds)), "-o", markersize=3, label=name)
            axis.fill_between(rates, list(map(min, seeds)), list(map(max, seeds)), alpha=0.2, color=f"C{place}")
        axis.axvline(MODERATE, color="0.7", linewidth=1)
        axis.set(xlabel="share of zeros", ylabel="loss, nats a character")
        axis.legend(frameon=False)

    return plot


def main() -> None:
    """Write the page and the plot, where there are results."""
    import matplotlib
    from matplotlib.figure import Figure

    if not RESULTS.exists():
        return
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    PAGE.write_text(render(content), encoding="utf-8")
    figure = Figure(layout="constrained")
    with matplotlib.rc_context({"svg.hashsalt": "pycompress", "svg.fonttype": "none"}):
        draw(content)(figure)
        figure.savefig(PLOT, metadata={"Date": None, "Creator": None})
    print(PAGE)
