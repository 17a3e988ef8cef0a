"""Linear layer with shared channels on the GPU: a product with few rows, a gather by label and a rank-r product.

M tokens, N outputs, K inputs, k clusters, r rank; `S = k + r` rows of the stacked matrix. What lies between the two
products is transposed, `[splits, S, M]`: the tokens of a row, which a gather by label reads, are then side by side. The
first product is split over K in a float32 workspace for up to `FEW` tokens, of codes up to `DECODE`; above that it is
cuBLAS's. Inputs that share a centroid are summed by label, in the order of their labels, before the product. Pivots,
whose part of the factor is the identity, are handled where the factor is read.

Codes are dequantized where a few tokens read them. For many tokens they are dequantized once, into a workspace, for
cuBLAS: a fused product would do so again for each tile of tokens, and reaches less of the chip.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from pycompress.kernels.codes import columns_of, dequantized, halves_of, load_codes, storage_of, values_of, width_of
from pycompress.kernels.derived import derived
from pycompress.kernels.segments import group_by_label
from pycompress.kernels.skinny import dependent, few_product, gather, precision, row_product, settled
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

DECODE = 64
ORDERED = 512  # tokens up to which inputs in the factor's order are cheaper than a factor in the inputs' order
FEW = 16  # tokens for which a split product is faster than cuBLAS on floats


@triton.jit
def _summed(ptr, mask, stride_split, SPLITS: tl.constexpr):
    """Parts of a split product, added from the first to the last, all of them in flight."""
    acc = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        acc += tl.load(ptr + split * stride_split, mask=mask, other=0.0).to(tl.float32)
    return acc


@triton.jit
def _times_low(
    acc,  # [BLOCK_N, BLOCK_M]
    codes,
    scales,
    parts,  # at the tokens of the tile
    first,
    k,
    r,
    mask_m,
    stride_split,
    stride_ps,
    dtype: tl.constexpr,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc` plus a tile of the factor times the low-rank part, in `dtype` where there are more tokens."""
    for half in tl.static_range(HALVES):
        offs_r = columns_of(first, half, STORAGE, BLOCK_R)
        mask = (offs_r < r)[:, None] & mask_m[None, :]
        low = _summed(parts + (k + offs_r)[:, None].to(tl.int64) * stride_ps, mask, stride_split, SPLITS)
        factor = values_of(codes, scales, half, STORAGE)
        if acc.shape[1] == 1:
            acc += tl.sum(factor.to(tl.float32) * tl.trans(low), axis=1)[:, None]
        else:
            acc = tl.dot(factor.to(dtype), low.to(dtype), acc, input_precision=PRECISION)
    return acc


@triton.jit
def _expand_kernel(
    parts_ptr,  # [splits, k + r, at least M]
    factor_ptr,  # [N - pivots, r]
    scales_ptr,
    labels_ptr,  # [N]
    positions_ptr,  # [N]
    bias_ptr,  # [N]
    out_ptr,  # [M, N]
    M,
    N,
    k,
    r,
    pivots,
    stride_split,
    stride_ps,
    stride_om,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
    PIVOTED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Sum the parts of a split product, then gather by label, multiply the rest by the factor, add the bias.

    GATHER: "labels", "none", or "all" when the parts are the output itself. PIVOTED: `positions` gives the place of
    each output; those below `pivots` have the low-rank part itself, the others the factor's rows in turn. EARLY: what
    the layer stores is read before the kernel before is waited for.
    """
    if PDL:
        gdc_launch_dependents()
    if PDL and not EARLY:
        gdc_wait()
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    factor_row, mask_f, position = offs_n, mask_n, offs_n
    if PIVOTED:
        position = tl.load(positions_ptr + offs_n, mask=mask_n, other=0).to(tl.int32)
        factor_row = position - pivots
        mask_f = mask_n & (factor_row >= 0)
    gathered = position
    if GATHER == "labels":
        gathered = tl.load(labels_ptr + offs_n, mask=mask_n, other=0).to(tl.int32)
    codes, scales = 0, 0
    if GATHER != "all":
        codes, scales = load_codes(factor_ptr, scales_ptr, factor_row, mask_f, 0, r, STORAGE, BLOCK_R)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    if PDL and EARLY:
        gdc_wait()
    parts = parts_ptr + offs_m[None, :]
    mask = mask_n[:, None] & mask_m[None, :]
    acc = tl.full((BLOCK_N, BLOCK_M), 0, tl.float32)
    if GATHER != "all":
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        for first in range(0, r, BLOCK_R):
            if first > 0:
                codes, scales = load_codes(factor_ptr, scales_ptr, factor_row, mask_f, first, r, STORAGE, BLOCK_R)
            acc = _times_low(
                acc,
                codes,
                scales,
                parts,
                first,
                k,
                r,
                mask_m,
                stride_split,
                stride_ps,
                dtype,
                STORAGE,
                HALVES,
                SPLITS,
                BLOCK_R,
                PRECISION,
            )
        if PIVOTED:
            rows = parts + (k + position)[:, None].to(tl.int64) * stride_ps
            acc += _summed(rows, mask & (position < pivots)[:, None], stride_split, SPLITS)
    if GATHER != "none":
        acc += _summed(parts + gathered[:, None].to(tl.int64) * stride_ps, mask, stride_split, SPLITS)
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out = out_ptr + offs_m[:, None].to(tl.int64) * stride_om + offs_n[None, :]
    tl.store(out, tl.trans(acc.to(out_ptr.dtype.element_ty)), mask=tl.trans(mask))


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


def _expand_tile(M: int, itemsize: int) -> tuple[int, int, int]:
    """BLOCK_M, BLOCK_N and warps."""
    if M == 1:
        return 1, 32, 4
    if M <= 16:
        return 16, 64, 8
    return min(64, triton.next_power_of_2(M)), 64, 4 if itemsize == 2 and M > DECODE else 8


def _expand(
    parts: Tensor,
    out: Tensor,
    factor: Tensor | None = None,
    scales: Tensor | None = None,
    labels: Tensor | None = None,
    channels: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Sum `parts [splits, k + r, M]` and write `[M, N]` into `out`.

    Without a factor the parts are the output's own, in the order of `channels` where there are channels.
    """
    (M, N), splits = out.shape, parts.shape[0]
    rank, storage = (0, "float") if factor is None else (width_of(factor), storage_of(factor))
    block_m, block_n, warps = _expand_tile(M, out.element_size())
    positions = None if channels is None else derived(channels, _inverted)
    _expand_kernel[(triton.cdiv(N, block_n), triton.cdiv(M, block_m))](
        parts,
        *(parts if t is None else t for t in (factor, scales, labels, positions, bias)),
        out,
        M,
        N,
        parts.shape[1] - rank,
        rank,
        0 if channels is None else rank,
        parts.stride(0),
        parts.stride(1),
        out.stride(0),
        STORAGE=storage,
        HALVES=halves_of(storage),
        SPLITS=splits,
        GATHER="labels" if labels is not None else "all" if factor is None else "none",
        PIVOTED=channels is not None,
        HAS_BIAS=bias is not None,
        PDL=dependent(out.device),
        EARLY=dependent(out.device) and settled(factor, labels, channels, bias),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_R=64 if out.element_size() == 2 or storage == "int4" else 16,
        PRECISION=precision(out.dtype),
        num_warps=warps,
        num_stages=1 if M <= DECODE else 3,  # all parts of a split product are in flight already
        launch_pdl=dependent(out.device),
    )
    return out


@triton.jit
def _reduce_kernel(
    x_ptr,  # [K]
    order_ptr,  # [K], columns sorted by label
    offsets_ptr,  # [k + 1]
    factor_ptr,  # [r, K - pivots]
    scales_ptr,
    channels_ptr,  # [K]
    out_ptr,  # [k + r]
    K,
    k,
    r,
    pivots,
    TILES,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    PIVOTED: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token: inputs summed by label in the first TILES programs, times a row of the factor in each other one."""
    if PDL:
        gdc_launch_dependents()
    if PDL and not EARLY:
        gdc_wait()
    pid = tl.program_id(0)
    if pid < TILES:
        offs_c = pid * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_c = offs_c < k
        start = tl.load(offsets_ptr + offs_c, mask=mask_c, other=0)
        size = tl.load(offsets_ptr + offs_c + 1, mask=mask_c, other=0) - start
        longest = tl.max(size, axis=0)
        if PDL and EARLY:
            gdc_wait()
        sums = tl.full((BLOCK_C,), 0, tl.float32)
        for first in range(0, longest, BLOCK_J):
            offs_j = (first + tl.arange(0, BLOCK_J))[None, :]
            mask = offs_j < size[:, None]
            columns = tl.load(order_ptr + start[:, None] + offs_j, mask=mask, other=0)
            sums += tl.sum(tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32), axis=1)
        tl.store(out_ptr + offs_c, sums.to(out_ptr.dtype.element_ty), mask=mask_c)
    else:
        row = pid - TILES + tl.arange(0, 1)
        if PDL and EARLY:
            gdc_wait()
        width = K - pivots
        acc = tl.full((1, BLOCK_K // HALVES), 0, tl.float32)
        for first in range(0, width, BLOCK_K):
            codes, scales = load_codes(factor_ptr, scales_ptr, row, row < r, first, width, STORAGE, BLOCK_K)
            for half in tl.static_range(HALVES):
                offs_k = columns_of(first, half, STORAGE, BLOCK_K)
                mask = offs_k < width
                columns = offs_k
                if PIVOTED:
                    columns = tl.load(channels_ptr + pivots + offs_k, mask=mask, other=0).to(tl.int32)
                x = tl.load(x_ptr + columns, mask=mask, other=0.0).to(tl.float32)
                acc += values_of(codes, scales, half, STORAGE).to(tl.float32) * x[None, :]
        total = tl.sum(acc, axis=1)
        if PIVOTED:
            total += tl.load(x_ptr + tl.load(channels_ptr + row).to(tl.int32)).to(tl.float32)
        tl.store(out_ptr + k + row, total.to(out_ptr.dtype.element_ty))


def _width_of_sums(K: int, clusters: int) -> int:
    """Columns of a label that are read at once."""
    return max(2, min(16, triton.next_power_of_2(triton.cdiv(K, clusters))))


def _reduce_tile(K: int) -> tuple[int, int, int]:
    """Clusters of a program, columns of a tile of the factor, warps."""
    return 32, min(8192, max(64, triton.next_power_of_2(K))), 16


def _reduce_row(
    x: Tensor,
    factor: Tensor,
    scales: Tensor | None,
    labels: Tensor | None,
    channels: Tensor | None,
    clusters: int,
) -> Tensor:
    """`[s, x Vᵀ] [1, k + r]` of one token."""
    rank, storage, K = len(factor), storage_of(factor), x.shape[1]
    block_c, block_k, warps = _reduce_tile(K)
    reduced = torch.empty((1, clusters + rank), dtype=x.dtype, device=x.device)
    tiles = triton.cdiv(clusters, block_c)
    if labels is None:
        order = offsets = torch.zeros(1, dtype=torch.int32, device=x.device)
    else:
        order, offsets = derived(labels, _sorted, clusters)
    _reduce_kernel[(tiles + rank,)](
        x,
        order,
        offsets,
        factor,
        *(x if t is None else t for t in (scales, channels)),
        reduced,
        K,
        clusters,
        rank,
        0 if channels is None else rank,
        tiles,
        STORAGE=storage,
        HALVES=halves_of(storage),
        PIVOTED=channels is not None,
        PDL=dependent(x.device),
        EARLY=dependent(x.device) and settled(labels),
        BLOCK_C=block_c,
        BLOCK_J=_width_of_sums(K, max(clusters, 1)),
        BLOCK_K=block_k,
        num_warps=warps,
        launch_pdl=dependent(x.device),
    )
    return reduced


@triton.jit
def _sum_by_label_kernel(
    x_ptr,  # [M, K]
    order_ptr,  # [K], columns sorted by label
    offsets_ptr,  # [k + 1]
    out_ptr,  # [M, k]
    k,
    stride_xm,
    stride_om,
    BLOCK_C: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """`out[m, c]`: the sum in float32 of the `x[m, j]` whose label is c, in the order of j; a program has one token."""
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < k
    start = tl.load(offsets_ptr + offs_c, mask=mask_c, other=0)
    size = tl.load(offsets_ptr + offs_c + 1, mask=mask_c, other=0) - start
    longest = tl.max(size, axis=0)
    m = tl.program_id(1).to(tl.int64)
    acc = tl.full((BLOCK_C,), 0, tl.float32)
    for first in range(0, longest, BLOCK_J):
        offs_j = (first + tl.arange(0, BLOCK_J))[None, :]
        mask = offs_j < size[:, None]
        columns = tl.load(order_ptr + start[:, None] + offs_j, mask=mask, other=0)
        acc += tl.sum(tl.load(x_ptr + m * stride_xm + columns, mask=mask, other=0.0).to(tl.float32), axis=1)
    tl.store(out_ptr + m * stride_om + offs_c, acc.to(out_ptr.dtype.element_ty), mask=mask_c)


def _sorted(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    order, offsets = group_by_label(labels[None], clusters)
    return order[0], offsets[0]


def _sum_by_label(x: Tensor, labels: Tensor, out: Tensor) -> None:
    """Write into `out [M, k]` the columns of `x [M, K]` summed by label."""
    (M, clusters), block_c = out.shape, 128
    order, offsets = derived(labels, _sorted, clusters)
    _sum_by_label_kernel[(triton.cdiv(clusters, block_c), M)](
        x,
        order,
        offsets,
        out,
        clusters,
        x.stride(0),
        out.stride(0),
        BLOCK_C=block_c,
        BLOCK_J=max(2, _width_of_sums(x.shape[1], clusters) // 2),
        num_warps=4,
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
    # A whole matrix: all channels are pivots.
    whole = channels is not None and labels is None and len(channels) == len(weight)
    if len(x) == 1:
        if whole:
            row_product(x, weight, weight_scales, out, channels, bias)
            return
        parts = row_product(x, weight, weight_scales)
    elif len(x) <= (FEW if weight_scales is None else DECODE):
        parts = few_product(x, weight, weight_scales)
    else:
        parts = torch.mm(weight, x.T)[None]
    if whole:
        _expand(parts, out, channels=channels, bias=bias)
    else:
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
    clusters = width_of(weight) - len(factor)
    if channels is not None and labels is None and len(factor) == len(channels):
        reduced = gather(x, channels)  # a whole matrix: all channels are pivots
    elif len(x) == 1:
        reduced = _reduce_row(x, factor, factor_scales, labels, channels, clusters)
    else:
        factor = factor if factor_scales is None else dequantized(factor, factor_scales)
        reduced = _reduced(x, factor, labels, channels, clusters)
    if len(x) == 1:
        row_product(reduced, weight, weight_scales, out, None, bias)
    elif weight_scales is not None:
        _expand(few_product(reduced, weight, weight_scales), out, bias=bias)
    elif bias is None:
        torch.mm(reduced, weight.T, out=out)
    else:
        torch.addmm(bias, reduced, weight.T, out=out)


def _reduced(x: Tensor, factor: Tensor, labels: Tensor | None, channels: Tensor | None, clusters: int) -> Tensor:
    """`[s, x Vᵀ] [M, k + r]`."""
    rank = len(factor)
    reduced = torch.empty((len(x), clusters + rank), dtype=x.dtype, device=x.device)
    low = reduced[:, clusters:]
    if labels is not None:
        _sum_by_label(x, labels, reduced[:, :clusters])
    if channels is None:
        torch.mm(x, factor.T, out=low)
    elif len(x) <= ORDERED:
        ordered = gather(x, channels)
        torch.addmm(ordered[:, :rank], ordered[:, rank:], factor.T, out=low)
    else:
        identity = torch.eye(rank, dtype=factor.dtype, device=factor.device)
        whole = torch.cat([identity, factor], dim=1).index_select(1, derived(channels, _inverted))
        torch.mm(x, whole.T, out=low)
    return reduced


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
