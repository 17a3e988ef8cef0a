"""What a method is: tensor maths from a weight and its input statistics to a packed weight."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pycompress.formats import Packed
from pycompress.recipe import Config


@dataclass(frozen=True)
class Statistics:
    """What a method knows of one linear from calibration, float32.

    `gram [K, K]`: mean of x xᵀ over the inputs of `tokens` tokens. `sensitivity [N]`: mean squared gradient of the loss
    by each output (nats² over the output's unit squared), None where it was not measured.
    """

    gram: Tensor
    tokens: int
    sensitivity: Tensor | None = None


@dataclass(frozen=True)
class Curve:
    """How well one matrix can be packed into how many bytes: `nbytes` int64 and `error` float64, one entry a choice.

    `error` is the squared output error relative to the squared output, and `energy` that squared output, averaged over
    tokens and summed over outputs, each times its sensitivity where that is known: error times energy is in nats².
    """

    nbytes: Tensor
    error: Tensor
    energy: float


@dataclass(frozen=True)
class Method:
    """`compress(weight [N, K], statistics | None, config, budget in bytes | None)` gives a packed weight, or None to
    leave the matrix dense. `curve(weight, statistics, config)` is there where one budget is shared between matrices:
    `shared(config)` says whether it is. `sensitive(config)` says whether the loss's gradients are wanted.
    """

    compress: Callable[[Tensor, Statistics | None, Any, int | None], Packed | None]
    curve: Callable[[Tensor, Statistics | None, Any], Curve] | None = None
    shared: Callable[[Any], bool] = lambda config: False
    sensitive: Callable[[Any], bool] = lambda config: False


METHODS: dict[type[Config], Method] = {}
