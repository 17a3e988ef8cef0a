"""Rows grouped by label: their order, and sums over each group taken in that order, so that bits repeat.

B matrices, n rows, d columns, k groups. Both kernels give one program a group and a range of columns: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_J = 16


@triton.jit
def _group_kernel(
    labels_ptr,  # [B, n]
    order_ptr,  # [B, n]
    offsets_ptr,  # [B, k + 1]
    n,
    k,
    BLOCK_N: tl.constexpr,
):
    """One group: count the labels before it, then write its members behind theirs, by index."""
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    labels_ptr += batch * n
    order_ptr += batch * n
    end = tl.full((), 0, tl.int32)
    for first in range(0, n, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        labels = tl.load(labels_ptr + offs_n, mask=offs_n < n, other=k)
        end += tl.sum((labels < group).to(tl.int32), axis=0)
    tl.store(offsets_ptr + batch * (k + 1) + group, end)
    for first in range(0, n, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        own = tl.load(labels_ptr + offs_n, mask=offs_n < n, other=k) == group
        rank = tl.cumsum(own.to(tl.int32), axis=0)
        tl.store(order_ptr + end + rank - 1, offs_n, mask=own)
        end += tl.sum(own.to(tl.int32), axis=0)
    if group == k - 1:
        tl.store(offsets_ptr + batch * (k + 1) + k, end)


def group_by_label(labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Row indices sorted by label, ties by index, and where each label starts.

    `labels [B, n]` below `clusters`. Gives `order [B, n]` and `offsets [B, clusters + 1]`, int32.
    """
    batch, n = labels.shape
    order = torch.empty((batch, n), dtype=torch.int32, device=labels.device)
    offsets = torch.empty((batch, clusters + 1), dtype=torch.int32, device=labels.device)
    block = min(2048, triton.next_power_of_2(n))
    _group_kernel[(clusters, batch)](labels.contiguous(), order, offsets, n, clusters, BLOCK_N=block)
    return order, offsets


@triton.jit
def _segment_mean_kernel(
    x_ptr,  # [B, n, d]
    weights_ptr,  # [B, n]
    order_ptr,
    offsets_ptr,
    out_ptr,  # [B, k, d]
    n,
    d,
    k,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    start = tl.load(offsets_ptr + batch * (k + 1) + group)
    stop = tl.load(offsets_ptr + batch * (k + 1) + group + 1)
    total = tl.full((BLOCK_J,), 0, x_ptr.dtype.element_ty)
    acc = tl.full((BLOCK_D,), 0, x_ptr.dtype.element_ty)
    for first in range(start, stop, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        mask_j = offs_j < stop
        rows = tl.load(order_ptr + batch * n + offs_j, mask=mask_j, other=0).to(tl.int64)
        x = tl.load(
            x_ptr + (batch * n + rows[:, None]) * d + offs_d[None, :], mask=mask_j[:, None] & mask_d[None, :], other=0.0
        )
        weight = mask_j.to(x.dtype)
        if HAS_WEIGHTS:
            weight *= tl.load(weights_ptr + batch * n + rows, mask=mask_j, other=0.0)
        total += weight
        acc += tl.sum(x * weight[:, None], axis=0)
    mass = tl.sum(total, axis=0)
    tl.store(
        out_ptr + (batch * k + group) * d + offs_d,
        tl.where(mass > 0, acc / tl.where(mass > 0, mass, 1), 0),
        mask=mask_d,
    )


def segment_mean(x: Tensor, order: Tensor, offsets: Tensor, weights: Tensor | None = None) -> Tensor:
    """Mean of the rows of each group: `x [B, n, d]` to `[B, k, d]`, zero where a group has no weight.

    `weights [B, n]` of the dtype of `x`, float32 or float64; `order` and `offsets` as `group_by_label` gives them.
    """
    x = x.contiguous()
    batch, n, d = x.shape
    clusters = offsets.shape[1] - 1
    out = torch.empty((batch, clusters, d), dtype=x.dtype, device=x.device)
    block = min(256, triton.next_power_of_2(d))
    _segment_mean_kernel[(triton.cdiv(d, block), clusters, batch)](
        x,
        x if weights is None else weights.contiguous(),
        order,
        offsets,
        out,
        n,
        d,
        clusters,
        HAS_WEIGHTS=weights is not None,
        BLOCK_J=BLOCK_J,
        BLOCK_D=block,
    )
    return out


@triton.jit
def _segment_centre_kernel(
    x_ptr,  # [B, n, d], read and written
    order_ptr,
    offsets_ptr,
    n,
    d,
    k,
    BLOCK_J: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < d
    start = tl.load(offsets_ptr + batch * (k + 1) + group)
    stop = tl.load(offsets_ptr + batch * (k + 1) + group + 1)
    acc = tl.full((BLOCK_D,), 0, x_ptr.dtype.element_ty)
    for first in range(start, stop, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        mask = (offs_j < stop)[:, None] & mask_d[None, :]
        rows = tl.load(order_ptr + batch * n + offs_j, mask=offs_j < stop, other=0).to(tl.int64)
        acc += tl.sum(tl.load(x_ptr + (batch * n + rows[:, None]) * d + offs_d[None, :], mask=mask, other=0.0), axis=0)
    mean = acc / tl.maximum(stop - start, 1).to(acc.dtype)
    for first in range(start, stop, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        mask = (offs_j < stop)[:, None] & mask_d[None, :]
        rows = tl.load(order_ptr + batch * n + offs_j, mask=offs_j < stop, other=0).to(tl.int64)
        tile = x_ptr + (batch * n + rows[:, None]) * d + offs_d[None, :]
        tl.store(tile, tl.load(tile, mask=mask, other=0.0) - mean[None, :], mask=mask)


def segment_centre_(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Subtract from each row of `x [B, n, d]` the mean of its group, in place; `x` must be contiguous."""
    if not x.is_contiguous():
        raise ValueError(f"segment_centre_ works in place and needs a contiguous x, got strides {x.stride()}")
    batch, n, d = x.shape
    clusters = offsets.shape[1] - 1
    block = min(128, triton.next_power_of_2(d))
    _segment_centre_kernel[(triton.cdiv(d, block), clusters, batch)](
        x, order, offsets, n, d, clusters, BLOCK_J=BLOCK_J, BLOCK_D=block
    )
    return x
