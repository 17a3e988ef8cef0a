"""Products of a few tokens with a stored matrix, split over K so that all multiprocessors take part.

M tokens, K inputs, S rows of the matrix. The weight is read once. The partial sums lie in a float32 workspace; whoever
reads them adds them in a fixed order.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from pycompress.kernels.codes import columns_of, halves_of, load_codes, storage_of, values_of, width_of
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _channels(channels_ptr, offs_k, K, pivots, PIVOTED: tl.constexpr):
    """Inputs at the positions `offs_k`; of a pivoted matrix first those it stores, in its order, then the pivots."""
    channels = offs_k
    if PIVOTED:
        rotated = tl.where(offs_k < K - pivots, offs_k + pivots, offs_k - (K - pivots))
        channels = tl.load(channels_ptr + rotated, mask=offs_k < K, other=0).to(tl.int32)
    return channels


@triton.jit
def _completed(
    w, labels_ptr, offs_s, offs_k, channels, K, clusters, pivots, ONE_HOT: tl.constexpr, PIVOTED: tl.constexpr
):
    """A tile of the stacked matrix: `w` with the pivots' identity behind it, and over it a row a cluster of ones."""
    if PIVOTED:
        pivot = offs_k - (K - pivots)
        identity = (offs_s - clusters)[:, None] == pivot[None, :]
        w = tl.where((pivot >= 0)[None, :], identity.to(w.dtype), w)
    if ONE_HOT:
        labels = tl.load(labels_ptr + channels, mask=offs_k < K, other=-1).to(tl.int32)
        w = tl.where(labels[None, :] == offs_s[:, None], 1.0, w).to(w.dtype)
    return w


@triton.jit
def _row_kernel(
    x_ptr,  # [K]
    weight_ptr,  # [S - clusters, K - pivots]
    scales_ptr,
    labels_ptr,  # [K]
    channels_ptr,  # [K]
    out_ptr,  # [splits, S], float32
    S,
    K,
    clusters,
    pivots,
    K_SPLIT,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    ONE_HOT: tl.constexpr,
    PIVOTED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token: products are kept per column and added up once at the end."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = offs_s - clusters
    mask_s = (offs_s < S) & (row >= 0)
    start = tl.program_id(1) * K_SPLIT
    acc = tl.full((BLOCK_S, BLOCK_K // HALVES), 0, tl.float32)
    for first in range(start, tl.minimum(start + K_SPLIT, K), BLOCK_K):
        codes, scales = load_codes(weight_ptr, scales_ptr, row, mask_s, first, K - pivots, STORAGE, BLOCK_K)
        for half in tl.static_range(HALVES):
            offs_k = columns_of(first, half, STORAGE, BLOCK_K)
            channels = _channels(channels_ptr, offs_k, K, pivots, PIVOTED)
            x = tl.load(x_ptr + channels, mask=offs_k < K, other=0.0).to(tl.float32)
            w = values_of(codes, scales, half, STORAGE).to(tl.float32)
            w = _completed(w, labels_ptr, offs_s, offs_k, channels, K, clusters, pivots, ONE_HOT, PIVOTED)
            acc += w * x[None, :]
    tl.store(out_ptr + tl.program_id(1) * S + offs_s, tl.sum(acc, axis=1), mask=offs_s < S)


@triton.jit
def _split_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [S - clusters, K - pivots]
    scales_ptr,
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
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    ONE_HOT: tl.constexpr,
    PIVOTED: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A few tokens: the weight is the tall operand, so that the tile of tokens may be narrow."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    row = offs_s - clusters
    mask_s, mask_m = (offs_s < S) & (row >= 0), offs_m < M
    start = tl.program_id(1) * K_SPLIT
    acc = tl.full((BLOCK_S, BLOCK_M), 0, tl.float32)
    for first in range(start, tl.minimum(start + K_SPLIT, K), BLOCK_K):
        codes, scales = load_codes(weight_ptr, scales_ptr, row, mask_s, first, K - pivots, STORAGE, BLOCK_K)
        for half in tl.static_range(HALVES):
            offs_k = columns_of(first, half, STORAGE, BLOCK_K)
            channels = _channels(channels_ptr, offs_k, K, pivots, PIVOTED)
            x_tile = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + channels[None, :]
            x = tl.load(x_tile, mask=mask_m[:, None] & (offs_k < K)[None, :], other=0.0)
            w = values_of(codes, scales, half, STORAGE).to(x.dtype)
            w = _completed(w, labels_ptr, offs_s, offs_k, channels, K, clusters, pivots, ONE_HOT, PIVOTED)
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    out = out_ptr + (tl.program_id(1) * M + offs_m[None, :]) * S + offs_s[:, None]
    tl.store(out, acc, mask=(offs_s < S)[:, None] & mask_m[None, :])


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache
def dependent(device: torch.device) -> bool:
    """Whether kernels may start while the one before them ends, and wait for it themselves (compute capability 9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def skinny(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    labels: Tensor | None = None,
    channels: Tensor | None = None,
    clusters: int = 0,
) -> Tensor:
    """`x [M, K]` times the stacked matrix transposed, as unsummed parts `[splits, M, S]`, for a few tokens.

    The stacked matrix is `weight [S, K]`, or with `labels [K]` the one-hot rows of the clusters above `weight`. With
    `channels [K]`, a permutation, the columns of `weight [S, K - S]` belong to `channels[S:]`, and the first S channels
    have the identity. `weight` is contiguous, and has `scales` where it is codes.
    """
    (M, K), S = x.shape, weight.shape[0] + clusters
    if not S * K:
        return torch.zeros((1, M, S), dtype=torch.float32, device=x.device)
    storage = storage_of(weight)
    block_s, block_k = _tile(M, x.element_size(), storage)
    tiles = triton.cdiv(S, block_s)
    splits = max(1, min(2 * _processors(x.device) // tiles, K // (2 * block_k), 16))
    k_split = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
    splits = triton.cdiv(K, k_split)
    parts = torch.empty((splits, M, S), dtype=torch.float32, device=x.device)
    pivots = 0 if channels is None else K - width_of(weight)
    optional = (x if t is None else t for t in (scales, labels, channels))
    named = {
        "STORAGE": storage,
        "HALVES": halves_of(storage),
        "ONE_HOT": labels is not None,
        "PIVOTED": channels is not None,
        "PDL": dependent(x.device),
        "BLOCK_S": block_s,
        "BLOCK_K": block_k,
        "launch_pdl": dependent(x.device),
    }
    if M == 1:
        _row_kernel[(tiles, splits)](x, weight, *optional, parts, S, K, clusters, pivots, k_split, **named)
        return parts
    block_m = max(16, triton.next_power_of_2(M))
    _split_kernel[(tiles, splits)](
        x,
        weight,
        *optional,
        parts,
        M,
        S,
        K,
        clusters,
        pivots,
        k_split,
        x.stride(0),
        **named,
        BLOCK_M=block_m,
        PRECISION=precision(x.dtype),
        num_warps=4 if block_m <= 16 else 8,
    )
    return parts


def _tile(M: int, itemsize: int, storage: str) -> tuple[int, int]:
    """BLOCK_S and BLOCK_K: a lone token has no use for a tall tile, and wide rows keep its loads long.

    For more tokens the two operands' tiles must leave registers for the sums.
    """
    if M == 1:
        return 16, 1024 if storage == "int4" else 512
    if itemsize == 2:
        return 64, 128 if M <= 16 else 64
    return 64, 64 if storage == "int4" else 32


def precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "ieee"
