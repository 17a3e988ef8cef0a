"""What a search found."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pycompress.search.space import Candidate


@dataclass(frozen=True)
class Evaluated:
    """One evaluated candidate: its digest, perplexity, parameters and depth, its generation (from 0), and the seconds
    since the search began, interruptions not counted.
    """

    digest: str
    perplexity: float
    parameters: int
    depth: int
    generation: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` takes it back."""
        return asdict(self) | {"perplexity": or_none(self.perplexity)}

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> Evaluated:
        return cls(**(row | {"perplexity": or_infinite(row["perplexity"])}))


@dataclass(frozen=True)
class Result:
    """The best candidate, its perplexity, and every candidate that was evaluated, in order."""

    best: Candidate
    perplexity: float
    history: tuple[Evaluated, ...] = field(repr=False)

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON text, written to `path` too where one is given. Infinite perplexities are null."""
        found = {"perplexity": or_none(self.perplexity), "best": self.best.to_list()}
        text = json.dumps(found | {"history": [entry.to_dict() for entry in self.history]}, indent=1)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The result that `to_json` wrote."""
        data = json.loads(text)
        history = tuple(Evaluated.from_dict(row) for row in data["history"])
        return cls(Candidate.from_list(data["best"]), or_infinite(data["perplexity"]), history)

    def plot(self, path: str | Path) -> None:
        """All perplexities and the best so far over evaluations; needs `pip install pycompress[plot]`."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Result.plot needs matplotlib: pip install pycompress[plot]") from error
        values = [entry.perplexity for entry in self.history]
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axis = figure.subplots()
        axis.plot(range(1, len(values) + 1), values, ".", alpha=0.4, label="candidate")
        axis.plot(range(1, len(values) + 1), list(itertools.accumulate(values, min)), label="best")
        axis.set_yscale("log")
        axis.set_xlabel("candidates evaluated")
        axis.set_ylabel("perplexity on the calibration sample")
        axis.legend(frameon=False)
        figure.savefig(path, dpi=120)


def or_none(value: float) -> float | None:
    """A finite number as it is, None for any other: JSON has no infinity."""
    return value if math.isfinite(value) else None


def or_infinite(value: float | None) -> float:
    """What `or_none` was given."""
    return math.inf if value is None else value
