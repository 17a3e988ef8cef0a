"""Tiles of a stored matrix: floats as they are, int8 and int4 codes with their scales.

The layout is that of pycompress.storage. One byte of int4 holds the codes of two columns that are 16 apart, so a tile
of it is used as two HALVES, each with the columns that one half of its bytes stands for: no code changes its thread.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = tl.constexpr(32)
GROUP = tl.constexpr(64)


@triton.jit
def columns_of(first, HALF: tl.constexpr, STORAGE: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of a half of the tile that starts at column `first`, a multiple of GROUP; of all of it but in int4."""
    if STORAGE == "int4":
        offs_b = tl.arange(0, WIDTH // 2)
        columns = first + offs_b // (BLOCK // 2) * BLOCK + offs_b % (BLOCK // 2) + HALF * (BLOCK // 2)
    else:
        columns = first + tl.arange(0, WIDTH)
    return columns


@triton.jit
def load_codes(ptr, scales_ptr, rows, mask, first, n, STORAGE: tl.constexpr, WIDTH: tl.constexpr):
    """A tile of the matrix `[., n]` as it is stored, and its scales; zero outside `mask` and past column n."""
    rows, mask = rows[:, None].to(tl.int64), mask[:, None]
    if STORAGE == "int4":
        offs = first // 2 + tl.arange(0, WIDTH // 2)[None, :]
        groups = first // GROUP + tl.arange(0, WIDTH // GROUP)[None, :]
        codes = tl.load(ptr + rows * (n // 2) + offs, mask=mask & (offs < n // 2), other=0)
        scales = scales_ptr + rows * tl.cdiv(n, GROUP) + groups
        scales = tl.load(scales, mask=mask & (groups * GROUP < n), other=0.0)
    else:
        offs = first + tl.arange(0, WIDTH)[None, :]
        codes = tl.load(ptr + rows * n + offs, mask=mask & (offs < n), other=0)
        scales = codes
        if STORAGE == "int8":
            scales = tl.load(scales_ptr + rows, mask=mask, other=0.0)
    return codes, scales


@triton.jit
def values_of(codes, scales, HALF: tl.constexpr, STORAGE: tl.constexpr):
    """The numbers of one half of what `load_codes` gave; products with scales are float32, or the scales' float64."""
    if STORAGE == "int4":
        numbers = ((codes >> (4 * HALF)) & 15).to(tl.float32) - 8
        groups = tl.reshape(numbers, (codes.shape[0], scales.shape[1], GROUP // 2)) * scales[:, :, None]
        numbers = tl.reshape(groups, codes.shape)
    elif STORAGE == "int8":
        numbers = codes.to(tl.float32) * scales
    else:
        numbers = codes
    return numbers


@triton.jit
def _dequantize_kernel(
    codes_ptr,
    scales_ptr,
    out_ptr,  # [R, n]
    R,
    n,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * WIDTH
    codes, scales = load_codes(codes_ptr, scales_ptr, rows, rows < R, first, n, STORAGE, WIDTH)
    for half in tl.static_range(HALVES):
        columns = columns_of(first, half, STORAGE, WIDTH)
        values = values_of(codes, scales, half, STORAGE).to(out_ptr.dtype.element_ty)
        mask = (rows < R)[:, None] & (columns < n)[None, :]
        tl.store(out_ptr + rows[:, None].to(tl.int64) * n + columns[None, :], values, mask=mask)


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The matrix that int8 or int4 `codes` stand for, in the dtype of `scales`."""
    storage = storage_of(codes)
    shape = codes.shape[0], width_of(codes)
    out = torch.empty(shape, dtype=scales.dtype, device=codes.device)
    if out.numel():
        grid = (triton.cdiv(shape[0], 8), triton.cdiv(shape[1], 512))
        _dequantize_kernel[grid](
            codes, scales, out, *shape, STORAGE=storage, HALVES=halves_of(storage), ROWS=8, WIDTH=512, num_warps=8
        )
    return out


def storage_of(stored: Tensor) -> str:
    return {torch.int8: "int8", torch.uint8: "int4"}.get(stored.dtype, "float")


def halves_of(storage: str) -> int:
    return 2 if storage == "int4" else 1


def width_of(stored: Tensor) -> int:
    """Columns of the matrix that `stored` stands for."""
    return stored.shape[1] * halves_of(storage_of(stored))
