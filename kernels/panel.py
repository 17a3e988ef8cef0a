"""A panel of columns, each rounded or set to zero in its turn while those behind it compensate.

p columns, R rows. A program holds the whole panel of BLOCK_R rows in registers; a step takes one column out of it by a
mask, and the factor's row of that column.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R, WARPS = 4, 1  # rows of a program: its sums stay within a warp


@triton.jit
def _nearest(values, low, high):
    """The nearest code: 1.5 * 2^23, added to a float below 2^22 and taken away, leaves an integer, ties to even."""
    held = tl.minimum(tl.maximum(values, low * 1.0), high * 1.0)
    return (held + 12582912.0) - 12582912.0


@triton.jit
def _column(panel, here):
    """The column of `panel [BLOCK_R, p]` where `here [p]` is true."""
    return tl.sum(tl.where(here[None, :], panel, 0.0), axis=1)


@triton.jit
def _chosen_scale(
    panel, inside, reductions_ptr, tries, low, high, most, least, dtype: tl.constexpr, ENDS: tl.constexpr
):
    """Each row's scale, for its columns `inside`, that loses least by plain rounding, as `dtype` can hold it."""
    group = tl.where(inside[None, :], panel, 0.0)
    top, bottom = tl.max(group, axis=1), tl.min(group, axis=1)
    size = tl.maximum(top, -bottom)
    # Of two extremes of one magnitude the one that comes first counts.
    offs = tl.arange(0, panel.shape[1])[None, :]
    first_top = tl.min(tl.where(group == size[:, None], offs, panel.shape[1]), axis=1)
    first_bottom = tl.min(tl.where(group == -size[:, None], offs, panel.shape[1]), axis=1)
    extreme = tl.where(first_top <= first_bottom, size, -size)
    unit = tl.where(size == 0, 1.0, size)
    relative = tl.where(inside[None, :], group / unit[:, None], 0.0)
    best, lowest = unit, tl.full(unit.shape, float("inf"), tl.float32)
    for end in tl.static_range(ENDS):
        whole = tl.div_rn(unit, high * 1.0) if end == 0 else tl.div_rn(extreme, low * 1.0)
        for i in range(tries):
            wanted = tl.load(reductions_ptr + i) * whole
            held = tl.minimum(tl.maximum(wanted, -most), most).to(dtype).to(tl.float32)
            scale = tl.where(held == 0, least, held)
            step = tl.div_rn(scale, unit)
            rest = relative - _nearest(relative / step[:, None], low, high) * step[:, None]
            error = tl.sum(rest * rest, axis=1)
            best = tl.where(error < lowest, scale, best)
            lowest = tl.minimum(error, lowest)
    return best


@triton.jit
def _round_kernel(
    values_ptr,  # [p, R]
    factor_ptr,  # [p, p]
    scales_ptr,  # [p, R], or with CHOOSE [groups, R], written
    reductions_ptr,
    codes_ptr,  # [p, R]
    lost_ptr,  # [p, R]
    p,
    R,
    stride_f,
    group,
    tries,
    low,
    high,
    most,
    least,
    dtype: tl.constexpr,
    CHOOSE: tl.constexpr,
    ENDS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tl.arange(0, BLOCK_P)
    mask = (rows < R)[:, None] & (offs < p)[None, :]
    at = offs[None, :].to(tl.int64) * R + rows[:, None]
    panel = tl.load(values_ptr + at, mask=mask, other=0.0)
    codes = tl.full((BLOCK_R, BLOCK_P), 0, tl.float32)
    lost = tl.full((BLOCK_R, BLOCK_P), 0, tl.float32)
    scale = tl.full((BLOCK_R,), 1, tl.float32)
    for j in range(p):
        if CHOOSE:
            if j % group == 0:
                inside = (offs >= j) & (offs < j + group) & (offs < p)
                scale = _chosen_scale(panel, inside, reductions_ptr, tries, low, high, most, least, dtype, ENDS)
                tl.store(scales_ptr + (j // group).to(tl.int64) * R + rows, scale, mask=rows < R)
        else:
            scale = tl.load(scales_ptr + tl.cast(j, tl.int64) * R + rows, mask=rows < R, other=1.0)
        here = offs == j
        value = _column(panel, here)
        code = _nearest(tl.div_rn(value, scale), low, high)
        own = tl.load(factor_ptr + tl.cast(j, tl.int64) * (stride_f + 1))
        error = tl.div_rn(value - code * scale, own)
        behind = tl.load(factor_ptr + tl.cast(j, tl.int64) * stride_f + offs, mask=(offs > j) & (offs < p), other=0.0)
        panel -= error[:, None] * behind[None, :]
        codes = tl.where(here[None, :], code[:, None], codes)
        lost = tl.where(here[None, :], error[:, None], lost)
    tl.store(codes_ptr + at, codes.to(tl.int8), mask=mask)
    tl.store(lost_ptr + at, lost, mask=mask)


@triton.jit
def _prune_kernel(
    values_ptr,  # [p, R]
    factor_ptr,  # [p, p]
    gone_ptr,  # [p, R]
    kept_ptr,  # [p, R]
    lost_ptr,  # [p, R]
    p,
    R,
    stride_f,
    keep,
    size,
    GIVEN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs = tl.arange(0, BLOCK_P)
    mask = (rows < R)[:, None] & (offs < p)[None, :]
    at = offs[None, :].to(tl.int64) * R + rows[:, None]
    panel = tl.load(values_ptr + at, mask=mask, other=0.0)
    own = tl.load(factor_ptr + offs.to(tl.int64) * (stride_f + 1), mask=offs < p, other=1.0)
    gone = tl.full((BLOCK_R, BLOCK_P), 0, tl.float32)
    if GIVEN:
        gone = tl.load(gone_ptr + at, mask=mask, other=0).to(tl.float32)
    lost = tl.full((BLOCK_R, BLOCK_P), 0, tl.float32)
    for j in range(p):
        if not GIVEN and j % size == 0:
            costs = tl.div_rn(panel * panel, tl.broadcast_to((own * own)[None, :], panel.shape))
            before = tl.full((BLOCK_R, BLOCK_P), 0, tl.int32)
            for b in range(size):
                cost = _column(costs, offs == j + b)[:, None]
                cheaper = tl.where((offs > j + b)[None, :], cost <= costs, cost < costs)
                before += cheaper.to(tl.int32)
            inside = ((offs >= j) & (offs < j + size))[None, :]
            gone = tl.where(inside, (before < size - keep).to(tl.float32), gone)
        here = offs == j
        zero = _column(gone, here)
        error = tl.div_rn(_column(panel, here) * zero, tl.broadcast_to(tl.sum(tl.where(here, own, 0.0)), zero.shape))
        behind = tl.load(factor_ptr + tl.cast(j, tl.int64) * stride_f + offs, mask=(offs > j) & (offs < p), other=0.0)
        panel = tl.where(here[None, :] & (zero != 0)[:, None], 0.0, panel - error[:, None] * behind[None, :])
        lost = tl.where(here[None, :], error[:, None], lost)
    tl.store(kept_ptr + at, panel, mask=mask)
    tl.store(lost_ptr + at, lost, mask=mask)


TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@functools.lru_cache
def _on(device: torch.device, reductions: tuple[float, ...]) -> Tensor:
    return torch.tensor(reductions, dtype=torch.float32).to(device)


def round_panel_cuda(
    values: Tensor,
    factor: Tensor,
    scales: Tensor | None,
    low: int,
    high: int,
    group: int,
    reductions: list[float],
    dtype: torch.dtype,
    most: float,
    least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `pycompress.ops.round_panel`, in float32; `most` and `least` are what scales of `dtype` are held within."""
    values, factor = values.float().contiguous(), factor.float().contiguous()
    p, rows = values.shape
    codes = torch.empty((p, rows), dtype=torch.int8, device=values.device)
    lost = torch.empty((p, rows), dtype=torch.float32, device=values.device)
    groups = (triton.cdiv(p, group), rows) if scales is None else (0,)
    made = torch.empty(groups, dtype=torch.float32, device=values.device)
    if values.numel():
        _round_kernel[(triton.cdiv(rows, BLOCK_R),)](
            values,
            factor,
            made if scales is None else scales.float().contiguous(),
            _on(values.device, tuple(reductions)),
            codes,
            lost,
            p,
            rows,
            p,
            group,
            len(reductions),
            low,
            high,
            most,
            least,
            dtype=TRITON_TYPES[dtype],
            CHOOSE=scales is None,
            ENDS=1 if low == -high else 2,
            BLOCK_R=BLOCK_R,
            BLOCK_P=max(16, triton.next_power_of_2(p)),
            num_warps=WARPS,
        )
    return codes, lost, made


def prune_panel_cuda(
    values: Tensor, factor: Tensor, gone: Tensor | None, keep: int, size: int
) -> tuple[Tensor, Tensor]:
    """As `pycompress.ops.prune_panel`, in float32."""
    values, factor = values.float().contiguous(), factor.float().contiguous()
    p, rows = values.shape
    kept, lost = (torch.empty((p, rows), dtype=torch.float32, device=values.device) for _ in range(2))
    if values.numel():
        _prune_kernel[(triton.cdiv(rows, BLOCK_R),)](
            values,
            factor,
            values if gone is None else gone.contiguous().view(torch.uint8),
            kept,
            lost,
            p,
            rows,
            p,
            keep,
            size,
            GIVEN=gone is not None,
            BLOCK_R=BLOCK_R,
            BLOCK_P=max(16, triton.next_power_of_2(p)),
            num_warps=WARPS,
        )
    return kept, lost
