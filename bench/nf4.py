"""NF4 as bitsandbytes stores it: the method that users would take instead of ours at 4.5 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.formats.packed import Rounded
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.recipe import Config

BLOCK = 64
# Quantiles of a normal, over the largest; arXiv:2305.14314, appendix E.
VALUES = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@dataclass(frozen=True)
class NF4(Config):
    """Each weight to the nearest of sixteen values times the largest magnitude of its 64, which is kept in float32."""


def _compress(
    weight: Tensor, statistics: Statistics | None, config: NF4, budget: int | None, measured: Curve | None = None
) -> Rounded:
    values = torch.tensor(VALUES)
    blocks = weight.float().view(-1, BLOCK)
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    codes = torch.bucketize(blocks / largest, (values[1:] + values[:-1]) / 2)
    # As many bytes a block as the scale and zero of 16 bits that the format counts.
    return Rounded((values[codes] * largest).view_as(weight).to(weight.dtype), 4, len(blocks))


METHODS[NF4] = Method(_compress)
