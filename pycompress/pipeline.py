"""What the packing of matrices, the pruning and the slicing of blocks have in common."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from tqdm.auto import tqdm

from pycompress.report import Row
from pycompress.search.result import Result


@dataclass(frozen=True)
class Progress:
    """Bars over items, where they are `shown`."""

    shown: bool

    def __call__(self, items: Iterable[Any], what: str) -> Iterable[Any]:
        return tqdm(items, desc=what, disable=not self.shown)


@dataclass
class Clock:
    """Seconds by stage; a stage may come many times, and none within another."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


@dataclass(frozen=True)
class Outcome:
    """What a pipeline made of a model: one row a module.

    `origins`: what the module of a row was called in the model that was given, where that changed. `search`: what a
    search among subnets found. `seconds`: by stage, where it has stages.
    """

    rows: list[Row]
    origins: Mapping[str, str] = field(default_factory=dict)
    search: Result | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


class Pipeline(Protocol):
    """A part of a recipe at work on one model."""

    def run(self) -> Outcome:
        """Change the model in place."""

    def undo(self) -> None:
        """Put the model back as it was given, whatever point `run` has come to."""
