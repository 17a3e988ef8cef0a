"""Render docs/quality.md, its plot and README's tables of quality from bench/results: part of `make performance`.

The texts say nothing that the results do not; the same results give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "quality-gemma-3-270m.json"
README = ROOT / "README.md"
SMALL = ROOT / "bench" / "results" / "quality-small.json"
PAGE = ROOT / "docs" / "quality.md"
PLOT = ROOT / "docs" / "img" / "quality-pruned.svg"

PACKED = {
    "Q and K, 3 bits a weight": "Q, K at 3 bits: ",
    "Q and K, 2 bits a weight": "Q, K at 2 bits: ",
    "every linear of the decoder, 4.5 bits": "all at 4.5 bits: ",
    "every linear of the decoder, 3.5 bits": "all at 3.5 bits: ",
    "every linear of the decoder, 3 bits": "all at 3 bits: ",
    "every linear of the decoder, keep 0.65": "all, keep 0.65: ",
    "every linear of the decoder, keep 0.8": "all, keep 0.8: ",
}
STORED = {
    "ours, 16 bits": "ours",
    "ours, int8": "ours, int8",
    "ours, int4": "ours, int4",
    "RTN": "RTN",
    "RTN in groups of 64": "RTN in groups",
    "NF4": "NF4",
    "published SWSC": "published SWSC",
    "ours on weights alone": "weights only",
}
METHODS = {
    "SubnetSearch": "ours",
    "… heads too": "ours, heads too",
    "… and evolution": "ours, searched",
    "… every linear refitted": "ours, every linear refitted",
    "… not refitted": "ours, not refitted",
    "… the same share of every block": "ours, uniform",
    "… the paper's scores, uniform, refitted": "the paper's scores",
    "FLAP": "FLAP",
    "FLAP, the same share of every block": "FLAP, uniform",
    "Wanda": "Wanda",
    "Taylor": "Taylor",
    "LayerDrop by influence": "layers by influence",
    "LayerDrop, the last": "last layers",
    "SliceGPT": "SliceGPT",
    "… weighted as published": "SliceGPT, published",
    "PruneNet": "PruneNet",
    "… random": "PruneNet, random",
    "Magnitude": "magnitude",
    "Random": "random",
}
# OptiPFair 0.4, MLP width, 32 calibration windows, by the same protocol on another day; not run by `command`.
OPTIPFAIR = {0.93: 29.35, 0.86: 35.71, 0.79: 43.97, 0.65: 75.92}

ZEROED = {
    "magnitude": "magnitude",
    "Wanda": "Wanda",
    "SparseGPT": "SparseGPT",
    "SparseGPT, one budget by the loss": "SparseGPT, one budget",
}
PATTERNS = ("unstructured", "2:4")
# llm-compressor 0.14, by the same protocol on another day, in the order of PATTERNS; not run by `command`.
LLM_COMPRESSOR: dict[str, list[float | None]] = {
    "llm-compressor 0.14: Wanda": [59.14, 146.4],
    "llm-compressor 0.14: SparseGPT": [43.95, 73.9],
}

INTRODUCTION = """# Quality

`PYCOMPRESS_DATA=folder {command}` measures these rows and records them in `bench/results/{file}`;
`make performance` renders this page from them. Gemma-3-270M, WikiText-2 raw test, the first 8 windows of 512 tokens,
each after a BOS; weights in bf16, cross-entropy in float32. Calibration: 64 such windows of the validation text. The
dense model's perplexity is {dense}.

## Equal bytes

`keep` is kept bytes over original bytes of the targets. RTN has one scale and zero a row and keeps up to 2% more bytes
than its row says; in groups of 64 they are counted: half a bit a weight. NF4 is that of bitsandbytes, by its codebook,
with a float32 scale for each 64 weights.

"""
# Printed by bench/quality_models.py on models whose folders it was given.
CODES = """
Every linear of the decoder at 4.5 bits, of models that nothing was tuned on (`python bench/quality_models.py FOLDER`):

| model | dense | ours, int4 | RTN in groups of 64 | NF4 |
|---|---|---|---|---|
| SmolLM2-135M-Instruct | 30.65 | **33.54** | 43.26 | 38.96 |
| Qwen2.5-Coder-0.5B | 48.27 | **50.66** | 52.92 | 53.24 |
"""
PRUNED = """
## Smaller matrices

Kept parameters of the decoder blocks' linears are at most what the column says, and less where whole layers go: the
table after the plot says how much.

"""
ZEROS = """
## Half of the weights zero

50% zeros in every linear of the decoder blocks; values and places together keep 0.565 of the bytes unstructured, 0.5625
at 2:4. llm-compressor's figures were taken by the same protocol, on 64 windows too, not by this command.

"""
FURTHER = """
Settings of `SubnetSearch` were chosen by these windows. On 8 windows from further on in the text, which nothing was
chosen on (dense {dense}):

"""
PEER = """
At the kept ratios of OptiPFair 0.4 (MLP width, 32 calibration windows; its figures were taken by the same protocol, not
by this command):

"""

OTHERS = """
## Other architectures

A Qwen2 (grouped queries, biases on q, k and v) and an OPT (biases, LayerNorm, ReLU) of four blocks, trained for minutes
on WikiText-2 by `PYCOMPRESS_DATA=folder {command}`, pruned and scored on text that neither training nor calibration
saw. MLP channels alone, then key-value heads too. Dense: {dense}.

"""

Rows = dict[str, dict[str, Any]]


def number(value: float | None, decimals: int = 2) -> str:
    """A perplexity as a reader wants it: a few decimals up to a thousand, no more than its size beyond a million."""
    if value is None:
        return ""
    return f"{value:.{decimals}f}" if value < 1e3 else f"{value:.0f}" if value < 1e6 else f"{value:.1e}"


def table(head: list[str], lines: dict[str, list[float | None]], best_of: str | None, decimals: int = 2) -> str:
    """A Markdown table; the best of each "column", or of each "line", in bold."""
    written = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    columns = list(zip(*lines.values(), strict=True))
    for name, values in lines.items():
        cells = []
        for place, value in enumerate(values):
            rivals = {"column": columns[place], "line": values, None: ()}[best_of]
            best = value is not None and value == min((r for r in rivals if r is not None), default=None)
            text = number(value, decimals)
            cells.append(f"**{text}**" if best else text)
        written.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(written) + "\n"


def packed(rows: Rows) -> str:
    lines = {what: [_of(rows, begin + end) for end in STORED.values()] for what, begin in PACKED.items()}
    kept = {what: values for what, values in lines.items() if any(value is not None for value in values)}
    return table(["what is compressed", *STORED], kept, "line")


def zeroed(rows: Rows) -> str:
    """Models with half of their weights zero, beside llm-compressor's; empty before any is recorded."""
    lines = {name: [_of(rows, f"50% zeros {pattern}: {end}") for pattern in PATTERNS] for name, end in ZEROED.items()}
    kept = {name: values for name, values in lines.items() if any(value is not None for value in values)}
    return table(["score", *PATTERNS], kept | LLM_COMPRESSOR, "column") if kept else ""


def pruned(rows: Rows, what: str = "perplexity", methods: dict[str, str] = METHODS) -> str:
    keeps = pruned_keeps(rows)
    lines = {name: [_of(rows, f"pruned to {keep}: {end}", what) for keep in keeps] for name, end in methods.items()}
    kept = {name: values for name, values in lines.items() if any(value is not None for value in values)}
    return table(["method", *(f"keep {keep}" for keep in keeps)], kept, None if what == "keep_decoder" else "column")


def pruned_keeps(rows: Rows) -> list[float]:
    """The ratios at which pruned models are compared, the largest first."""
    found = {float(label.split()[2][:-1]) for label in rows if label.startswith("pruned to ")}
    return sorted(found - set(OPTIPFAIR), reverse=True)


def against_peer(rows: Rows) -> str:
    ours = [_of(rows, f"pruned to {keep}: ours") for keep in OPTIPFAIR]
    lines: dict[str, list[float | None]] = {"SubnetSearch": ours, "OptiPFair": list(OPTIPFAIR.values())}
    return table(["method", *(f"keep {keep}" for keep in OPTIPFAIR)], lines, "column")


def others(rows: Rows) -> str:
    """The models and ratios of bench/quality_small.py, a column each."""
    columns = list(dict.fromkeys(label.partition(": ")[0] for label in rows if ": " in label))
    methods = dict.fromkeys(label.partition(": ")[2] for label in rows if ": " in label)
    tables = []
    for heads in (False, True):
        names = {method.removeprefix("heads too: "): method for method in methods if ("heads too: " in method) == heads}
        lines = {n: [_of(rows, f"{column}: {method}") for column in columns] for n, method in names.items()}
        tables.append(table(["MLP channels and heads" if heads else "MLP channels", *columns], lines, "column"))
    return "\n".join(tables)


def _of(rows: Rows, label: str, what: str = "perplexity") -> float | None:
    value: float | None = rows.get(label, {}).get(what)
    return value


def small_models() -> dict[str, Any] | None:
    """What bench/quality_small.py recorded."""
    found: dict[str, Any] | None = json.loads(SMALL.read_text(encoding="utf-8")) if SMALL.exists() else None
    return found


def render(content: dict[str, Any], small: dict[str, Any] | None) -> str:
    """The page; `small`: the rows of small models, if there are some."""
    rows = content["rows"]
    dense = rows["dense"]
    begin = INTRODUCTION.format(command=content["command"], file=RESULTS.name, dense=number(dense["perplexity"]))
    parts = [begin, packed(rows), CODES]
    if zeros := zeroed(rows):
        parts += [ZEROS, zeros]
    if pruned_keeps(rows):
        parts += [PRUNED, pruned(rows), f"\n![Perplexity over kept parameters](img/{PLOT.name})\n\n"]
        parts += ["Kept parameters:\n\n", pruned(rows, "keep_decoder")]
        parts += [FURTHER.format(dense=number(dense.get("perplexity_further_on")))]
        parts += [pruned(rows, "perplexity_further_on"), PEER, against_peer(rows)]
    if small is not None:
        dense = {label: row for label, row in small["rows"].items() if label.endswith(", dense")}
        named = ", ".join(f"{label.partition(',')[0]} {number(row['perplexity'])}" for label, row in dense.items())
        parts += [OTHERS.format(command=small["command"], dense=named), others(small["rows"])]
    return "".join(parts)


def draw(rows: Rows) -> Callable[[Figure], None]:
    """Perplexity over true kept parameters, a line a method."""

    def plot(figure: Figure) -> None:
        figure.set_size_inches(8, 5)
        axis = figure.subplots()
        for place, (name, end) in enumerate(METHODS.items()):
            found = [rows[label] for keep in pruned_keeps(rows) if (label := f"pruned to {keep}: {end}") in rows]
            style = "-o" if end.startswith("ours") or "paper" in end else "--s"
            points = [(row["keep_decoder"], row["perplexity"]) for row in found]
            if points:
                axis.plot(*zip(*points, strict=True), style, color=f"C{place % 10}", label=name, markersize=4)
        peer = [(keep, value) for keep, value in OPTIPFAIR.items() if f"pruned to {keep}: ours" in rows]
        if peer:
            axis.plot(*zip(*peer, strict=True), ":^", color="0.4", label="OptiPFair 0.4", markersize=5)
        axis.axhline(rows["dense"]["perplexity"], color="0.7", linewidth=1)
        axis.set(xlabel="kept parameters of the decoder blocks", ylabel="perplexity", yscale="log", ylim=(20, 2e3))
        axis.legend(fontsize="small", frameon=False)

    return plot


def put(text: str, mark: str, block: str) -> str:
    """`text` with what stands between the comments of `mark` replaced."""
    found = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
    if not found.search(text):
        raise ValueError(f"there is no <!-- {mark} --> … <!-- /{mark} --> to write to")
    return found.sub(lambda match: match[1] + block + match[2], text)


def update_readme(mark: str, block: str) -> None:
    """Write a block of README anew."""
    README.write_text(put(README.read_text(encoding="utf-8"), mark, block), encoding="utf-8")


def main() -> None:
    """Write the page, the plot, and README's blocks `quality` and `pruned`."""
    import matplotlib
    from matplotlib.figure import Figure

    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = content["rows"]
    PAGE.write_text(render(content, small_models()), encoding="utf-8")
    update_readme("quality", packed(rows))
    if pruned_keeps(rows):
        update_readme("pruned", pruned(rows))
        figure = Figure(layout="constrained")
        with matplotlib.rc_context({"svg.hashsalt": "pycompress", "svg.fonttype": "none"}):
            draw(rows)(figure)
            figure.savefig(PLOT, metadata={"Date": None, "Creator": None})
    print(PAGE)
