"""What a method is: tensor maths from a weight and its input statistics to a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycompress.formats.packed import Packed
from pycompress.recipe import Config


@dataclass(frozen=True)
class Statistics:
    """What a method knows of one linear from calibration, float32.

    `gram [K, K]`: mean of x xᵀ over the inputs of `tokens` tokens; `mean [K]`: that of x. `sensitivity [N]`: mean
    squared gradient of the loss by each output (nats² over the output's unit squared), None where it was not measured.
    """

    gram: Tensor
    tokens: int
    sensitivity: Tensor | None = None
    mean: Tensor | None = None


@dataclass(frozen=True)
class Curve:
    """How well one matrix can be packed into how many bytes: `nbytes` int64 and `error` float64, one entry a choice.

    `error` is the squared output error relative to the squared output, and `energy` that squared output, averaged over
    tokens and summed over outputs, each times its sensitivity where that is known: error times energy is in nats².
    `candidate` int64 numbers what the method chose between, -1 for the dense matrix.
    """

    nbytes: Tensor
    error: Tensor
    energy: float
    candidate: Tensor

    def best(self, budget: int) -> int:
        """The candidate of least error within a budget in bytes; -1 where none fits."""
        fits = self.nbytes <= budget
        if not bool(fits.any()):
            return -1
        return int(self.candidate[self.error.where(fits, torch.inf).argmin()])


def lower_hull(nbytes: np.ndarray, error: np.ndarray) -> list[int]:
    """The places of the choices that are best for some price of a byte: bytes rise, each step saves less a byte."""
    chosen: list[int] = []

    def saving(first: int, second: int) -> float:
        return float((error[first] - error[second]) / max(nbytes[second] - nbytes[first], 1))

    for index in np.lexsort((error, nbytes)):
        if chosen and error[index] >= error[chosen[-1]]:
            continue
        while len(chosen) > 1 and saving(chosen[-2], chosen[-1]) <= saving(chosen[-1], index):
            chosen.pop()
        chosen.append(int(index))
    return chosen


@dataclass(frozen=True)
class Method:
    """`compress(weight [N, K], statistics | None, config, budget in bytes | None, curve | None)` gives a packed weight,
    or None to leave the matrix dense. `curve(weight, statistics, config)` is there where one budget may be shared
    between matrices (`config.shared`). `check(shape, dtype, config)` raises ValueError for a matrix that cannot be
    packed so. Where the config names weights along training (`config.recorded`), their importance is a further
    argument, `importance`, of `compress` and `curve`. All else that a run asks of a method is a property of its config.
    """

    compress: Callable[..., Packed | None]
    curve: Callable[..., Curve] | None = None
    check: Callable[[tuple[int, int], torch.dtype, Any], None] = lambda shape, dtype, config: None


METHODS: dict[type[Config], Method] = {}
