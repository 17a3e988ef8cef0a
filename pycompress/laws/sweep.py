"""The experiments behind a law: every run of a grid once, a row each, going on where a killed sweep was."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import platform
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from pycompress import recipe as recipes
from pycompress import runs as rows
from pycompress._executor import open_executor
from pycompress._files import alone, folder_of, locked, read_json, read_text, sweep_parts, write_json
from pycompress.api import apply
from pycompress.checkpoint import forget_recipes
from pycompress.laws.grid import Grid, RunSpec, digest
from pycompress.lm.identity import hash_of
from pycompress.measure import compare_speed, perplexity, token_windows
from pycompress.measure.tasks import evaluate
from pycompress.recovery.recover import recover
from pycompress.report import Report
from pycompress.runs import Run

# Of the files of dense models' scores.
VERSION = 2


def sweep(
    grid: Grid,
    folder: str | Path,
    *,
    retry_failed: bool = False,
    executor: str = "local",
    workers: int = 1,
    device: str | None = None,
    progress: bool = True,
) -> list[Run]:
    """Measure every run of the grid that `folder` has no row of, and give all of its rows in the grid's order.

    Rows are in `folder`/runs.jsonl, each written once it is complete; killed at any moment, the same call goes on. A
    run that fails is a row with its error, done again only with `retry_failed`. `executor`, `workers`: as in
    `open_executor`; several workers on one machine slow each other, the dense model in the same run too. `device`: by
    default a GPU if there is one. Raises `ValueError` when the folder is in use or of another model, and what loading
    and scoring a dense model raise.
    """
    folder = folder_of(folder, "folder")
    specs = grid.specs()
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder, "sweep"):
        sweep_parts(folder)
        done = {run.key: run for run in rows.load(folder)} if (folder / rows.FILE).exists() else {}
        todo = [spec for spec in specs if spec.key not in done or (retry_failed and done[spec.key].error is not None)]
        build = partial(Worker, grid, folder.absolute(), device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if todo:
            bar = _SweepBar(specs, done, len(todo), progress)
            with bar.tqdm, open_executor(executor, build, workers) as where:
                for run in where.map(bar.started(todo)):
                    rows.append(folder, run)
                    done[run.key] = run
                    bar.finished(run)
    return [done[spec.key] for spec in specs]


@dataclasses.dataclass
class _Dense:
    """A dense model in memory, and what it scores."""

    name: str
    model: PreTrainedModel
    tokenizer: Any
    loss: float
    tasks: dict[str, dict[str, Any]]


@dataclasses.dataclass
class _Compressed:
    """A compressed model before recovery, for all the runs that share it."""

    compression: str
    model: PreTrainedModel
    report: Report
    seconds: float


class Worker:
    """Measures one run after the other; holds a dense model and the last compressed one."""

    def __init__(self, grid: Grid, folder: Path, device: str) -> None:
        self.grid, self.folder, self.device = grid, folder, device
        self.dense: _Dense | None = None
        self.compressed: _Compressed | None = None
        self.slots: dict[str, tuple[Path, io.FileIO]] = {}

    def __call__(self, spec: RunSpec) -> Run:
        """The row of a run; an error in it is part of the row."""
        dense = self._load_dense(spec.model)
        row = Run(
            **{f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)},
            dense_loss=dense.loss,
            dense_tasks=dense.tasks,
            versions=self._versions(dense),
        )
        try:
            return dataclasses.replace(row, **self._measure(spec, dense))
        except Exception as error:
            return dataclasses.replace(row, error=f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _measure(self, spec: RunSpec, dense: _Dense) -> dict[str, Any]:
        made = self._compress(spec, dense)
        model = copy.deepcopy(made.model)
        start = time.perf_counter()
        recovery = spec.recovery
        if spec.recovery_tokens:
            recovery = recovery | {"tokens": self._recover(model, dense, spec)}
        recovered = time.perf_counter()
        found: dict[str, Any] = {
            "keep": made.report.decoder.keep,
            "bytes": made.report.file.after,
            "dense_bytes": made.report.file.before,
            "recovery": recovery,
        }
        found |= self._speeds(model, dense)
        loss, tasks = self._score(model, dense.tokenizer)
        seconds = {
            "compress": made.seconds,
            "recover": recovered - start,
            "evaluate": time.perf_counter() - recovered,
        }
        return found | {"loss": loss, "tasks": tasks, "seconds": seconds}

    def _load_dense(self, name: str) -> _Dense:
        """The dense model, scored once for all the sweeps in the folder."""
        if self.dense is None or self.dense.name != name:
            self.dense = self.compressed = None
            path = self.grid.models[name]
            model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=self.grid.dtype, local_files_only=True)
            model = model.eval().to(self.device)
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            self.dense = _Dense(name, model, tokenizer, *self._dense_scores(name, model, tokenizer))
        return self.dense

    def _dense_scores(self, name: str, model: PreTrainedModel, tokenizer: Any) -> tuple[float, dict[str, Any]]:
        what = [VERSION, self.grid.dtype, self.grid.test.identity(), self.grid.tasks.names, self.grid.tasks.limit]
        file = self.folder / f"dense-{digest(json.dumps([name, *what]))}.json"
        known = hash_of(model)
        if not file.exists():
            loss, tasks = self._score(copy.deepcopy(model), tokenizer)
            write_json(file, {"model": name, "hash": known, "loss": loss, "tasks": tasks})
        facts = read_json(file, "delete it and the dense model is scored again")
        if facts["hash"] != known:
            raise ValueError(
                f"the runs in {self.folder} are of another model called {name} than the one in "
                f"{self.grid.models[name]}; give another name or another folder"
            )
        return facts["loss"], facts["tasks"]

    def _compress(self, spec: RunSpec, dense: _Dense) -> _Compressed:
        if self.compressed is None or self.compressed.compression != spec.compression:
            recipe = [recipes.from_dict(entry) for entry in spec.recipe]
            calibration = self.grid.calibration if any(config.needs_calibration for config in recipe) else None
            windows = None
            if calibration is not None:
                text = read_text(calibration.text)
                windows = token_windows(dense.model, dense.tokenizer, text, calibration.window, calibration.windows)
            checkpoint = self._slot(self._named(spec.model, calibration and calibration.identity()))
            if self.compressed is not None:
                forget_recipes(checkpoint)
            self.compressed = None
            model = copy.deepcopy(dense.model)
            start = time.perf_counter()
            report = apply(model, recipe, windows, checkpoint=checkpoint, progress=False)
            self.compressed = _Compressed(spec.compression, model, report, time.perf_counter() - start)
        return self.compressed

    def _recover(self, model: PreTrainedModel, dense: _Dense, spec: RunSpec) -> int:
        """Fine-tune in place, going on from a killed run's own checkpoints; gives the tokens seen."""
        assert self.grid.recovery.text is not None
        place = self.folder / "recovery" / self._named(spec.key)
        settings = {name: spec.recovery[name] for name in ("method", "lr", "window", "batch_size")}
        recovered = recover(
            model,
            read_text(self.grid.recovery.text),
            tokens=spec.recovery_tokens,
            tokenizer=dense.tokenizer,
            seed=spec.seed,
            output_dir=place,
            progress=False,
            **settings,
        )
        shutil.rmtree(place, ignore_errors=True)
        return int(recovered.tokens)

    def _speeds(self, model: Any, dense: _Dense) -> dict[str, float]:
        """Tokens a second of both models, taken in turns."""
        if self.grid.speed is None:
            return {}
        settings = dataclasses.asdict(self.grid.speed)
        speeds = compare_speed({"": model.to(self.device), "dense_": dense.model}, **settings)
        phases = ("prefill_tokens_per_s", "decode_tokens_per_s")
        return {f"{which}{phase}": getattr(speed, phase) for which, speed in speeds.items() for phase in phases}

    def _score(self, model: PreTrainedModel, tokenizer: Any) -> tuple[float, dict[str, dict[str, Any]]]:
        """The loss on the test text in nats a token, and the tasks' accuracies; converts the model."""
        test, tasks = self.grid.test, self.grid.tasks
        if test.dtype != "auto":
            model = model.to(getattr(torch, test.dtype))
        value = perplexity(model, tokenizer, read_text(test.text), test.window, max_windows=test.windows)
        if not math.isfinite(value):
            raise ValueError(f"the loss on the test text is not finite: its perplexity is {value}")
        if not tasks.names:
            return math.log(value), {}
        found = evaluate(model, tokenizer, tasks.names, data_dir=tasks.data, limit=tasks.limit, progress=False)
        return math.log(value), {name: _accuracy(task) for name, task in found.items()}

    def _named(self, name: str, *what: Any) -> str:
        """A file name for a name in any letters, other ones for other names, facts or versions."""
        readable = re.sub(r"[^\w.-]|^\.+", "_", name, flags=re.ASCII)[:48]
        return f"{readable}-{digest(json.dumps([name, *what, _versions()]))}"

    def _slot(self, stem: str) -> Path:
        """A checkpoint directory that no other worker writes to."""
        if stem not in self.slots:
            self.slots[stem] = next(self._free(stem))
        return self.slots[stem][0]

    def _free(self, stem: str) -> Iterator[tuple[Path, io.FileIO]]:
        for number in count():
            folder = self.folder / "checkpoints" / f"{stem}-{number}"
            folder.mkdir(parents=True, exist_ok=True)
            lock = locked(folder, "slot")
            if lock is not None:
                yield folder, lock

    def _versions(self, dense: _Dense) -> dict[str, str]:
        """Of what ran, on what, in which arithmetic."""
        device = torch.cuda.get_device_name(self.device) if self.device.startswith("cuda") else self.device
        return _versions() | {
            "python": platform.python_version(),
            "device": device,
            "threads": str(torch.get_num_threads()),
            "dtype": str(dense.model.dtype).removeprefix("torch."),
        }


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("pycompress", "torch", "transformers")}


def _accuracy(task: Any) -> dict[str, Any]:
    """A task's figures as JSON has them: the error of one question is not known."""
    return {
        "accuracy": task.accuracy,
        "stderr": task.stderr if math.isfinite(task.stderr) else None,
        "count": task.count,
    }


class _SweepBar:
    """What runs, the loss last seen, about how long the rest takes."""

    def __init__(self, specs: list[RunSpec], done: dict[str, Run], left: int, progress: bool) -> None:
        self.specs, self.done = specs, done
        form = "{n_fmt}/{total_fmt} |{bar}| {elapsed}{postfix} {desc}"
        start = len(specs) - left
        self.tqdm: Any = tqdm(total=len(specs), initial=start, disable=not progress, bar_format=form)

    def started(self, todo: Iterable[RunSpec]) -> Iterator[RunSpec]:
        for spec in todo:
            self.tqdm.set_description_str(name_of(spec))
            yield spec

    def finished(self, run: Run) -> None:
        told = f"loss {run.loss:.3f}" if run.loss is not None else "the last run failed"
        self.tqdm.set_postfix_str(f"{told}, {_duration(time_left(self.specs, self.done))} left;")
        self.tqdm.update()


def name_of(run: RunSpec | Run) -> str:
    """`SWSC, keep 0.5, 50,000 tokens`: a run in words."""
    keep = "" if run.keep_asked is None else f", keep {run.keep_asked:g}"
    return f"{run.method}{keep}" + (f", {run.recovery_tokens:,} tokens" if run.recovery_tokens else "")


def time_left(specs: Iterable[RunSpec], done: dict[str, Run]) -> float | None:
    """Seconds that the runs without a row take if each takes what those most like it took; None if none has ended."""
    finished = [run for run in done.values() if run.seconds]
    if not finished:
        return None
    alike: tuple[Callable[[RunSpec | Run], Any], ...] = (
        lambda run: (run.model, run.method, run.recovery_tokens),
        lambda run: run.recovery_tokens,
        lambda run: None,
    )

    def expected(spec: RunSpec) -> float:
        groups = ([run for run in finished if same(run) == same(spec)] for same in alike)
        return fmean(
            sum(spent or 0.0 for spent in run.seconds.values()) for run in next(group for group in groups if group)
        )

    return sum(expected(spec) for spec in specs if spec.key not in done)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "unknown time"
    minutes = math.ceil(seconds / 60)
    return f"about {minutes} min" if minutes < 120 else f"about {minutes / 60:.0f} h"
