"""Weights recorded along training, on file, and the importance they give each weight (arXiv:2502.17071)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pycompress._brief import brief, listed

STEM = "trajectory"
FLOATS = ("F64", "F32", "F16", "BF16")


class Records:
    """What a `TrajectoryTracker` saved in a folder, read one matrix at a time.

    Raises `ValueError` where there is nothing, or what a single process of a sharded run saved.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        shards = sorted(self.folder.glob(f"{STEM}-*-of-*.safetensors"))
        file = self.folder / f"{STEM}.safetensors"
        if shards and not file.exists():
            raise ValueError(
                f"{self.folder} holds the trajectory of a sharded run, {len(shards)} files; save it from one process "
                f"that holds the whole weights"
            )
        self.file = opened(file)
        self.facts = facts_of(self.file, file)
        self.names = frozenset(self.file.keys())

    def check(self, name: str, shape: tuple[int, ...]) -> None:
        """Raise `ValueError` unless the weight of the module called `name`, of this shape, was recorded."""
        if name not in self.names:
            raise ValueError(
                f"{name} was not followed: the trajectory in {self.folder} has {len(self.names)} other matrices, as "
                f"{listed([min(self.names, default='none')])}; leave it out of targets, or record a training of this "
                f"model"
            )
        recorded = tuple(self.file.get_slice(name).get_shape()[1:])
        if recorded != tuple(shape):
            raise ValueError(
                f"{name} is {list(shape)} and was {list(recorded)} when its trajectory in {self.folder} was recorded; "
                f"record a training of this model"
            )

    def importance(self, name: str) -> Tensor:
        """Importance of each weight of the module called `name`, of its shape, float32."""
        return importance(self.file.get_tensor(name), self.facts["count"], self.facts["window"], self.facts["signed"])


def importance(kept: Tensor, count: int, window: int | None, signed: bool) -> Tensor:
    """Importance of a weight from its records: a weighted sum `[1, *shape]`, or a ring `[window + 1, *shape]`."""
    if window is None:
        total, weights = kept[0], count * (count + 1) / 2
        return total.abs() / weights
    records = range(max(1, count - window), count + 1)
    total = torch.zeros(kept.shape[1:], dtype=torch.float32, device=kept.device)
    for record in records:
        value = kept[record % len(kept)]
        total.add_((value if signed else value.abs()).float(), alpha=record)
    return total.abs_() / sum(records)


def facts_of(found: Any, file: Path) -> dict[str, Any]:
    """What an open file says of its records: `count`, `window`, `every`, `signed`, `targets`.

    Raises `ValueError` unless all are there and every tensor is a matrix's records.
    """
    try:
        facts = json.loads(found.metadata()[STEM])
        if not isinstance(facts, dict) or facts.keys() != {"count", "window", "every", "signed", "targets"}:
            raise ValueError(f"its facts are {brief(facts)}")
        count, window, targets = facts["count"], facts["window"], facts["targets"]
        if not _whole(count) or not (window is None or _whole(window)) or not isinstance(facts["signed"], bool):
            raise ValueError(f"its facts are {brief(facts)}")
        if facts["every"] != "epoch" and not (_whole(facts["every"]) and facts["every"]):
            raise ValueError(f"every is {brief(facts['every'])}")
        if targets is not None and not (isinstance(targets, list) and all(isinstance(each, str) for each in targets)):
            raise ValueError(f"targets are {brief(targets)}")
        records = 1 if window is None else window + 1
        for name in found.keys():  # noqa: SIM118
            part = found.get_slice(name)
            shape, kind = part.get_shape(), part.get_dtype()
            fits = kind == "F32" if window is None else kind in FLOATS
            if len(shape) != 3 or shape[0] != records or not fits:
                raise ValueError(f"{brief(name)} is {kind} {shape} where {records} records of a matrix are kept")
        return facts
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"{file} is damaged: {error}; save the trajectory again") from error


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def opened(file: Path) -> Any:
    """The open safetensors file. Raises `ValueError` where it holds no trajectory."""
    try:
        found = safe_open(file, "pt")
        if STEM not in (found.metadata() or {}):
            raise ValueError("it has no such metadata")
        return found
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{file} holds no trajectory: {error}") from error


def recorded_importance(records: Records, name: str, module: nn.Module) -> Tensor:
    """Importance along training of the weight of the module called `name`, `[N, K]` float32, where the weight is.

    Raises `ValueError` where it was not recorded.
    """
    weight = module.get_parameter("weight")
    records.check(name, tuple(weight.shape))
    found = records.importance(name).to(weight.device)
    return found if isinstance(module, nn.Linear) else found.T.contiguous()
