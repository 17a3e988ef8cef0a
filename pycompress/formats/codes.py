"""How a packed weight's numbers are stored: as floats, or as integer codes with scales.

In `int8` a matrix `[rows, n]` is codes in -127 to 127, `[rows, n]` int8, with one scale a row, `[rows, 1]`. In `int4`
it is codes in -8 to 7, two a byte, `[rows, n / 2]` uint8, with a scale for each GROUP of a row, `[rows, ceil(n /
GROUP)]`; n is a multiple of BLOCK. Of each BLOCK's 16 bytes, byte l holds code l in its low half and code l + 16 in
its high half, both plus 8. A value is its code times its scale; scales are floats of the layer's dtype.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

Size = TypeVar("Size", int, Tensor)

BLOCK = 32
GROUP = 64
RANGE = {"int8": (-127, 127), "int4": (-8, 7)}
CODES = {torch.int8: "int8", torch.uint8: "int4"}


def storage_of(stored: Tensor) -> str:
    """How a matrix is stored: "int8", "int4", or "float" for a matrix that is stored as it is."""
    return CODES.get(stored.dtype, "float")


def width_of(stored: Tensor) -> int:
    """Columns of the matrix that `stored` stands for."""
    return stored.shape[1] * (2 if storage_of(stored) == "int4" else 1)


def stored_shape(rows: int, n: int, storage: str) -> tuple[int, int]:
    """Shape of the codes (of the values for floats). Raises ValueError where int4's blocks do not fit."""
    if storage == "int4" and n % BLOCK:
        raise ValueError(f"int4 stores rows of a multiple of {BLOCK} numbers, got {n}; use int8")
    return rows, n // 2 if storage == "int4" else n


def scales_shape(rows: int, n: int, storage: str) -> tuple[int, int]:
    return rows, 1 if storage == "int8" else -(-n // GROUP)


def stored_bytes(rows: Size, n: Size, storage: str, itemsize: int) -> Size:
    """Bytes of a matrix, its scales included; `itemsize` is that of the layer's dtype."""
    if storage == "float":
        return rows * n * itemsize
    if storage == "int8":
        return rows * (n + itemsize)
    return rows * (n // 2 + -(-n // GROUP) * itemsize)


def pack(codes: Tensor, storage: str) -> Tensor:
    """Store int8 codes `[rows, n]`."""
    if storage == "int8":
        return codes.contiguous()
    shape = stored_shape(len(codes), codes.shape[1], storage)
    halves = (codes.to(torch.int16) + 8).to(torch.uint8).reshape(len(codes), codes.shape[1] // BLOCK, 2, BLOCK // 2)
    return (halves[:, :, 0] | halves[:, :, 1] << 4).reshape(shape)


def codes_of(stored: Tensor) -> Tensor:
    """The int8 codes `[rows, n]` of what `pack` stored."""
    if stored.dtype == torch.int8:
        return stored
    blocks = stored.reshape(len(stored), 2 * stored.shape[1] // BLOCK, 1, BLOCK // 2)
    halves = torch.cat([blocks & 15, blocks >> 4], dim=2).reshape(len(stored), 2 * stored.shape[1])
    return (halves.to(torch.int16) - 8).to(torch.int8)


def dequantize(stored: Tensor, scales: Tensor | None) -> Tensor:
    """The matrix `[rows, n]`, float32."""
    if scales is None:
        return stored.float()
    values, scales = codes_of(stored).float(), scales.float()
    if stored.dtype == torch.uint8:
        scales = scales.repeat_interleave(GROUP, dim=1)[:, : values.shape[1]]
    return values * scales
