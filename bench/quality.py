"""Perplexity of Gemma-3-270M at equal bytes, method by method: `python bench/quality.py` prints and records the table.

Text: WikiText-2 raw test, its first 8 windows of 512 tokens with BOS before each; calibration: 64 such windows of the
validation text; both read from the folder PYCOMPRESS_DATA. Weights are bf16, perplexity is computed in float32. Rows
of SubnetSearch, whose settings were chosen on these windows, and of FLAP are scored on 8 windows from further on too.
Rows that are recorded for the same sources are not run again; the others stay on file, with the hash of the sources
they were measured with, until they are. Arguments select rows: a label, or how labels begin.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from nf4 import NF4
from transformers import AutoModelForCausalLM, AutoTokenizer

import pycompress
from pycompress import (
    FLAP,
    RTN,
    SWSC,
    LayerDrop,
    LowRank,
    Magnitude,
    Prune,
    PruneNet,
    Random,
    SearchSettings,
    SliceGPT,
    SubnetSearch,
    Taylor,
    Wanda,
)
from pycompress.demo.gemma import gemma_folder
from pycompress.measure import perplexity, token_windows
from pycompress.methods.structural import ShrinkConfig
from pycompress.recipe import Config

RESULTS = Path(__file__).parent / "results" / "quality-gemma-3-270m.json"
MEASURED = Path(__file__).parents[1] / "build" / "quality"
QK = ("q", "k")


def published(keep: float, targets: tuple[str, ...] | None = None) -> SWSC:
    return SWSC(keep, share="output", weighting="none", allocation="uniform", pivot=False, targets=targets)


STORED = {"": None, ", int8": "int8", ", int4": "int4"}
ROWS: tuple[tuple[str, Config | None], ...] = (
    ("dense", None),
    *((f"Q, K at 2 bits: ours{name}", SWSC(2 / 16, targets=QK, storage=kind)) for name, kind in STORED.items()),
    ("Q, K at 2 bits: weights only", SWSC(2 / 16, weighting="none", allocation="error", targets=QK)),
    ("Q, K at 2 bits: published SWSC", published(2 / 16, QK)),
    ("Q, K at 2 bits: RTN", RTN(2, targets=QK)),
    *((f"Q, K at 3 bits: ours{name}", SWSC(3 / 16, targets=QK, storage=kind)) for name, kind in STORED.items()),
    ("Q, K at 3 bits: weights only", SWSC(3 / 16, weighting="none", allocation="error", targets=QK)),
    ("Q, K at 3 bits: published SWSC", published(3 / 16, QK)),
    ("Q, K at 3 bits: RTN", RTN(3, targets=QK)),
    *((f"all, keep 0.8: ours{name}", SWSC(0.8, storage=kind)) for name, kind in STORED.items()),
    ("all, keep 0.8: weights only", SWSC(0.8, weighting="none", allocation="error")),
    *((f"all, keep 0.65: ours{name}", SWSC(0.65, storage=kind)) for name, kind in STORED.items()),
    ("all, keep 0.65: weights only", SWSC(0.65, weighting="none", allocation="error")),
    *((f"all at 4.5 bits: ours, {kind}", SWSC(4.5 / 16, storage=kind)) for kind in ("int8", "int4")),
    ("all at 4.5 bits: RTN in groups", RTN(4, group_size=64)),
    ("all at 4.5 bits: NF4", NF4()),
    ("all at 4 bits: RTN", RTN(4)),
    ("all at 3.5 bits: ours, int4", SWSC(3.5 / 16, storage="int4")),
    ("all at 3.5 bits: RTN in groups", RTN(3, group_size=64)),
    *((f"all at 3 bits: ours, {kind}", SWSC(3 / 16, storage=kind)) for kind in ("int8", "int4")),
    ("all at 3 bits: RTN", RTN(3)),
    ("all, keep 0.93: ours", SWSC(0.93)),
    ("all, keep 0.86: ours", SWSC(0.86)),
    ("all, keep 0.79: ours", SWSC(0.79)),
    ("all, keep 0.8: ours without the loss", SWSC(0.8, weighting="inputs", allocation="error")),
    ("all, keep 0.8: ours without the loss and pivots", SWSC(0.8, weighting="inputs", allocation="error", pivot=False)),
    ("all, keep 0.8: ours, uniform", SWSC(0.8, allocation="uniform")),
    ("all, keep 0.8: low rank", LowRank(0.8)),
    ("Q, K at 2 bits: ours without the loss", SWSC(2 / 16, weighting="inputs", allocation="error", targets=QK)),
    ("Q, K at 2 bits: low rank", LowRank(2 / 16, targets=QK)),
)


# Where all blocks keep the same share, steps of 8 channels let it come close to what is asked.
PRUNED = (0.9, 0.8, 0.7, 0.6, 0.5)
PEERS = (0.93, 0.86, 0.79, 0.65)  # kept ratios of OptiPFair's figures
SEARCH = SearchSettings(population=15, mutations=8, crossovers=4, parents=4)
BASELINES: dict[str, type[Any]] = {
    "FLAP": FLAP,
    "Wanda": Wanda,
    "Taylor": Taylor,
    "magnitude": Magnitude,
    "random": Random,
}
ROWS += (
    *((f"pruned to {keep}: ours", SubnetSearch(keep)) for keep in PRUNED + PEERS),
    *((f"pruned to {keep}: ours, searched", SubnetSearch(keep, candidates=60, search=SEARCH)) for keep in PRUNED),
    *(
        (f"pruned to {keep}: ours, every linear refitted", SubnetSearch(keep, sequential=True, refit="block"))
        for keep in PRUNED
    ),
    *((f"pruned to {keep}: ours, heads too", SubnetSearch(keep, parts=("mlp", "attention"))) for keep in PRUNED),
    *((f"pruned to {keep}: ours, not refitted", SubnetSearch(keep, reform="none")) for keep in PRUNED),
    *((f"pruned to {keep}: ours, uniform", SubnetSearch(keep, allocation="uniform", round_to=8)) for keep in PRUNED),
    *(
        (
            f"pruned to {keep}: the paper's scores",
            SubnetSearch(keep, importance="phi", allocation="uniform", round_to=8),
        )
        for keep in PRUNED
    ),
    *((f"pruned to {keep}: FLAP, uniform", FLAP(keep, round_to=8, structure="uniform")) for keep in PRUNED),
    *((f"pruned to {keep}: {name}", method(keep, round_to=8)) for name, method in BASELINES.items() for keep in PRUNED),
    *((f"pruned to {keep}: layers by influence", LayerDrop(keep)) for keep in PRUNED),
    *((f"pruned to {keep}: last layers", LayerDrop(keep, order="last")) for keep in PRUNED),
    *((f"pruned to {keep}: SliceGPT", SliceGPT(keep)) for keep in PRUNED),
    *((f"pruned to {keep}: SliceGPT, published", SliceGPT(keep, weighting="none")) for keep in PRUNED),
    *((f"pruned to {keep}: PruneNet, random", PruneNet(keep, policy="random", round_to=8)) for keep in PRUNED),
    *((f"pruned to {keep}: PruneNet", PruneNet(keep, round_to=8)) for keep in PRUNED),
)

ZEROED = {"magnitude": "magnitude", "Wanda": "wanda", "SparseGPT": "sparsegpt"}
ROWS += (
    *((f"50% zeros unstructured: {name}", Prune(score, sparsity=0.5)) for name, score in ZEROED.items()),
    ("50% zeros unstructured: SparseGPT, one budget", Prune("sparsegpt", sparsity=0.5, scope="global")),
    *((f"50% zeros 2:4: {name}", Prune(score, "2:4")) for name, score in ZEROED.items()),
)


ALWAYS = ("api", "packing/packing", "calibration/batches", "calibration/gradients", "calibration/stream")
PACKING = ("formats/codes", "formats/packed", "methods/allocate", "ops/panel")
PACKING += tuple(f"methods/{name}" for name in ("registry", "_gptq", "_channels", "_forms", "_pricing"))
ZEROING = (*PACKING, "methods/_sparsegpt")
SLICING = ("structural/slicing", "surgery/rotate", "hub/skeleton")
SEARCHING = ("search/space", "search/evolution", "structural/encoding", "structural/evaluator", "structural/evolve")
PRUNING = tuple(f"structural/{name}" for name in ("pruning", "ranking", "widths", "least_squares", "refit"))
PRUNING += ("surgery/shrink", "methods/structural", "methods/_elimination")


def sources(config: Config | None, search: bool = True) -> str:
    """A hash of the files that decide a row to more than rounding, or what is measured before a search."""
    root = Path(pycompress.__file__).parent
    # The first kind that a config is of.
    kinds = ((SliceGPT, SLICING), (ShrinkConfig, PRUNING), (Prune, ZEROING), (Config, PACKING))
    shared = next((names for kind, names in kinds if isinstance(config, kind)), ())
    if search and isinstance(config, SubnetSearch) and config.candidates != 0:
        shared += SEARCHING
    files = [root / f"{name}.py" for name in sorted(ALWAYS + shared)]
    if config is not None:
        files.append(Path(inspect.getfile(type(config))))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def measure(config: Config | None, model_folder: Path, texts: tuple[str, str, str], state: str) -> dict[str, Any]:
    """One row: compress a fresh model, and score it. What is measured of the dense model is kept by its sources."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto").eval()
    start = time.perf_counter()
    facts: dict[str, Any] = {"recipe": None, "keep_targets": 1.0, "keep_decoder": 1.0}
    if config is not None:
        ids = token_windows(model, tokenizer, texts[0], count=10**9)[:64]
        calibration = ids if config.needs_calibration else None
        # Rows that differ in keep alone share what is measured of the dense model.
        kept = MEASURED / sources(config, search=False) / ("weights" if calibration is None else "calibrated")
        report = pycompress.apply(model, config, calibration, checkpoint=kept, progress=False)
        keeps = {"keep_targets": report.targets.keep, "keep_decoder": report.decoder.keep}
        facts = {"recipe": config.to_dict(), **keeps}
        if not isinstance(config, ShrinkConfig):
            facts["modules"] = [(row.name, row.format) for row in report.rows]
    seconds = time.perf_counter() - start
    facts["perplexity"] = perplexity(model.float(), tokenizer, texts[1], window=512, max_windows=8)
    if config is None or isinstance(config, (SubnetSearch, FLAP)):
        facts["perplexity_further_on"] = perplexity(model, tokenizer, texts[2], window=512, max_windows=8)
    measured_with = {"sources": state, "torch": str(torch.__version__), "threads": torch.get_num_threads()}
    return facts | {"seconds": seconds} | measured_with


def recorded() -> dict[str, Any]:
    """The rows on file, each with the sources it was measured with."""
    rows: dict[str, Any] = json.loads(RESULTS.read_text())["rows"] if RESULTS.exists() else {}
    return rows


def record(label: str, row: dict[str, Any]) -> dict[str, Any]:
    rows = recorded() | {label: row}
    content = {"command": "python bench/quality.py", "rows": {name: rows[name] for name, _ in ROWS if name in rows}}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(content, indent=1) + "\n")
    return row


def main(only: list[str]) -> int:
    data = os.environ.get("PYCOMPRESS_DATA")
    if not data:
        print("bench/quality.py reads its texts from the folder PYCOMPRESS_DATA; set it", file=sys.stderr)
        return 1
    calibration = (Path(data) / "wikitext2-valid.txt").read_text()[:400_000].replace(" <unk>", " unk")
    test = (Path(data) / "wikitext2-raw-test.txt").read_text()
    texts = calibration, test[:200_000], test[200_000:400_000]
    folder = gemma_folder(lambda line: print(line, flush=True))
    labels = dict(ROWS)
    for label, config in ROWS:
        if only and not any(label == part if part in labels else label.startswith(part) for part in only):
            continue
        row, state = recorded().get(label), sources(config)
        if row is None or row["sources"] != state:
            row = record(label, measure(config, folder, texts, state))
        print(
            f"{label:<52} keep {row['keep_targets']:.4f} of the targets, {row['keep_decoder']:.4f} of the decoder: "
            f"perplexity {row['perplexity']:.2f} ({row['seconds']:.0f} s)",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
