"""Products of a few tokens with a stored matrix, split over K so that all multiprocessors take part.

M tokens, K inputs, S rows of the matrix. The weight is read once. The partial sums lie in a float32 workspace; whoever
reads them adds them in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _stacked(
    weight_ptr,
    labels_ptr,
    offs_s,
    offs_k,
    columns,
    S,
    stop,
    clusters,
    pivots,
    stride_ws,
    ONE_HOT: tl.constexpr,
    PIVOTED: tl.constexpr,
):
    """A tile of the stacked matrix: `weight`, under one row a cluster that marks its columns when ONE_HOT.

    PIVOTED: the identity stands before `weight`, whose first column is at position `pivots`. `columns` are the
    channels at the positions `offs_k`.
    """
    row, column, mask_k = offs_s, offs_k, offs_k < stop
    mask = (offs_s < S)[:, None] & mask_k[None, :]
    if ONE_HOT:
        row = offs_s - clusters
        mask = mask & (row >= 0)[:, None]
    if PIVOTED:
        column = offs_k - pivots
        mask = mask & (column >= 0)[None, :]
    w = tl.load(weight_ptr + row[:, None].to(tl.int64) * stride_ws + column[None, :], mask=mask, other=0.0)
    if PIVOTED:
        w = tl.where(row[:, None] == offs_k[None, :], 1.0, w).to(w.dtype)
    if ONE_HOT:
        labels = tl.load(labels_ptr + columns, mask=mask_k, other=-1).to(tl.int32)
        w = tl.where(labels[None, :] == offs_s[:, None], 1.0, w).to(w.dtype)
    return w


@triton.jit
def _row_kernel(
    x_ptr,  # [K]
    weight_ptr,  # [S, K]
    labels_ptr,  # [K]
    channels_ptr,  # [K]
    out_ptr,  # [splits, S], float32
    S,
    K,
    clusters,
    pivots,
    K_SPLIT,
    stride_ws,
    ONE_HOT: tl.constexpr,
    PIVOTED: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token: products are kept per column and added up once at the end."""
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    start = tl.program_id(1) * K_SPLIT
    stop = tl.minimum(start + K_SPLIT, K)
    acc = tl.full((BLOCK_S, BLOCK_K), 0, tl.float32)
    for first in range(start, stop, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        columns = offs_k
        if PIVOTED:
            columns = tl.load(channels_ptr + offs_k, mask=offs_k < stop, other=0).to(tl.int32)
        x = tl.load(x_ptr + columns, mask=offs_k < stop, other=0.0).to(tl.float32)
        w = _stacked(
            weight_ptr, labels_ptr, offs_s, offs_k, columns, S, stop, clusters, pivots, stride_ws, ONE_HOT, PIVOTED
        )
        acc += w.to(tl.float32) * x[None, :]
    tl.store(out_ptr + tl.program_id(1) * S + offs_s, tl.sum(acc, axis=1), mask=mask_s)


@triton.jit
def _split_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [S, K]
    labels_ptr,  # [K]
    channels_ptr,  # [K]
    out_ptr,  # [splits, M, S], float32
    M,
    S,
    K,
    clusters,
    pivots,
    K_SPLIT,
    stride_xm,
    stride_ws,
    ONE_HOT: tl.constexpr,
    PIVOTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A few tokens: the weight is the tall operand, so that the tile of tokens may be narrow."""
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    mask_s, mask_m = offs_s < S, offs_m < M
    start = tl.program_id(1) * K_SPLIT
    stop = tl.minimum(start + K_SPLIT, K)
    acc = tl.full((BLOCK_S, BLOCK_M), 0, tl.float32)
    for first in range(start, stop, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        columns = offs_k
        if PIVOTED:
            columns = tl.load(channels_ptr + offs_k, mask=offs_k < stop, other=0).to(tl.int32)
        w = _stacked(
            weight_ptr, labels_ptr, offs_s, offs_k, columns, S, stop, clusters, pivots, stride_ws, ONE_HOT, PIVOTED
        )
        x_tile = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + columns[None, :]
        x = tl.load(x_tile, mask=mask_m[:, None] & (offs_k < stop)[None, :], other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    out = out_ptr + (tl.program_id(1) * M + offs_m[None, :]) * S + offs_s[:, None]
    tl.store(out, acc, mask=mask_s[:, None] & mask_m[None, :])


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def skinny(
    x: Tensor, weight: Tensor, labels: Tensor | None = None, channels: Tensor | None = None, clusters: int = 0
) -> Tensor:
    """`x [M, K]` times the stacked matrix transposed, as unsummed parts `[splits, M, S]`, for a few tokens.

    The stacked matrix is `weight [S, K]`, or with `labels [K]` the one-hot rows of the clusters above `weight`. With
    `channels [K]`, a permutation, the columns of `weight [S, K - S]` belong to `channels[S:]`, and the first S channels
    have the identity.
    """
    (M, K), S = x.shape, weight.shape[0] + clusters
    if not S * K:
        return torch.zeros((1, M, S), dtype=torch.float32, device=x.device)
    block_s, block_k = _tile(M, x.element_size())
    tiles = triton.cdiv(S, block_s)
    splits = max(1, min(2 * _processors(x.device) // tiles, K // (2 * block_k), 16))
    k_split = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
    splits = triton.cdiv(K, k_split)
    parts = torch.empty((splits, M, S), dtype=torch.float32, device=x.device)
    tensors = (x, weight, x if labels is None else labels, x if channels is None else channels, parts)
    pivots = 0 if channels is None else weight.shape[0]
    named = {"ONE_HOT": labels is not None, "PIVOTED": channels is not None, "BLOCK_S": block_s, "BLOCK_K": block_k}
    if M == 1:
        _row_kernel[(tiles, splits)](*tensors, S, K, clusters, pivots, k_split, weight.stride(0), **named)
        return parts
    block_m = max(16, triton.next_power_of_2(M))
    _split_kernel[(tiles, splits)](
        *tensors,
        M,
        S,
        K,
        clusters,
        pivots,
        k_split,
        x.stride(0),
        weight.stride(0),
        **named,
        BLOCK_M=block_m,
        PRECISION=precision(x.dtype),
        num_warps=4 if block_m <= 16 else 8,
    )
    return parts


def _tile(M: int, itemsize: int) -> tuple[int, int]:
    """BLOCK_S and BLOCK_K: a lone token has no use for a tall tile, and wide rows keep its loads long.

    For more tokens the two operands' tiles must leave registers for the sums.
    """
    if M == 1:
        return 16, 512
    if itemsize == 2:
        return 64, 128 if M <= 16 else 64
    return 64, 32


def precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "ieee"
