"""Zero-shot accuracy through lm-evaluation-harness, its questions from local files or from its own tasks."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from json import loads
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pycompress._brief import brief
from pycompress._files import folder_of
from pycompress.lm.identity import hash_of
from pycompress.lm.model import evaluation
from pycompress.lm.state import neutral

# What ends a query of a local file, as the harness's own task of that data has it.
QUERIES = {"piqa": "\nAnswer:", "arc_easy": "\nAnswer:", "openbook_qa": ""}
LOCAL = (*QUERIES, "winogrande")
FEWSHOT_SEED = 1234


@dataclass(frozen=True)
class Accuracy:
    """What the harness found on one task.

    `accuracy`: in [0, 1], the mean of its `metric` ("acc" where the task has it, else its first), and `stderr`, the
    standard error of that mean (NaN for one question). `normalised`, `normalised_stderr`: "acc_norm", where each
    choice's log-likelihood is divided by its length in characters; None where the task has none. `count`: questions.
    `harness`: the version of lm-evaluation-harness.
    """

    accuracy: float
    stderr: float
    metric: str
    count: int
    harness: str
    normalised: float | None = None
    normalised_stderr: float | None = None

    def __str__(self) -> str:
        text = f"{self.metric} {self.accuracy:.4f} ± {self.stderr:.4f}"
        if self.normalised is not None:
            text += f", acc_norm {self.normalised:.4f} ± {self.normalised_stderr:.4f}"
        return f"{text}, {self.count} questions"


def evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    names: str | Sequence[str],
    data_dir: str | Path | None = None,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Accuracy]:
    """Zero-shot accuracy of a model on each of `names`, by lm-evaluation-harness.

    `piqa`, `arc_easy`, `openbook_qa` and `winogrande` are read from `<name>.jsonl` in `data_dir` (by default the folder
    `PYCOMPRESS_DATA`): a line is `{"query", "choices", "gold"}`, or for winogrande `{"context_options",
    "continuation", "gold"}`. Prompts are those of the harness's tasks piqa, arc_easy, openbookqa and winogrande: a
    blank, and after piqa's and arc_easy's queries "Answer:", stand before a choice. Any other name is a task of the
    harness, which downloads its data.

    `limit`: only the first questions of each task. `batch_size`: sequences at a time, fewer where their logits would
    be large. `checkpoint`: a folder that keeps every score, so that a killed run goes on from there. The model runs in
    its own dtype, on its device; on a CPU without bfloat16 instructions float32 is faster.

    Raises `ValueError` for a task or file that cannot be used and `ImportError` without lm-evaluation-harness.
    """
    names = (names,) if isinstance(names, str) else tuple(names)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"names must be one or more different tasks, got {brief(list(names))}")
    for setting, value in (("limit", limit), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{setting} must be an integer of at least 1, got {brief(value)}")
    with _quiet():
        harness, evaluator, version = _harness()
        loaded = _load(harness, names, data_dir)
        for task in loaded["tasks"].values():
            task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=FEWSHOT_SEED)
        if tokenizer.pad_token_id is None:
            # The harness gives it one.
            tokenizer = copy.deepcopy(tokenizer)
        with neutral(), evaluation(model):
            plain = harness.ContinuationLM(model, tokenizer, batch_size, progress)
            with _remembering(plain, checkpoint) as lm:
                found = evaluator.evaluate(lm=lm, task_dict=loaded, limit=limit, log_samples=False)
    return {name: _accuracy(metrics, version) for name, metrics in found["results"].items() if _metrics(metrics)}


def read_questions(name: str, data_dir: str | Path | None) -> list[dict[str, Any]]:
    """The questions of one of `LOCAL`, their queries ended as the harness does. Raises `ValueError` for a bad file."""
    folder = data_dir or os.environ.get("PYCOMPRESS_DATA")
    if not folder:
        raise ValueError(f"{name} is read from {name}.jsonl; give its folder as data_dir, or set PYCOMPRESS_DATA")
    file = Path(folder) / f"{name}.jsonl"
    try:
        # Not splitlines: a question may hold other separators of lines.
        lines = [line for line in file.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"cannot read the questions {file}: {getattr(error, 'strerror', 'it is not UTF-8')}"
        ) from error
    if not lines:
        raise ValueError(f"{file} holds no questions; it needs a line of JSON for each")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(_question(name, loads(line)))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            form = "context_options, continuation" if name == "winogrande" else "query, choices"
            raise ValueError(
                f"line {number} of {file} is no question: it needs {form} and the index gold of the right one"
            ) from error
    return rows


def _question(name: str, row: dict[str, Any]) -> dict[str, Any]:
    given, gold = row["context_options" if name == "winogrande" else "choices"], row["gold"]
    if not isinstance(given, list) or not isinstance(gold, int) or isinstance(gold, bool):
        raise TypeError(given)
    options = [str(option) for option in given]
    if not 0 <= gold < len(options):
        raise IndexError(gold)
    if name == "winogrande":
        return {"context_options": options, "continuation": str(row["continuation"]), "gold": gold}
    return {"query": row["query"].rstrip("\n") + QUERIES[name], "choices": options, "gold": gold}


def _harness() -> tuple[Any, Any, str]:
    """The module of this package that needs the harness, the harness's evaluator and its version."""
    try:
        version: str = import_module("lm_eval").__version__
        modules = [import_module(name) for name in ("pycompress.measure.harness", "lm_eval.evaluator")]
    except ImportError as error:
        raise ImportError(
            "zero-shot tasks run through lm-evaluation-harness, which is not installed; "
            "run: pip install 'pycompress[tasks]'"
        ) from error
    return modules[0], modules[1], version


def _load(harness: Any, names: tuple[str, ...], data_dir: str | Path | None) -> dict[str, dict[str, Any]]:
    """Tasks and groups by name, in the order of `names`."""
    loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
    manager = None
    for name in names:
        if name in LOCAL:
            loaded["tasks"][name] = harness.LocalTask(name, read_questions(name, data_dir))
            continue
        manager = manager or import_module("lm_eval.tasks").TaskManager()
        if name not in manager.all_tasks:
            raise ValueError(
                f"no task is called {brief(name)}; allowed are {', '.join(LOCAL)} from local files, and what "
                "`lm-eval ls tasks` lists"
            )
        try:
            found = manager.load([name])
        except OSError as error:
            raise ValueError(f"{name} is a task of the harness, whose data cannot be downloaded: {error}") from error
        for kind, entries in loaded.items():
            entries |= found[kind]
    return loaded


@contextmanager
def _remembering(lm: Any, checkpoint: str | Path | None) -> Iterator[Any]:
    """`lm`, every answer of which is kept in an SQLite file of its model's own."""
    if checkpoint is None:
        yield lm
        return
    file = folder_of(checkpoint, "checkpoint") / f"{hash_of(lm.model)[:16]}.db"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write the checkpoint directory {checkpoint}: {error.strerror}") from error
    remembering = import_module("lm_eval.api.model").CachingLM(lm, str(file))
    try:
        yield remembering
    finally:
        remembering.dbdict.close()


def _metrics(metrics: dict[str, Any]) -> list[str]:
    """The keys of what was measured, such as "acc,none", the harness's filter after the comma."""
    return [key for key in metrics if "," in key and "_stderr" not in key]


def _accuracy(metrics: dict[str, Any], version: str) -> Accuracy:
    keys = {key.split(",")[0]: key for key in reversed(_metrics(metrics))}
    metric = "acc" if "acc" in keys else list(keys)[-1]

    def found(name: str) -> tuple[float, float]:
        _, _, kind = keys[name].partition(",")
        error = metrics.get(f"{name}_stderr,{kind}")
        return float(metrics[keys[name]]), float(error) if isinstance(error, int | float) else math.nan

    normalised = found("acc_norm") if "acc_norm" in keys else (None, None)
    return Accuracy(*found(metric), metric, metrics["sample_len"], version, *normalised)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the harness's advice on how models should be passed to it."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
