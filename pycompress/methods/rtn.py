"""Round to nearest: the baseline that every quantizer is compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.formats.packed import Rounded
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.recipe import Config


@dataclass(frozen=True)
class RTN(Config):
    """Round each weight to the nearest of `2**bits` evenly spaced values between its group's least and greatest.

    The model keeps ordinary linear layers with the rounded values; bytes are counted as if they were packed, with a
    16-bit scale and zero a group.

    Parameters
    ----------
    bits
        From 1 to 8.
    group_size
        Weights of a row that share a scale; None for the whole row.
    targets
        Roles of linears ("q", "down") or patterns over module names; None for every linear of the decoder blocks.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Examples
    --------
    >>> import pycompress
    >>> pycompress.RTN(bits=4, group_size=64).to_dict()
    {'method': 'RTN', 'targets': None, 'bits': 4, 'group_size': 64}

    Reference: the baseline of arXiv:2501.08631, table 1.
    """

    bits: int = 4
    group_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("bits", 1)
        self.check_count("group_size", 1)
        if self.bits > 8:
            raise ValueError(f"RTN.bits must be in 1 to 8, got {self.bits}")


def _compress(
    weight: Tensor, statistics: Statistics | None, config: RTN, budget: int | None, measured: Curve | None = None
) -> Rounded:
    n, k = weight.shape
    size = config.group_size or k
    groups = weight.float().view(n, k // size, size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = ((high - low) / (2**config.bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = torch.round((groups - low) / scale) * scale + low
    return Rounded(rounded.view(n, k).to(weight.dtype), config.bits, n * (k // size))


def _check(shape: tuple[int, int], dtype: torch.dtype, config: RTN) -> None:
    if shape[1] % (config.group_size or 1):
        raise ValueError(f"RTN.group_size must divide the {shape[1]} inputs of each row, got {config.group_size}")


METHODS[RTN] = Method(_compress, check=_check)
