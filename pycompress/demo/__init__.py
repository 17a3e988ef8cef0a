"""`pycompress demo`: a real model made smaller and faster, reloaded in a new process, measured, in one table."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pycompress._files import finite
from pycompress.demo.evaluate import EvaluationRequest, opening
from pycompress.demo.gemma import gemma_folder
from pycompress.demo.show import TableRow, continuations, plot, table
from pycompress.demo.text import texts
from pycompress.demo.variants import (
    Case,
    DemoSettings,
    Variant,
    checkpoint_folder,
    identity,
    make,
    published,
    rtn,
    swsc,
)
from pycompress.measure import token_windows

__all__ = ["Case", "Settings", "run"]

EVALUATE = "from pycompress.demo.evaluate import main; main()"
NOTE = (
    "Bytes count weights as packed. RTN is stored and run as ordinary values, so its packed bytes show neither on disk "
    "nor in its speed."
)


def run(
    out: Path, settings: DemoSettings | None = None, model: Path | None = None, say: Callable[[str], None] | None = None
) -> list[TableRow]:
    """Compress, save, reload in a new process, measure; writes models, table, plot and figures into `out`.

    `model`: a folder with a causal LM and its tokenizer instead of Gemma-3-270M. What an earlier run finished with
    the same inputs is reused. Raises `ImportError` for a missing package and `RuntimeError` when measuring fails.
    """
    settings = settings or DemoSettings()
    say = say or _clock()
    out.mkdir(parents=True, exist_ok=True)
    model = model or gemma_folder(say)
    calibration_text, held_out_text = texts()
    (out / "held_out.txt").write_text(held_out_text, encoding="utf-8")
    made = _make_all(model, calibration_text, settings, out, say)
    say("reloading every model in a new process and measuring it")
    dense = Variant("dense", "dense", None, model)
    measured = _measure([dense, *(variant for variant, _ in made)], settings, out)
    rows = _rows(dense, made, measured)
    _publish(rows, held_out_text, out, say)
    return rows


def _make_all(
    model: Path, calibration_text: str, settings: DemoSettings, out: Path, say: Callable[[str], None]
) -> list[tuple[Variant, dict[str, Any]]]:
    # An empty network of the model's class answers for its vocabulary and positions; no weight is read for that.
    tokenizer = AutoTokenizer.from_pretrained(model)
    calibration = token_windows(
        _skeleton(model), tokenizer, calibration_text, settings.window, settings.calibration_windows
    )
    known = identity(model, calibration_text, settings)
    made: list[tuple[Variant, dict[str, Any]]] = []

    def add(variant: Variant) -> dict[str, Any]:
        say(f"making {variant.label}")
        facts = make(variant, model, calibration, known)
        if all(variant.folder != other.folder for other, _ in made):
            made.append((variant, facts))
        return facts

    for case in settings.cases:
        add(rtn(add(swsc(case, out)), out))
    add(published(settings.cases[-1], out))
    shutil.rmtree(checkpoint_folder(out, known), ignore_errors=True)
    return made


def _skeleton(model: Path) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))


def _measure(variants: list[Variant], settings: DemoSettings, out: Path) -> dict[str, dict[str, Any]]:
    answer, request = out / "measured.json", out / "request.json"
    answer.unlink(missing_ok=True)
    EvaluationRequest(
        folders={variant.label: str(variant.folder) for variant in variants},
        text=str(out / "held_out.txt"),
        answer=str(answer),
        window=settings.window,
        windows=settings.held_out_windows,
        prompt=settings.prompt,
        new_tokens=settings.new_tokens,
        repeats=settings.repeats,
        continuation=settings.continuation,
    ).save(request)
    # The new process must find this same pycompress, also where it runs from a source tree that is not installed.
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", EVALUATE, str(request)], env=environment, check=False)
    if done.returncode != 0 or not answer.exists():
        raise RuntimeError(f"measuring the saved models failed with exit code {done.returncode}; its error is above")
    measured: dict[str, dict[str, Any]] = json.loads(answer.read_text())
    return measured


def _rows(
    dense: Variant, made: list[tuple[Variant, dict[str, Any]]], measured: dict[str, dict[str, Any]]
) -> list[TableRow]:
    decoder = made[0][1]["decoder"]["before"]
    sizes = [(dense, None, decoder)]
    sizes += [(variant, facts["targets"], facts["decoder"]["after"]) for variant, facts in made]
    return [
        TableRow(
            label=variant.label,
            method=variant.method,
            targets_bytes=None if targets is None else targets["after"],
            targets_dense_bytes=None if targets is None else targets["before"],
            decoder_bytes=decoder,
            disk_bytes=measured[variant.label]["disk_bytes"],
            perplexity=measured[variant.label]["perplexity"],
            prefill_tokens_per_s=measured[variant.label]["speed"]["prefill_tokens_per_s"],
            decode_tokens_per_s=measured[variant.label]["speed"]["decode_tokens_per_s"],
            continuation=measured[variant.label]["continuation"],
        )
        for variant, targets, decoder in sizes
    ]


def _publish(rows: list[TableRow], text: str, out: Path, say: Callable[[str], None]) -> None:
    page = "\n\n".join([table(rows), NOTE, continuations(rows, opening(text))])
    (out / "table.txt").write_text(page + "\n", encoding="utf-8")
    (out / "rows.json").write_text(json.dumps(finite([asdict(row) for row in rows]), indent=1, allow_nan=False))
    print(f"\n{page}\n")
    try:
        plot(rows, out / "demo.png")
        say(f"table, figures, plot and models are in {out}")
    except ImportError as error:
        say(f"table, figures and models are in {out}; no plot: {error}")


def _clock() -> Callable[[str], None]:
    start = time.perf_counter()
    return lambda line: print(f"[{time.perf_counter() - start:4.0f} s] {line}", flush=True)
