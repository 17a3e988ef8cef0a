"""Rows of a sweep: what one compressed model cost and kept, one JSON line a run."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from pycompress._files import finite

FILE = "runs.jsonl"
QUANTITIES = ("loss", "accuracy")


@dataclass(frozen=True)
class Run:
    """One compressed model, measured; or why it could not be.

    `key`: hash of all that decides the row. `method`: the label that runs of one law share. `recipe`: its configs as
    plain values. `keep_asked`: the `keep` that was filled in, None for a recipe with none to fill. `keep`: bytes of the
    decoder blocks over the dense ones', as the report counts them. `recovery_tokens`: of fine-tuning, by the settings
    `recovery`. `loss`: mean cross-entropy on the test text, nats a token. `tasks`: by name `accuracy` and `stderr` in
    [0, 1] and `count` of questions. `bytes`: of the whole model as saved. Speeds: tokens a second, those of the dense
    model taken in turns in the same run. `seconds`: by what they were spent on. `error`: None, or why the run failed;
    what it did not reach is None. `other`: keys of the line that this version does not know.
    """

    key: str
    model: str
    method: str
    recipe: list[dict[str, Any]]
    keep_asked: float | None
    recovery_tokens: int
    seed: int
    recovery: dict[str, Any] = field(default_factory=dict)
    keep: float | None = None
    loss: float | None = None
    dense_loss: float | None = None
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    dense_tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    bytes: int | None = None
    dense_bytes: int | None = None
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    dense_prefill_tokens_per_s: float | None = None
    dense_decode_tokens_per_s: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    error: str | None = None
    other: dict[str, Any] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """The compression ratio r: the removed share of the decoder blocks' bytes."""
        if self.keep is None:
            raise ValueError(f"run {self.key} of {self.method} failed and has no ratio: {self.error}")
        return 1.0 - self.keep

    @property
    def accuracy(self) -> float | None:
        """Mean accuracy over the tasks, in [0, 1]."""
        return fmean(task["accuracy"] for task in self.tasks.values()) if self.tasks else None

    @property
    def dense_accuracy(self) -> float | None:
        """The same of the dense model."""
        return fmean(task["accuracy"] for task in self.dense_tasks.values()) if self.dense_tasks else None

    def measured(self, quantity: str) -> tuple[float, float] | None:
        """The compressed and the dense model's "loss" or "accuracy"; None where the run has them not."""
        if quantity not in QUANTITIES:
            raise ValueError(f"quantity must be one of {', '.join(map(repr, QUANTITIES))}, got {quantity!r}")
        value, dense = getattr(self, quantity), getattr(self, f"dense_{quantity}")
        return None if self.error is not None or value is None or dense is None else (value, dense)

    def speedup(self, phase: str = "decode") -> float | None:
        """Tokens a second in "decode" or "prefill", over the dense model's."""
        value, dense = getattr(self, f"{phase}_tokens_per_s"), getattr(self, f"dense_{phase}_tokens_per_s")
        return None if value is None or dense is None else value / dense

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, unknown keys where they were."""
        plain = dataclasses.asdict(self)
        return plain | plain.pop("other")

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Run:
        """The run of a line. Raises `ValueError` for a line that lacks what every run has."""
        known = {f.name: f for f in dataclasses.fields(cls) if f.name != "other"}
        needed = [f.name for f in known.values() if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in needed if name not in row]
        if missing:
            raise ValueError(f"a run needs {', '.join(needed)}; {', '.join(missing)} is missing")
        wrong = [name for name in ("key", "model", "method") if not isinstance(row[name], str)]
        if wrong:
            raise ValueError(f"{wrong[0]} of a run must be a text, got {row[wrong[0]]!r:.60}")
        settings = {name: value for name, value in row.items() if name in known}
        return cls(**settings, other={name: value for name, value in row.items() if name not in known})


def load(folder: str | Path) -> list[Run]:
    """The runs in a sweep's folder (or in a file of such lines), in the order in which they were first written.

    Of rows with one key the last counts. A last line that a kill cut short does not. Raises `ValueError` where there is
    no such file, or another line is damaged.
    """
    file = _file(folder)
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ValueError(f"cannot read the runs {file}: {error.strerror}") from error
    found: dict[str, Run] = {}
    for number, line in enumerate(lines, start=1):
        row = _row(line)
        if row is None and line.strip() and number < len(lines):
            raise ValueError(f"line {number} of {file} is damaged; delete that line and its run is done again")
        if row is not None:
            try:
                run = Run.from_dict(row)
            except ValueError as error:
                raise ValueError(f"line {number} of {file}: {error}") from error
            found[run.key] = run
    return list(found.values())


def append(folder: str | Path, run: Run) -> None:
    """Add a row and wait until it is on disk; a last line that was cut short goes.

    Raises `ValueError` for a number that is not finite, which JSON does not have.
    """
    line = json.dumps(run.to_dict(), allow_nan=False)
    place = _file(folder)
    try:
        with place.open("a+b") as file:
            file.seek(0)
            _, _, tail = (content := file.read()).rpartition(b"\n")
            if tail and _row(tail.decode(errors="replace")) is None:
                file.truncate(len(content) - len(tail))
            elif tail:
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ValueError(f"cannot write {place}: {error.strerror}") from error


def _file(folder: str | Path) -> Path:
    path = Path(folder)
    return path / FILE if path.is_dir() else path


def _row(line: str) -> dict[str, Any] | None:
    """The object on a line, or None where it is not whole. What is not a finite number is None."""
    try:
        row = finite(json.loads(line))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
