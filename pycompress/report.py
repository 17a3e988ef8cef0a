"""What a compression did: a row a module, totals, as text, JSON and a plot."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pycompress._brief import brief
from pycompress._files import finite
from pycompress.search.result import Result

# The format of a linear whose block is gone.
DROPPED = "dropped"


@dataclass(frozen=True)
class Row:
    """One module: its packed format, bytes before and after (as the format counts them) and as stored in a file,
    the relative output error `‖(W - Ŵ)X‖ / ‖WX‖` (of the weights where there was no calibration), seconds spent.
    """

    name: str
    block: int
    format: str
    before: int
    after: int
    stored: int
    error: float
    seconds: float

    @property
    def keep(self) -> float:
        """After over before; not a number for a module that the dense model has not."""
        return self.after / self.before if self.before else math.nan


@dataclass(frozen=True)
class Total:
    """Bytes of a part of the model before and after; `keep` is after over before."""

    before: int
    after: int

    @property
    def keep(self) -> float:
        return self.after / self.before if self.before else 1.0


@dataclass(frozen=True)
class Report:
    """`targets`: the matrices the recipe named. `decoder`: all tensors of the decoder blocks. `file`: every tensor, as
    `save_pretrained` stores it. `recipe`: the settings as plain values. `seconds`: what this run spent, by stage.
    `searches`: every candidate that a search tried, one result a searching method of the recipe; not part of the JSON.
    """

    rows: tuple[Row, ...]
    targets: Total
    decoder: Total
    file: Total
    recipe: list[dict[str, Any]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict, compare=False)
    searches: tuple[Result, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        width = max([28, *(len(row.format) for row in self.rows)]) + 2
        lines = [f"{'module':<42}{'format':<{width}}{'bytes':>11}{'keep':>8}{'error':>9}{'seconds':>9}"]
        for row in self.rows:
            lines.append(
                f"{row.name:<42}{row.format:<{width}}{row.after:>11}{row.keep:>8.3f}{row.error:>9.4f}{row.seconds:>9.2f}"
            )
        for name in ("targets", "decoder", "file"):
            total: Total = getattr(self, name)
            lines.append(f"{name:<8}{total.before:>14} -> {total.after:>13} bytes, keep {total.keep:.4f}")
        if self.seconds:
            stages = [f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items()]
            lines.append(f"seconds  {', '.join(stages)}, in all {sum(self.seconds.values()):.1f}")
        return "\n".join(lines)

    def to_json(self, path: str | Path | None = None) -> str:
        """The report as JSON text, written to `path` too where one is given; null where there is no finite number."""
        totals = {name: asdict(total) | {"keep": total.keep} for name, total in self._totals()}
        rows = [asdict(row) for row in self.rows]
        content = {"recipe": self.recipe, **totals, "seconds": self.seconds, "rows": rows}
        text = json.dumps(finite(content), indent=1, allow_nan=False)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote. Raises `ValueError` for another text."""
        try:
            data = json.loads(text)
            rows = (row | {"error": math.nan if row["error"] is None else row["error"]} for row in data["rows"])
            targets, decoder, file = (
                Total(data[n]["before"], data[n]["after"]) for n in ("targets", "decoder", "file")
            )
            seconds = dict(data.get("seconds", {}))  # reports of 0.1 have none
            return cls(tuple(Row(**row) for row in rows), targets, decoder, file, data["recipe"], seconds)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
            raise ValueError(f"the text is no report that to_json wrote: {brief(text)}") from error

    def plot(self, path: str | Path) -> None:
        """Kept bytes and output error of every module over depth, as an image; needs `pip install pycompress[plot]`."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Report.plot needs matplotlib: pip install pycompress[plot]") from error
        figure = Figure(figsize=(9, 6), layout="constrained")
        keep_axis, error_axis = figure.subplots(2, 1, sharex=True)
        kinds = sorted({row.name.rsplit(".", 1)[-1] for row in self.rows})
        for kind in kinds:
            rows = [row for row in self.rows if row.name.rsplit(".", 1)[-1] == kind]
            depth = [row.block for row in rows]
            keep_axis.plot(depth, [row.keep for row in rows], marker="o", label=kind)
            error_axis.plot(depth, [row.error for row in rows], marker="o", label=kind)
        keep_axis.set_ylabel("kept bytes")
        keep_axis.set_ylim(0, 1.05)
        error_axis.set_ylabel("relative output error")
        error_axis.set_ylim(bottom=0)
        error_axis.set_xlabel("decoder block")
        keep_axis.legend(ncols=len(kinds), loc="upper center", bbox_to_anchor=(0.5, 1.2), frameon=False)
        figure.savefig(path, dpi=120)

    def _totals(self) -> list[tuple[str, Total]]:
        return [("targets", self.targets), ("decoder", self.decoder), ("file", self.file)]
