"""Linear layer with shared channels on the GPU: a skinny product, a gather by label and a rank-r product.

M tokens, N outputs, K inputs, k clusters, r rank; `S = k + r` rows of the stacked matrix. Up to `DECODE` tokens the
skinny products are split over K, their partial sums lie in a float32 workspace and are added in a fixed order. Above it
they are cuBLAS's. Pivots, whose part of the factor is the identity, are handled where the factor is read.

Codes are dequantized where a few tokens read them. For many tokens they are dequantized once, into a workspace, for
cuBLAS: a fused product would do so again for each tile of tokens, and reaches less of the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycompress.kernels.codes import columns_of, dequantized, halves_of, load_codes, storage_of, values_of, width_of
from pycompress.kernels.segments import group_by_label
from pycompress.kernels.skinny import dependent, precision, skinny
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DECODE = 64


@triton.jit
def _summed(ptr, mask, splits, stride_split):
    """Parts of a split product, added from the first to the last."""
    acc = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    for split in range(1, splits):
        acc += tl.load(ptr + split * stride_split, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _factor_product(
    acc,
    low_ptr,  # [M, r] of the first part, at the rows of the tile
    factor_ptr,
    scales_ptr,
    factor_row,
    mask_f,
    mask_m,
    r,
    splits,
    stride_split,
    dtype: tl.constexpr,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc` plus the low-rank part times rows `factor_row` of the factor, in `dtype` where there are more tokens."""
    for first in range(0, r, BLOCK_R):
        codes, scales = load_codes(factor_ptr, scales_ptr, factor_row, mask_f, first, r, STORAGE, BLOCK_R)
        for half in tl.static_range(HALVES):
            offs_r = columns_of(first, half, STORAGE, BLOCK_R)
            mask_r = mask_m[:, None] & (offs_r < r)[None, :]
            low = _summed(low_ptr + offs_r[None, :], mask_r, splits, stride_split)
            factor = values_of(codes, scales, half, STORAGE)
            if BLOCK_M == 1:
                acc += tl.sum(factor.to(tl.float32) * low, axis=1)[None, :]
            else:
                factor = factor.to(dtype)
                acc = tl.dot(low.to(dtype), tl.trans(factor), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _expand_kernel(
    parts_ptr,  # [splits, M, k + r]
    factor_ptr,  # [N - pivots, r]
    scales_ptr,
    labels_ptr,  # [N]
    order_ptr,  # [N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    N,
    k,
    r,
    pivots,
    splits,
    stride_split,
    stride_pm,
    stride_om,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    GATHER: tl.constexpr,
    ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the parts of a split product, then gather by label, multiply the rest by the factor, add the bias.

    GATHER: "labels", "none", or "all" when the parts are the output itself. ORDER: "none" when output n is at position
    n; "scatter" when `order` gives the channel of each position, "gather" when it gives the position of each channel.
    Positions below `pivots` have the low-rank part itself, the others the factor's rows in turn.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    position, factor_row, mask_f = offs_n, offs_n, mask_n
    if ORDER == "gather":
        position = tl.load(order_ptr + offs_n, mask=mask_n, other=0).to(tl.int32)
    elif ORDER == "scatter":
        offs_n = tl.load(order_ptr + offs_n, mask=mask_n, other=0).to(tl.int32)
    if ORDER != "none":
        factor_row = position - pivots
        mask_f = mask_n & (factor_row >= 0)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    rows = parts_ptr + offs_m[:, None].to(tl.int64) * stride_pm
    mask = mask_m[:, None] & mask_n[None, :]
    acc = tl.full((BLOCK_M, BLOCK_N), 0, tl.float32)
    if GATHER != "all":
        acc = _factor_product(
            acc,
            rows + k,
            factor_ptr,
            scales_ptr,
            factor_row,
            mask_f,
            mask_m,
            r,
            splits,
            stride_split,
            out_ptr.dtype.element_ty,
            STORAGE,
            HALVES,
            BLOCK_M,
            BLOCK_R,
            PRECISION,
        )
    if ORDER != "none":
        acc += _summed(rows + k + position[None, :], mask & (position < pivots)[None, :], splits, stride_split)
    if GATHER == "labels":
        columns = tl.load(labels_ptr + offs_n, mask=mask_n, other=0).to(tl.int32)
        acc += _summed(rows + columns[None, :], mask, splits, stride_split)
    elif GATHER == "all":
        acc += _summed(rows + offs_n[None, :], mask, splits, stride_split)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _invert_kernel(channels_ptr, out_ptr, N, BLOCK_N: tl.constexpr):
    """Position of each channel: `out[channels[p]] = p`."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channels = tl.load(channels_ptr + offs_n, mask=offs_n < N, other=0).to(tl.int32)
    tl.store(out_ptr + channels, offs_n, mask=offs_n < N)


def _inverted(channels: Tensor) -> Tensor:
    positions = torch.empty(len(channels), dtype=torch.int32, device=channels.device)
    _invert_kernel[(triton.cdiv(len(channels), 256),)](channels, positions, len(channels), BLOCK_N=256)
    return positions


def _expand(
    parts: Tensor,
    out: Tensor,
    factor: Tensor | None = None,
    scales: Tensor | None = None,
    labels: Tensor | None = None,
    channels: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum `parts [splits, M, k + r]` and write `[M, N]` into `out`; without a factor the parts are the output's own."""
    (M, N), splits = out.shape, parts.shape[0]
    rank, storage = (0, "float") if factor is None else (width_of(factor), storage_of(factor))
    decode = M <= DECODE
    block_m = (1 if M == 1 else max(16, triton.next_power_of_2(M))) if decode else 64
    block_n = 128 if out.element_size() == 2 and not decode else 64
    # A few tokens' outputs are cheap to scatter; for many, whole rows of the factor are gathered instead.
    order = channels if decode or channels is None else _inverted(channels)
    _expand_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        parts,
        *(parts if t is None else t for t in (factor, scales, labels, order, bias)),
        out,
        M,
        N,
        parts.shape[2] - rank,
        rank,
        0 if order is None else rank,
        splits,
        parts.stride(0),
        parts.stride(1),
        out.stride(0),
        STORAGE=storage,
        HALVES=halves_of(storage),
        GATHER="labels" if labels is not None else "all" if factor is None else "none",
        ORDER="none" if order is None else "scatter" if decode else "gather",
        HAS_BIAS=bias is not None,
        PDL=dependent(out.device),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=64 if out.element_size() == 2 or storage == "int4" else 16,
        PRECISION=precision(out.dtype),
        num_warps=4 if block_m <= 16 else 8,
        launch_pdl=dependent(out.device),
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
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    weight_scales: Tensor | None,
    factor_scales: Tensor | None,
    share_input: bool,
) -> Tensor:
    """Apply a packed linear layer: `x [..., K]` to `[..., N]` in the dtype of `x`, accumulated in float32.

    Outputs shared: `weight [k + r, K] = [C; V]`, `factor U [N, r]`, `labels [N]`. Inputs shared: `weight [N, k + r]
    = [Cᵀ | U]`, `factor V [r, K]`, `labels [K]`. `labels` is None when k = 0. `channels`, a permutation of the N or K
    channels with r pivots first, leaves their identity out of the factor: `U [N - r, r]`, `V [r, K - r]`. Indices are
    int16 or int32. `weight` and `factor` are in the dtype of `x`, or both int8 or both int4 codes with scales in that
    dtype. float64 has no kernel and goes through torch's products.
    """
    rows = x.reshape(-1, x.shape[-1])
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    weight, factor = weight.contiguous(), factor.contiguous()
    labels, channels, bias, weight_scales, factor_scales = (
        t if t is None else t.contiguous() for t in (labels, channels, bias, weight_scales, factor_scales)
    )
    if weight_scales is not None and (len(rows) > DECODE or x.dtype == torch.float64):
        assert factor_scales is not None
        weight, factor = dequantized(weight, weight_scales), dequantized(factor, factor_scales)
        weight_scales = factor_scales = None
    if x.dtype == torch.float64:
        return _in_double(x, weight, factor, labels, channels, bias, share_input)
    outputs = weight.shape[0] if share_input else factor.shape[0] if channels is None else channels.shape[0]
    out = torch.empty((rows.shape[0], outputs), dtype=x.dtype, device=x.device)
    if out.numel():
        form = _input_shared if share_input else _output_shared
        form(rows, weight, factor, weight_scales, factor_scales, labels, channels, bias, out)
    return out.view(*x.shape[:-1], outputs)


def _output_shared(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    weight_scales: Tensor | None,
    factor_scales: Tensor | None,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    parts = skinny(x, weight, weight_scales) if len(x) <= DECODE else torch.mm(x, weight.T)[None]
    _expand(parts, out, factor, factor_scales, labels, channels, bias)


def _input_shared(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    weight_scales: Tensor | None,
    factor_scales: Tensor | None,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    rank, clusters = len(factor), width_of(weight) - len(factor)
    reduced = torch.empty((len(x), clusters + rank), dtype=x.dtype, device=x.device)  # [s, x Vᵀ]
    if len(x) <= DECODE:
        _expand(skinny(x, factor, factor_scales, labels, channels, clusters), reduced)
        _expand(skinny(reduced, weight, weight_scales), out, bias=bias)
        return
    if labels is not None:
        _sum_by_label(x, labels, reduced[:, :clusters])
    if channels is None:
        torch.mm(x, factor.T, out=reduced[:, clusters:])
    else:
        ordered = x.index_select(1, channels.int())
        torch.addmm(ordered[:, :rank], ordered[:, rank:], factor.T, out=reduced[:, clusters:])
    if bias is None:
        torch.mm(reduced, weight.T, out=out)
    else:
        torch.addmm(bias, reduced, weight.T, out=out)


def _in_double(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    share_input: bool,
) -> Tensor:
    """The packed matrix restored and multiplied: for gradient checks, where only digits count."""
    along = 1 if share_input else 0
    rank = factor.shape[1 - along]
    clusters = weight.shape[along] - rank
    if channels is not None:
        whole = torch.cat([torch.eye(rank, dtype=factor.dtype, device=factor.device), factor], dim=along)
        factor = torch.empty_like(whole).index_copy_(along, channels.long(), whole)
    centroids, basis = weight.split([clusters, rank], dim=along)
    dense = basis @ factor if share_input else factor @ basis
    if labels is not None:
        dense = dense + centroids.index_select(along, labels.int())
    return torch.nn.functional.linear(x, dense, bias)
