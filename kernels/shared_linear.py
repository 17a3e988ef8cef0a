"""Linear layer with shared channels on the GPU: a skinny product, a gather by label and a rank-r product.

M tokens, N outputs, K inputs, k clusters, r rank; `S = k + r` rows of the stacked matrix. Up to `DECODE` tokens the
skinny products read the weight once, split over K so that all multiprocessors take part; the partial sums lie in a
float32 workspace and are added in a fixed order. Above it they are cuBLAS's.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from pycompress.kernels.segments import group_by_label
from torch import Tensor

DECODE = 64


@triton.jit
def _stacked(weight_ptr, labels_ptr, offs_s, offs_k, S, stop, clusters, stride_ws, ONE_HOT: tl.constexpr):
    """A tile of the stacked matrix: `weight` itself, or `weight` under one row a cluster that marks its columns."""
    mask_k = (offs_k < stop)[None, :]
    if not ONE_HOT:
        tile = weight_ptr + offs_s[:, None].to(tl.int64) * stride_ws + offs_k[None, :]
        return tl.load(tile, mask=(offs_s < S)[:, None] & mask_k, other=0.0)
    tile = weight_ptr + (offs_s - clusters)[:, None].to(tl.int64) * stride_ws + offs_k[None, :]
    below = ((offs_s >= clusters) & (offs_s < S))[:, None]
    weight = tl.load(tile, mask=below & mask_k, other=0.0)
    labels = tl.load(labels_ptr + offs_k, mask=offs_k < stop, other=-1).to(tl.int32)
    return tl.where(labels[None, :] == offs_s[:, None], 1.0, weight).to(weight.dtype)


@triton.jit
def _row_kernel(
    x_ptr,  # [K]
    weight_ptr,  # [S, K]
    labels_ptr,  # [K]
    out_ptr,  # [splits, S], float32
    S,
    K,
    clusters,
    K_SPLIT,
    stride_ws,
    ONE_HOT: tl.constexpr,
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
        x = tl.load(x_ptr + offs_k, mask=offs_k < stop, other=0.0).to(tl.float32)
        w = _stacked(weight_ptr, labels_ptr, offs_s, offs_k, S, stop, clusters, stride_ws, ONE_HOT)
        acc += w.to(tl.float32) * x[None, :]
    tl.store(out_ptr + tl.program_id(1) * S + offs_s, tl.sum(acc, axis=1), mask=mask_s)


@triton.jit
def _split_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [S, K]
    labels_ptr,  # [K]
    out_ptr,  # [splits, M, S], float32
    M,
    S,
    K,
    clusters,
    K_SPLIT,
    stride_xm,
    stride_ws,
    ONE_HOT: tl.constexpr,
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
        w = _stacked(weight_ptr, labels_ptr, offs_s, offs_k, S, stop, clusters, stride_ws, ONE_HOT)
        x_tile = x_ptr + offs_m[:, None].to(tl.int64) * stride_xm + offs_k[None, :]
        x = tl.load(x_tile, mask=mask_m[:, None] & (offs_k < stop)[None, :], other=0.0)
        acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    out = out_ptr + (tl.program_id(1) * M + offs_m[None, :]) * S + offs_s[:, None]
    tl.store(out, acc, mask=mask_s[:, None] & mask_m[None, :])


@functools.lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _skinny(x: Tensor, weight: Tensor, labels: Tensor | None = None, clusters: int = 0) -> Tensor:
    """`x [M, K]` times the stacked matrix transposed, as unsummed parts `[splits, M, S]`, for M up to `DECODE`.

    The stacked matrix is `weight [S, K]`, or with `labels [K]` the one-hot rows of the clusters above `weight`.
    """
    (M, K), S = x.shape, weight.shape[0] + clusters
    if not S * K:
        return torch.zeros((1, M, S), dtype=torch.float32, device=x.device)
    block_s, block_k = _skinny_tile(M, x.element_size())
    tiles = triton.cdiv(S, block_s)
    splits = max(1, min(2 * _processors(x.device) // tiles, K // (2 * block_k), 16))
    k_split = triton.cdiv(triton.cdiv(K, splits), block_k) * block_k
    splits = triton.cdiv(K, k_split)
    parts = torch.empty((splits, M, S), dtype=torch.float32, device=x.device)
    marks = x if labels is None else labels
    tile = {"ONE_HOT": labels is not None, "BLOCK_S": block_s, "BLOCK_K": block_k}
    strides = (x.stride(0), weight.stride(0))
    if M == 1:
        _row_kernel[(tiles, splits)](x, weight, marks, parts, S, K, clusters, k_split, strides[1], **tile)
    else:
        block_m = max(16, triton.next_power_of_2(M))
        _split_kernel[(tiles, splits)](
            x,
            weight,
            marks,
            parts,
            M,
            S,
            K,
            clusters,
            k_split,
            *strides,
            **tile,
            BLOCK_M=block_m,
            PRECISION=_precision(x.dtype),
            num_warps=4 if block_m <= 16 else 8,
        )
    return parts


def _skinny_tile(M: int, itemsize: int) -> tuple[int, int]:
    """BLOCK_S and BLOCK_K: a lone token has no use for a tall tile, and wide rows keep its loads long.

    For more tokens the two operands' tiles must leave registers for the sums.
    """
    if M == 1:
        return 16, 512
    if itemsize == 2:
        return 64, 128 if M <= 16 else 64
    return 64, 32


def _precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "ieee"


@triton.jit
def _summed(ptr, mask, splits, stride_split):
    """Parts of a split product, added from the first to the last."""
    acc = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    for split in range(1, splits):
        acc += tl.load(ptr + split * stride_split, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _expand_kernel(
    parts_ptr,  # [splits, M, k + r]
    factor_ptr,  # [N, r]
    labels_ptr,  # [N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    N,
    k,
    r,
    splits,
    stride_split,
    stride_pm,
    stride_fn,
    stride_om,
    GATHER: tl.constexpr,  # "labels", "all" when output n is column n, or "none"
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`out[m, n] = parts[m, labels[n]] + sum_j parts[m, k + j] factor[n, j] + bias[n]`, parts added on the way."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_n, mask_m = offs_n < N, offs_m < M
    rows = parts_ptr + offs_m[:, None].to(tl.int64) * stride_pm
    mask = mask_m[:, None] & mask_n[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    if GATHER != "all":
        for first in range(0, r, BLOCK_R):
            offs_r = first + tl.arange(0, BLOCK_R)
            mask_r = (offs_r < r)[None, :]
            low = _summed(rows + k + offs_r[None, :], mask_m[:, None] & mask_r, splits, stride_split)
            tile = factor_ptr + offs_n[:, None].to(tl.int64) * stride_fn + offs_r[None, :]
            factor = tl.load(tile, mask=mask_n[:, None] & mask_r, other=0.0)
            if BLOCK_M == 1:
                acc += tl.sum(factor.to(tl.float32) * low, axis=1)[None, :]
            else:
                low = low.to(factor.dtype)
                acc = tl.dot(low, tl.trans(factor), acc, input_precision=PRECISION)
    if GATHER == "labels":
        columns = tl.load(labels_ptr + offs_n, mask=mask_n, other=0).to(tl.int32)
        acc += _summed(rows + columns[None, :], mask, splits, stride_split)
    elif GATHER == "all":
        acc += _summed(rows + offs_n[None, :], mask, splits, stride_split)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


def _expand(
    parts: Tensor, out: Tensor, factor: Tensor | None = None, labels: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """Sum `parts [splits, M, k + r]` and write `[M, N]` into `out`; without a factor the parts are the output's own."""
    (M, N), splits = out.shape, parts.shape[0]
    rank = 0 if factor is None else factor.shape[1]
    decode = M <= DECODE
    block_m = (1 if M == 1 else max(16, triton.next_power_of_2(M))) if decode else 64
    block_n = 128 if out.element_size() == 2 and not decode else 64
    _expand_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        parts,
        parts if factor is None else factor,
        parts if labels is None else labels,
        parts if bias is None else bias,
        out,
        M,
        N,
        parts.shape[2] - rank,
        rank,
        splits,
        parts.stride(0),
        parts.stride(1),
        0 if factor is None else factor.stride(0),
        out.stride(0),
        GATHER="labels" if labels is not None else "all" if factor is None else "none",
        HAS_BIAS=bias is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=64 if out.element_size() == 2 else 16,
        PRECISION=_precision(out.dtype),
        num_warps=4 if block_m <= 16 else 8,
    )
    return out


@triton.jit
def _sum_by_label_kernel(
    x_ptr,  # [M, K]
    order_ptr,  # [K], columns sorted by label
    offsets_ptr,  # [k + 1]
    out_ptr,  # [M, k]
    M,
    k,
    stride_xm,
    stride_om,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """`out[m, c]`: the sum in float32 of the `x[m, j]` whose label is c, in the order of j."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < k
    start = tl.load(offsets_ptr + offs_c, mask=mask_c, other=0)
    size = tl.load(offsets_ptr + offs_c + 1, mask=mask_c, other=0) - start
    longest = tl.max(size, axis=0)
    for index in tl.static_range(ROWS):
        m = tl.program_id(1) * ROWS + index
        if m < M:
            acc = tl.full((BLOCK_C,), 0, tl.float32)
            for first in range(0, longest, BLOCK_J):
                offs_j = (first + tl.arange(0, BLOCK_J))[None, :]
                mask = offs_j < size[:, None]
                columns = tl.load(order_ptr + start[:, None] + offs_j, mask=mask, other=0)
                values = tl.load(x_ptr + m.to(tl.int64) * stride_xm + columns, mask=mask, other=0.0)
                acc += tl.sum(values.to(tl.float32), axis=1)
            out = out_ptr + m.to(tl.int64) * stride_om + offs_c
            tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask_c)


def _sum_by_label(x: Tensor, labels: Tensor, out: Tensor) -> None:
    """Write into `out [M, k]` the columns of `x [M, K]` summed by label."""
    (M, clusters), rows, block_c = out.shape, 4, 32
    order, offsets = group_by_label(labels[None], clusters)
    _sum_by_label_kernel[(triton.cdiv(clusters, block_c), triton.cdiv(M, rows))](
        x,
        order,
        offsets,
        out,
        M,
        clusters,
        x.stride(0),
        out.stride(0),
        ROWS=rows,
        BLOCK_C=block_c,
        BLOCK_J=16,
    )


def shared_linear_cuda(
    x: Tensor, weight: Tensor, factor: Tensor, labels: Tensor | None, bias: Tensor | None, share_input: bool
) -> Tensor:
    """Apply a packed linear layer: `x [..., K]` to `[..., N]` in the dtype of `x`, accumulated in float32.

    Outputs shared: `weight [k + r, K] = [C; V]`, `factor U [N, r]`, `labels [N]`. Inputs shared: `weight [N, k + r]
    = [Cᵀ | U]`, `factor V [r, K]`, `labels [K]`. `labels` is None when k = 0. float64 has no kernel and goes through
    torch's products.
    """
    if x.dtype == torch.float64:
        return _in_double(x, weight, factor, labels, bias, share_input)
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight, factor = weight.contiguous(), factor.contiguous()
    labels = None if labels is None else labels.contiguous()
    outputs = weight.shape[0] if share_input else factor.shape[0]
    out = torch.empty((rows.shape[0], outputs), dtype=x.dtype, device=x.device)
    if out.numel():
        (_input_shared if share_input else _output_shared)(rows, weight, factor, labels, bias, out)
    return out.view(*x.shape[:-1], outputs)


def _output_shared(
    x: Tensor, weight: Tensor, factor: Tensor, labels: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    parts = _skinny(x, weight) if len(x) <= DECODE else torch.mm(x, weight.T)[None]
    _expand(parts, out, factor, labels, bias)


def _input_shared(
    x: Tensor, weight: Tensor, factor: Tensor, labels: Tensor | None, bias: Tensor | None, out: Tensor
) -> None:
    clusters = weight.shape[1] - factor.shape[0]
    reduced = torch.empty((len(x), weight.shape[1]), dtype=x.dtype, device=x.device)  # [s, x Vᵀ]
    if len(x) <= DECODE:
        _expand(_skinny(x, factor, labels, clusters), reduced)
        _expand(_skinny(reduced, weight), out, bias=bias)
        return
    if labels is not None:
        _sum_by_label(x, labels, reduced[:, :clusters])
    torch.mm(x, factor.T, out=reduced[:, clusters:])
    if bias is None:
        torch.mm(reduced, weight.T, out=out)
    else:
        torch.addmm(bias, reduced, weight.T, out=out)


def _in_double(
    x: Tensor, weight: Tensor, factor: Tensor, labels: Tensor | None, bias: Tensor | None, share_input: bool
) -> Tensor:
    """The packed matrix restored and multiplied: for gradient checks, where only digits count."""
    if share_input:
        clusters = weight.shape[1] - factor.shape[0]
        dense = weight[:, clusters:] @ factor
        shared = None if labels is None else weight[:, :clusters].index_select(1, labels.int())
    else:
        clusters = weight.shape[0] - factor.shape[1]
        dense = factor @ weight[clusters:]
        shared = None if labels is None else weight[:clusters].index_select(0, labels.int())
    return torch.nn.functional.linear(x, dense if shared is None else dense + shared, bias)
