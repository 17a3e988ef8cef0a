"""Gram matrices on the GPU: only tiles on and below the diagonal are multiplied, the rest is their mirror image."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _tile_of(pid):
    """Row and column of the pid-th tile of a lower triangle, counted row by row."""
    row = ((tl.sqrt(8.0 * pid + 1.0) - 1.0) / 2.0).to(tl.int32)
    # The square root is rounded; one step either way mends it.
    row = tl.where(row * (row + 1) // 2 > pid, row - 1, row)
    row = tl.where((row + 1) * (row + 2) // 2 <= pid, row + 1, row)
    return row, pid - row * (row + 1) // 2


@triton.jit
def _gram_kernel(
    y_ptr,  # [B, n, d]
    x_ptr,  # [B, n, d]
    out_ptr,  # [B, n, n]
    n,
    d,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHAIN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile. Tensor cores add less precisely than float32 does: what CHAIN products give is added outside of them."""
    row, col = _tile_of(tl.program_id(0))
    batch = tl.program_id(1).to(tl.int64)
    offs_i = row * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_j = col * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    y_tile = y_ptr + (batch * n + offs_i[:, None]) * d + offs_k[None, :]
    x_tile = x_ptr + (batch * n + offs_j[:, None]) * d + offs_k[None, :]
    acc = tl.full((BLOCK_N, BLOCK_N), 0, out_ptr.dtype.element_ty)
    for first in range(0, d, CHAIN * BLOCK_K):
        part = tl.full((BLOCK_N, BLOCK_N), 0, out_ptr.dtype.element_ty)
        for step in tl.static_range(CHAIN):
            start = first + step * BLOCK_K
            mask_k = (offs_k < d - start)[None, :]
            y = tl.load(y_tile + start, mask=mask_k & (offs_i < n)[:, None], other=0.0)
            x = tl.load(x_tile + start, mask=mask_k & (offs_j < n)[:, None], other=0.0)
            part = tl.dot(y, tl.trans(x), part, input_precision=PRECISION, out_dtype=out_ptr.dtype.element_ty)
        acc += part
    if row == col:
        acc = tl.where(offs_i[:, None] >= offs_j[None, :], acc, tl.trans(acc))
    mask = (offs_i < n)[:, None] & (offs_j < n)[None, :]
    out = out_ptr + batch * n * n
    tl.store(out + offs_i[:, None].to(tl.int64) * n + offs_j[None, :], acc, mask=mask)
    if row != col:
        tl.store(out + offs_j[:, None].to(tl.int64) * n + offs_i[None, :], tl.trans(acc), mask=tl.trans(mask))


def gram_cuda(x: Tensor, h: Tensor | None = None) -> Tensor:
    """`X Xᵀ`, or `X H Xᵀ` for a symmetric `h`: `x [..., n, d]` to `[..., n, n]`, float32, exactly symmetric.

    16-bit inputs are multiplied as they are; float32 ones as three TF32 products, which keeps float32's digits;
    float64 stays float64. `h [..., d, d]` carries the leading sizes of `x` or none and is applied in float32.
    """
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    left = x if h is None else x.to(dtype) @ h.to(dtype)
    right = x.to(left.dtype)
    n, d = x.shape[-2:]
    left, right = left.reshape(-1, n, d).contiguous(), right.reshape(-1, n, d).contiguous()
    out = torch.empty((*x.shape[:-1], n), dtype=dtype, device=x.device)
    if out.numel():
        block, block_k, warps = _tile(n, d, left.dtype)
        tiles = triton.cdiv(n, block)
        _gram_kernel[(tiles * (tiles + 1) // 2, len(left))](
            left,
            right,
            out,
            n,
            d,
            BLOCK_N=block,
            BLOCK_K=block_k,
            CHAIN=2 if left.element_size() == 2 else 1,
            PRECISION="tf32x3" if left.dtype == torch.float32 else "ieee",
            num_warps=warps,
        )
    return out


def _tile(n: int, d: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """BLOCK_N, BLOCK_K and warps: the widest that keep the accumulator and its operands in registers."""
    if dtype == torch.float64:
        return 64, 16, 4
    if dtype == torch.float32:
        return 64, 32, 8
    # Rows that do not start on 16 bytes are loaded one number at a time, which leaves fewer registers.
    return (128, 64, 8) if n > 256 and d % 8 == 0 else (64, 64 if d % 8 == 0 else 32, 8)
