"""Rounding a matrix to the codes of `pycompress.storage` so that what it multiplies feels least of it.

Columns are rounded one after another, and what each loses is made up for by those that follow, in the metric of the
inputs. Reference: arXiv:2210.17323 (GPTQ), algorithm 1; scales are chosen over a few reductions of the largest value.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pycompress import storage
from pycompress.formats import SharedChannels, whole_factor

DAMPING = 1e-2
RIDGE = 1e-6
# Shares of a group's largest magnitude to try as the end of the scale.
REDUCTIONS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}
# Columns whose corrections are applied to the others together.
PANEL = 128


def round_to(values: Tensor, kind: str, metric: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes and scales (in `dtype`) of `values [rows, n]`, whose error counts in `metric [n, n]` (None: identity)."""
    rows, n = values.shape
    storage.stored_shape(rows, n, kind)
    rest = values.float().clone()
    spread = None if metric is None else compensating(metric)
    group = n if kind == "int8" else storage.GROUP
    codes = torch.empty((rows, n), dtype=torch.int8, device=values.device)
    scales = rest.new_empty(storage.scales_shape(rows, n, kind))
    for first in range(0, n, PANEL):
        panel = slice(first, min(first + PANEL, n))
        lost = torch.zeros_like(rest[:, panel])
        for column in range(panel.start, panel.stop):
            if column % group == 0:
                scales[:, column // group] = _scale(rest[:, column : column + group], kind, dtype)
            scale = scales[:, column // group]
            codes[:, column] = code = (rest[:, column] / scale).round().clamp(*storage.RANGE[kind])
            if spread is None:
                continue
            error = (rest[:, column] - code * scale) / spread[column, column]
            rest[:, column : panel.stop] -= error[:, None] * spread[column, column : panel.stop]
            lost[:, column - first] = error
        if spread is not None:
            rest[:, panel.stop :] -= lost @ spread[panel, panel.stop :]
    return storage.pack(codes, kind), scales.to(dtype)


def compensating(metric: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped metric: row i says how the columns after i make up for i."""
    wide = metric.double()
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = wide + DAMPING * mean * torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True).float()


def _scale(group: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The scale of each row of a group that loses least by plain rounding, as `dtype` can hold it."""
    largest = group.abs().amax(1)
    best, least = None, None
    for reduction in REDUCTIONS[kind]:
        scale = (reduction * largest / storage.RANGE[kind][1]).to(dtype).float()
        scale = torch.where(scale > 0, scale, 1.0)
        codes = (group / scale[:, None]).round().clamp(*storage.RANGE[kind])
        error = (group - codes * scale[:, None]).square().sum(1)
        if best is None or least is None:
            best, least = scale, error
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert best is not None
    return best


def round_shared(
    packed: SharedChannels, weight: Tensor, metric: Tensor | None, kind: str, dtype: torch.dtype
) -> SharedChannels:
    """Round a packed weight that is still in float32 to codes.

    What reads the inputs is rounded first, in their metric. The other part is fitted again, by least squares, to what
    that gives, and rounded in the metric of what it reads.
    """
    if packed.share == "output":
        return _round_output(packed, weight, metric, kind, dtype)
    return _round_input(packed, weight, metric, kind, dtype)


def _round_output(
    packed: SharedChannels, weight: Tensor, metric: Tensor | None, kind: str, dtype: torch.dtype
) -> SharedChannels:
    rank, k = packed.rank, packed.clusters
    stacked, stacked_scales = round_to(packed.weight, kind, metric, dtype)
    wide = storage.widen(stacked, stacked_scales)
    residual = weight if packed.labels is None else weight - wide[:k][packed.labels.long()]
    if packed.channels is not None:
        residual = residual[packed.channels[rank:].long()]
    factor, inner = _fit(residual, wide[k:], metric)
    codes, scales = round_to(factor, kind, inner, dtype)
    return replace(packed, weight=stacked, weight_scales=stacked_scales, factor=codes, factor_scales=scales)


def _round_input(
    packed: SharedChannels, weight: Tensor, metric: Tensor | None, kind: str, dtype: torch.dtype
) -> SharedChannels:
    own = metric
    if metric is not None and packed.channels is not None:
        rest = packed.channels[packed.rank :].long()
        own = metric[rest][:, rest]
    codes, scales = round_to(packed.factor, kind, own, dtype)
    reduced = whole_factor(storage.widen(codes, scales), packed.channels, "input")  # [r, K]
    if packed.labels is not None:
        member = torch.nn.functional.one_hot(packed.labels.long(), packed.clusters)
        reduced = torch.cat([member.T.to(reduced.dtype), reduced])
    stacked, inner = _fit(weight, reduced, metric)
    stacked, stacked_scales = round_to(stacked, kind, inner, dtype)
    return replace(packed, weight=stacked, weight_scales=stacked_scales, factor=codes, factor_scales=scales)


def _fit(target: Tensor, basis: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """`A [n, r]` that brings `A basis [r, K]` nearest to `target [n, K]` in the metric, and `basis H basisᵀ`."""
    weighted = (basis if metric is None else basis @ metric).double()
    inner = weighted @ basis.double().T
    ridge = RIDGE * inner.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    damped = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return torch.linalg.solve(damped, weighted @ target.double().T).T.float(), inner
