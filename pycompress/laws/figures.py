"""A sweep's figures as SVG that takes the page's colour of text, so that it reads on light and dark alike."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from pycompress.laws.law import Law
from pycompress.laws.summary import Summary, pareto
from pycompress.runs import Run

# Of middle lightness, apart on white and on black.
COLOURS = ("#3f8fe0", "#e0792f", "#2fa56b", "#c75aa8", "#9a7be0", "#b8962b", "#3aa7b8", "#d65a5f")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Stands for the page's own colour of text, which replaces it.
INK = "#010203"
WIDE = 10.5
PANEL = 3.1


def figures(summary: Summary) -> list[tuple[str, str]]:
    """Titles and SVGs of all that the runs have. Raises `ImportError` without matplotlib."""
    titles = {quantity: f"The {quantity} over the compression ratio" for quantity in summary.quantities}
    drawn: list[tuple[str, Callable[[], Any]]] = [
        *((title, partial(over_ratio, summary, quantity)) for quantity, title in titles.items()),
        ("What recovery gains", partial(recovery, summary)),
        ("Speed over the compression ratio", partial(speed, summary)),
        ("Bytes and loss", partial(sizes, summary)),
    ]
    found = []
    for title, draw in drawn:
        with _style(title):
            figure = draw()
            if figure is not None:
                found.append((title, _svg(figure)))
    return found


def over_ratio(summary: Summary, quantity: str) -> Any:
    """A panel a method: its runs, its law for each model and count of tokens, the interval of one new run."""
    runs = [run for run in summary.finished if run.measured(quantity) is not None]
    relative = len(summary.models) > 1
    figure, axes = _panels(len(summary.methods), columns=2 if len(summary.methods) == 4 else 3)
    series = list(dict.fromkeys((run.model, run.recovery_tokens) for run in sorted(runs, key=_series)))
    # Of one model all runs have one dense value.
    dense = 1.0 if relative else (runs[0].measured(quantity) or (0.0, 0.0))[1]
    for axis, method in zip(axes, summary.methods, strict=True):
        law = summary.laws[quantity].get(method)
        for index, (model, tokens) in enumerate(series):
            chosen = [r for r in runs if (r.method, r.model, r.recovery_tokens) == (method, model, tokens)]
            if not chosen:
                continue
            colour = COLOURS[index % len(COLOURS)]
            measured = [run.measured(quantity) or (0.0, 1.0) for run in chosen]
            over = [by if relative else 1.0 for _, by in measured]
            values = [value / by for (value, _), by in zip(measured, over, strict=True)]
            axis.plot([r.ratio for r in chosen], values, MARKERS[index % len(MARKERS)], color=colour, markersize=4.5)
            if law is not None and law.tokens[0] <= tokens <= law.tokens[1]:
                _draw_law(axis, law, chosen, measured[0][1], over[0], colour)
        axis.axhline(dense, color=INK, linestyle=":", linewidth=1)
        axis.set_title(method)
    _scale(axes, [line for axis in axes for line in axis.get_lines()])
    labels = [_label(model, tokens, relative) for model, tokens in series]
    _legend(figure, labels, lambda i: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]))
    _name(figure, "compression ratio", f"{quantity} over the dense model's" if relative else quantity)
    return figure


def recovery(summary: Summary) -> Any:
    """By how much recovery lowers the loss of the same compressed model, in per cent; None where no run has both."""
    without = {_same(r): r.loss for r in summary.finished if r.recovery_tokens == 0 and r.loss is not None}
    gains: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for run in summary.finished:
        before = without.get(_same(run))
        if run.recovery_tokens and run.loss is not None and before is not None:
            gains.setdefault((run.method, run.recovery_tokens), []).append((run.ratio, 100 * (1 - run.loss / before)))
    if not gains:
        return None
    figure, (axis,) = _panels(1)
    counts = sorted({tokens for _, tokens in gains})
    for (method, tokens), points in gains.items():
        style = {"color": _colour(summary, method), "marker": MARKERS[counts.index(tokens) % len(MARKERS)]}
        line = "-" if tokens == counts[-1] else "--"
        axis.plot(*zip(*_means(points), strict=True), line, label=f"{method}, {tokens:,} tokens", **style)
    axis.axhline(0, color=INK, linestyle=":", linewidth=1)
    axis.set(xlabel="compression ratio", ylabel="loss lower by, %")
    _beside(axis)
    return figure


def speed(summary: Summary) -> Any:
    """Speed-ups of decode and prefill; None where no speed was measured."""
    phases = [phase for phase in ("decode", "prefill") if any(r.speedup(phase) is not None for r in summary.finished)]
    if not phases:
        return None
    figure, axes = _panels(len(phases), columns=2)
    for axis, phase in zip(axes, phases, strict=True):
        for method in summary.methods:
            measured = [(r.ratio, r.speedup(phase)) for r in summary.finished if r.method == method]
            points = _means([(x, y) for x, y in measured if y is not None])
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=_colour(summary, method), markersize=4.5)
        axis.axhline(1, color=INK, linestyle=":", linewidth=1)
        axis.set_title(phase)
    _legend(figure, summary.methods, lambda i: (COLOURS[i % len(COLOURS)], "o"))
    _name(figure, "compression ratio", "speed over the dense model's")
    return figure


def sizes(summary: Summary) -> Any:
    """Bytes and loss of every run, and the Pareto front; relative to the dense models where there are several."""
    runs = [run for run in summary.finished if run.bytes and run.dense_bytes and run.measured("loss") is not None]
    if not runs:
        return None
    figure, (axis,) = _panels(1)

    def point(run: Run) -> tuple[float, float]:
        loss, dense = run.measured("loss") or (0.0, 1.0)
        size, whole = run.bytes or 0, run.dense_bytes or 1
        return (size / whole, loss / dense) if len(summary.models) > 1 else (size / 1e6, loss)

    for method in summary.methods:
        chosen = [point(run) for run in runs if run.method == method]
        if chosen:
            style = {"color": _colour(summary, method), "label": method}
            axis.plot(*zip(*chosen, strict=True), "o", markersize=4.5, **style)
    for index, model in enumerate(summary.models):
        best = [point(run) for run in pareto([run for run in runs if run.model == model])]
        label = "_" if index else "Pareto front"
        axis.step(*zip(*best, strict=True), where="post", color=INK, linewidth=1, label=label)
    relative = len(summary.models) > 1
    axis.set_xlabel("bytes over the dense model's" if relative else "MB of the whole model")
    axis.set_ylabel("loss over the dense model's" if relative else "loss, nats a token")
    _scale([axis], axis.get_lines())
    _beside(axis)
    return figure


def _draw_law(axis: Any, law: Law, runs: Sequence[Run], dense: float, over: float, colour: str) -> None:
    ratios = np.linspace(min(r.ratio for r in runs), max(r.ratio for r in runs), 60)
    found = [law.predict(float(r), dense, runs[0].recovery_tokens, extrapolate=True) for r in ratios]
    axis.plot(ratios, [estimate.value / over for estimate in found], color=colour, linewidth=1.4)
    low, high = [e.low / over for e in found], [e.high / over for e in found]
    axis.fill_between(ratios, low, high, color=colour, alpha=0.13, linewidth=0)


def _panels(count: int, columns: int = 3) -> tuple[Any, list[Any]]:
    """A figure of `count` axes side by side that share their scales; the last row may be short."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = _matplotlib("figure").Figure(
        figsize=(WIDE, PANEL * rows + (0.6 if count == 1 else 0)), layout="constrained"
    )
    axes = list(figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flat)
    for axis in axes[count:]:
        axis.remove()
    for axis in axes[:count]:
        axis.grid(alpha=0.2, color=INK, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        # Of a short last row, the panels above show their ratios too.
        axis.tick_params(labelbottom=True)
    return figure, axes[:count]


def _scale(axes: Iterable[Any], lines: Iterable[Any]) -> None:
    """A logarithmic axis of plain numbers where values span more than three times."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 3 * values.min():
        ticker = _matplotlib("ticker")
        for axis in axes:
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
            axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _legend(figure: Any, labels: Sequence[str], style: Callable[[int], tuple[str, str]]) -> None:
    line = _matplotlib("lines").Line2D
    handles = [
        line([], [], color=style(i)[0], marker=style(i)[1], label=label, markersize=5) for i, label in enumerate(labels)
    ]
    # As many columns as fit the width.
    columns = max(1, min(4, len(handles), 120 // (max(map(len, labels)) + 8)))
    figure.legend(handles=handles, loc="outside upper center", ncols=columns, frameon=False)


def _beside(axis: Any) -> None:
    """A legend that covers nothing."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)


def _name(figure: Any, x: str, y: str) -> None:
    figure.supxlabel(x, fontsize=10)
    figure.supylabel(y, fontsize=10)


def _means(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """In order of x, the mean y of equal x."""
    found: dict[float, list[float]] = {}
    for x, y in points:
        found.setdefault(round(x, 6), []).append(y)
    return [(x, float(np.mean(found[x]))) for x in sorted(found)]


def _same(run: Run) -> tuple[str, str, int]:
    return run.model, repr(run.recipe), run.seed


def _series(run: Run) -> tuple[str, int]:
    return run.model, run.recovery_tokens


def _label(model: str, tokens: int, relative: bool) -> str:
    recovered = f"{tokens:,} tokens of recovery" if tokens else "without recovery"
    return f"{model}, {recovered}" if relative else recovered


def _colour(summary: Summary, method: str) -> str:
    return COLOURS[summary.methods.index(method) % len(COLOURS)]


@contextmanager
def _style(salt: str) -> Iterator[None]:
    """Text as text, in one colour; the same figure has the same bytes."""
    places = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    settings = dict.fromkeys(places, INK) | {"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10}
    with _matplotlib("").rc_context(settings | {"axes.titlesize": 10, "axes.titleweight": "bold"}):
        yield


def _svg(figure: Any) -> str:
    """The figure alone, without a header, metadata or ids that another figure on the page has too."""
    text = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    svg = text.getvalue()
    svg = re.sub(r' id="[A-Za-z][A-Za-z0-9.]*_\d+"', "", svg[svg.index("<svg") :])
    svg = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', svg, count=1)
    return svg.replace(INK, "currentColor")


def _matplotlib(name: str) -> Any:
    try:
        return import_module(f"matplotlib.{name}".rstrip("."))
    except ImportError as error:
        raise ImportError("figures of laws need matplotlib: pip install pycompress[laws]") from error
