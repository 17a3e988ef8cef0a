"""Dense linear layer over some rows and columns of a stored weight on the GPU.

M tokens, N rows and K columns of the weight, n and m of them in use. Without a choice the product is cuBLAS's. Up to
`DECODE` tokens one kernel gathers and multiplies, split over m, its partial sums added in a fixed order; for more, the
part in use is gathered into a workspace and multiplied by cuBLAS.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycompress.kernels.skinny import precision
from torch import Tensor

DECODE = 64
# Programs that keep a large GPU busy: two a multiprocessor.
PROGRAMS = 264


@triton.jit
def _positions(index_ptr, offs, mask, GATHER: tl.constexpr):
    """Where the weight has the channels `offs`."""
    if GATHER:
        return tl.load(index_ptr + offs, mask=mask, other=0)
    return offs.to(tl.int64)


@triton.jit
def _product_kernel(
    x_ptr,  # [M, m]
    weight_ptr,  # [N, K]
    rows_ptr,  # [n]
    columns_ptr,  # [m]
    out_ptr,  # [splits, M, n], float32
    M,
    n,
    m,
    SPLIT,
    stride_xm,
    stride_wn,
    stride_wk,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A few tokens: the weight is the tall operand, so that the tile of tokens may be narrow; it is read once."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    rows = _positions(rows_ptr, offs_n, mask_n, ROWS)
    offs_m = tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    start = tl.program_id(1) * SPLIT
    stop = tl.minimum(start + SPLIT, m)
    acc = tl.full((BLOCK_N, BLOCK_K if BLOCK_M == 1 else BLOCK_M), 0, tl.float32)
    for first in range(start, stop, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        mask_k = offs_k < stop
        columns = _positions(columns_ptr, offs_k, mask_k, COLUMNS)
        tile = weight_ptr + rows[:, None] * stride_wn + columns[None, :] * stride_wk
        w = tl.load(tile, mask=mask_n[:, None] & mask_k[None, :], other=0.0)
        if BLOCK_M == 1:
            # Products are kept per column and added up once at the end.
            acc += w.to(tl.float32) * tl.load(x_ptr + offs_k, mask=mask_k, other=0.0).to(tl.float32)[None, :]
        else:
            x_tile = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
            x = tl.load(x_tile, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    out = out_ptr + tl.program_id(1) * M * n
    if BLOCK_M == 1:
        tl.store(out + offs_n, tl.sum(acc, axis=1), mask=mask_n)
    else:
        tl.store(out + offs_m[None, :] * n + offs_n[:, None], acc, mask=mask_n[:, None] & mask_m[None, :])


@triton.jit
def _sum_kernel(
    parts_ptr,  # [splits, M, n]
    bias_ptr,  # [N]
    rows_ptr,  # [n]
    out_ptr,  # [M, n]
    n,
    splits,
    stride_split,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Parts of a split product, added from the first to the last, and the bias."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    offs = tl.program_id(1) * n + offs_n
    acc = tl.load(parts_ptr + offs, mask=mask_n, other=0.0)
    for split in range(1, splits):
        acc += tl.load(parts_ptr + split * stride_split + offs, mask=mask_n, other=0.0)
    if HAS_BIAS:
        rows = _positions(rows_ptr, offs_n, mask_n, ROWS)
        acc += tl.load(bias_ptr + rows, mask=mask_n, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _gather_kernel(
    weight_ptr,  # [N, K]
    rows_ptr,  # [n]
    columns_ptr,  # [m]
    out_ptr,  # [n, m]
    n,
    m,
    stride_wn,
    stride_wk,
    stride_on,
    stride_om,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The part of the weight in use."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    mask_n, mask_k = offs_n < n, offs_k < m
    rows = _positions(rows_ptr, offs_n, mask_n, ROWS)
    columns = _positions(columns_ptr, offs_k, mask_k, COLUMNS)
    mask = mask_n[:, None] & mask_k[None, :]
    w = tl.load(weight_ptr + rows[:, None] * stride_wn + columns[None, :] * stride_wk, mask=mask, other=0.0)
    out = out_ptr + offs_n[:, None].to(tl.int64) * stride_on + offs_k[None, :].to(tl.int64) * stride_om
    tl.store(out, w, mask=mask)


def subnet_linear_cuda(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> Tensor:
    """`x [..., m]` times `weight[rows][:, columns]` transposed, plus `bias[rows]`: `[..., n]` in the dtype of `x`.

    `weight [N, K]` of any strides, `rows [n]` and `columns [m]` int64, None for all; they are not checked.
    """
    if rows is None and columns is None:
        return torch.nn.functional.linear(x, weight, bias)
    rows, columns, bias = (t if t is None else t.contiguous() for t in (rows, columns, bias))
    n = (weight if rows is None else rows).shape[0]
    if n and 0 < x.numel() <= DECODE * x.shape[-1] and x.dtype != torch.float64:
        tokens = x.reshape(-1, x.shape[-1])
        tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
        return _decode(tokens, weight, bias, rows, columns).view(*x.shape[:-1], n)
    bias = bias if bias is None or rows is None else bias.index_select(0, rows)
    return torch.nn.functional.linear(x, _gathered(weight, rows, columns), bias)


def _decode(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    (M, m), n = x.shape, (weight if rows is None else rows).shape[0]
    out = torch.empty((M, n), dtype=x.dtype, device=x.device)
    block_m = 1 if M == 1 else max(16, triton.next_power_of_2(M))
    block_n, block_k = _tile(block_m, x.element_size(), weight.stride(0) == 1)
    tiles = triton.cdiv(n, block_n)
    split = triton.cdiv(triton.cdiv(m, max(1, min(PROGRAMS // tiles, m // (2 * block_k), 16))), block_k) * block_k
    parts = torch.empty((triton.cdiv(m, split), M, n), dtype=torch.float32, device=x.device)
    gathers = {"ROWS": rows is not None, "COLUMNS": columns is not None}
    _product_kernel[(tiles, len(parts))](
        x,
        weight,
        *(x if t is None else t for t in (rows, columns)),
        parts,
        M,
        n,
        m,
        split,
        x.stride(0),
        *weight.stride(),
        **gathers,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        PRECISION=precision(x.dtype),
        num_warps=4 if block_m <= 16 else 8,
    )
    _sum_kernel[(triton.cdiv(n, 256), M)](
        parts,
        *(x if t is None else t for t in (bias, rows)),
        out,
        n,
        len(parts),
        parts.stride(0),
        HAS_BIAS=bias is not None,
        ROWS=rows is not None,
        BLOCK_N=256,
    )
    return out


def _tile(block_m: int, itemsize: int, transposed: bool) -> tuple[int, int]:
    """BLOCK_N and BLOCK_K: long on the side that is contiguous, small enough to leave registers for the sums."""
    if block_m == 1:
        return (128, 32) if transposed else (16, 512)
    if itemsize == 4:
        return 64, 32
    return 64, 128 if block_m <= 16 else 64


def _gathered(weight: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """A copy of the part in use, its rows or columns contiguous as the weight's are."""
    n = weight.shape[0] if rows is None else rows.shape[0]
    m = weight.shape[1] if columns is None else columns.shape[0]
    transposed = weight.stride(0) == 1
    out = torch.empty((m, n) if transposed else (n, m), dtype=weight.dtype, device=weight.device)
    out = out.T if transposed else out
    if out.numel():
        block_n, block_k = (128, 16) if transposed else (16, 128)
        _gather_kernel[(triton.cdiv(n, block_n), triton.cdiv(m, block_k))](
            weight,
            *(weight if t is None else t for t in (rows, columns)),
            out,
            n,
            m,
            *weight.stride(),
            *out.stride(),
            ROWS=rows is not None,
            COLUMNS=columns is not None,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return out
