"""Rounding a matrix to the codes of `pycompress.formats.codes` so that its products change least.

Columns are rounded one after another, those of most energy first, and those that follow compensate for what each loses,
in the Hessian H of the inputs. Reference: arXiv:2210.17323 (GPTQ), algorithm 1; scales are chosen over a few
reductions of the largest value, which takes the last code of either end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pycompress.formats import codes as storage
from pycompress.formats.packed import SharedChannels, indices, whole_factor
from pycompress.ops.panel import chosen_scale, round_panel

DAMPING = 1e-2
RIDGE = 1e-6
# Of float64, whose squares of the smallest float32 are above it.
TINY = 1e-200
# Shares of a group's largest magnitude to try as the end of the scale.
REDUCTIONS = {"int8": (1.0,), "int4": (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)}
# Columns whose corrections are applied to the others together.
PANEL = 128
# Columns whose scales are chosen together.
SCALED = 1024


@dataclass(frozen=True)
class InverseHessian:
    """In which order columns are rounded, and how those that come later compensate for one: the OBS update.

    `order [n]`: those of most energy first. `factor [n, n]`: `inverse_cholesky` of the metric in that order.
    """

    order: Tensor
    factor: Tensor

    def of(self, columns: Tensor) -> InverseHessian:
        """For these columns, while the others compensate for them too."""
        places = self.order.argsort()[columns]
        order = places.argsort()
        places = places[order]
        return InverseHessian(order, self.factor[places][:, places])


def inverse_hessian(metric: Tensor) -> InverseHessian:
    energy = metric.diagonal()
    order = energy.argsort(descending=True, stable=True)
    mean = energy.double().mean().clamp(min=TINY)
    return InverseHessian(order, inverse_cholesky(metric.double()[order][:, order] / mean))


def inverse_cholesky(metric: Tensor) -> Tensor:
    """Upper Cholesky factor of the damped metric's inverse: row i says how the columns after i compensate for i."""
    wide = metric.double()
    identity = torch.eye(len(wide), dtype=wide.dtype, device=wide.device)
    mean = wide.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)
    # With the last row first, the lower Cholesky factor is an upper one of the metric, and its inverse what is wanted.
    upper = torch.linalg.cholesky((wide + DAMPING * mean * identity).flip(0, 1)).flip(0, 1)
    return _inverse(upper).float()


def _inverse(upper: Tensor) -> Tensor:
    """Of an upper triangular matrix, in a third of the products of a solve."""
    n = len(upper)
    if n <= PANEL:
        identity = torch.eye(n, dtype=upper.dtype, device=upper.device)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    made, half = torch.zeros_like(upper), n // 2
    made[:half, :half] = left = _inverse(upper[:half, :half])
    made[half:, half:] = right = _inverse(upper[half:, half:])
    made[:half, half:] = -(left @ upper[:half, half:] @ right)
    return made


def quantize(
    values: Tensor, kind: str, metric: Tensor | InverseHessian | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Codes and scales (in `dtype`) of `values [rows, n]`, whose error counts in `metric [n, n]` (None: identity)."""
    storage.stored_shape(len(values), values.shape[1], kind)
    wide = values.float().T
    if metric is None or not values.numel():
        codes, scales = _nearest(wide, kind, dtype)
    else:
        inverse = metric if isinstance(metric, InverseHessian) else inverse_hessian(metric)
        codes, scales = _rounded(wide[inverse.order], kind, inverse, dtype, sorted_=False)
        codes[inverse.order] = codes.clone()
    return storage.pack(codes.T.contiguous(), kind), scales.T.to(dtype).contiguous()


def quantize_sorted(values: Tensor, kind: str, inverse: InverseHessian, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `quantize` of `values[:, inverse.order]`, for columns that may be stored in that order."""
    storage.stored_shape(len(values), values.shape[1], kind)
    codes, scales = _rounded(values.float().T[inverse.order], kind, inverse, dtype, sorted_=True)
    return storage.pack(codes.T.contiguous(), kind), scales.T.to(dtype).contiguous()


def _nearest(values: Tensor, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes `[n, rows]` and scales `[groups, rows]` of `values [n, rows]` by rounding each to the nearest."""
    scales = _scales(values, kind, dtype)
    return _codes(values, _stretched(scales, len(values), kind), kind).to(torch.int8), scales


def _rounded(
    values: Tensor, kind: str, inverse: InverseHessian, dtype: torch.dtype, sorted_: bool
) -> tuple[Tensor, Tensor]:
    """Codes `[n, rows]` and scales `[groups, rows]` of `values [n, rows]`, which are in the order of `inverse`.

    `sorted_`: they are stored in that order too, so that a group's scale can wait until its turn comes; otherwise
    groups are of the columns where they were, and scales those of the values as they are.
    """
    n, group = len(values), _group(len(values), kind)
    rest, factor, (low, high) = values.contiguous().clone(), inverse.factor, storage.RANGE[kind]
    codes = torch.empty(values.shape, dtype=torch.int8, device=values.device)
    in_turn = sorted_ and group <= PANEL
    if in_turn:
        scales = rest.new_empty(storage.scales_shape(rest.shape[1], n, kind)[::-1])
    else:
        scales = _scales(rest if sorted_ else rest[inverse.order.argsort()], kind, dtype)
    places = torch.arange(n, device=rest.device) if sorted_ else inverse.order
    for first in range(0, n, PANEL):
        panel = slice(first, min(first + PANEL, n))
        codes[panel], lost, chosen = round_panel(
            rest[panel],
            factor[panel, panel],
            None if in_turn else scales[places[panel] // group],
            low=low,
            high=high,
            group=group,
            reductions=REDUCTIONS[kind],
            dtype=dtype,
        )
        if in_turn:
            scales[first // group : first // group + len(chosen)] = chosen
        rest[panel.stop :].addmm_(factor[panel, panel.stop :].T, lost, alpha=-1)
    return codes, scales


def _codes(values: Tensor, scales: Tensor, kind: str) -> Tensor:
    return (values / scales).round_().clamp_(*storage.RANGE[kind])


def _group(n: int, kind: str) -> int:
    """Columns that share a scale."""
    return max(n, 1) if kind == "int8" else storage.GROUP


def _stretched(scales: Tensor, n: int, kind: str) -> Tensor:
    """The scale of each of n columns, `[n, rows]`."""
    return scales.repeat_interleave(_group(n, kind), dim=0)[:n]


def _scales(values: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The scales of `values [n, rows]`, `[groups, rows]`."""
    size, (low, high) = _group(len(values), kind), storage.RANGE[kind]
    if not len(values):
        return values.new_ones(storage.scales_shape(values.shape[1], 0, kind)[::-1])
    whole, at_once = len(values) // size * size, max(SCALED // size, 1) * size
    parts = [part.unflatten(0, (-1, size)) for part in values[:whole].split(at_once) if len(part)]
    parts += [values[None, whole:]] if whole < len(values) else []
    return torch.cat([chosen_scale(part, low, high, list(REDUCTIONS[kind]), dtype) for part in parts])


def round_whole(
    weight: Tensor, share: str, kind: str, metric: Tensor | InverseHessian | None, dtype: torch.dtype
) -> SharedChannels:
    """The weight itself in codes: a basis of all of its channels, and no factor.

    With `share="input"` the inputs are stored in the order in which they are rounded.
    """
    n, k = weight.shape
    channels = torch.arange(n if share == "output" else k, device=weight.device)
    if share == "input" and metric is not None:
        inverse = metric if isinstance(metric, InverseHessian) else inverse_hessian(metric)
        channels = inverse.order
        codes, scales = quantize_sorted(weight, kind, inverse, dtype)
    else:
        codes, scales = quantize(weight, kind, metric, dtype)
    none = weight.new_empty((0, n) if share == "output" else (k, 0))
    factor, factor_scales = quantize(none, kind, None, dtype)
    return SharedChannels(share, codes, factor, None, indices(channels, len(channels)), (n, k), scales, factor_scales)


def round_shared(
    packed: SharedChannels,
    weight: Tensor,
    metric: Tensor | None,
    kind: str,
    dtype: torch.dtype,
    inverse: InverseHessian | None = None,
) -> SharedChannels:
    """Round a packed weight that is still in float32 to codes. `inverse`: that of the metric, where it is known.

    What reads the inputs is rounded first, in their metric. The other part is fitted again, by least squares, to what
    that gives, and rounded in the metric of what it reads. Pivots and the channels after them come in another order.
    """
    if inverse is None and metric is not None:
        inverse = inverse_hessian(metric)
    rounded = _round_output if packed.share == "output" else _round_input
    return rounded(packed, weight, metric, kind, dtype, inverse)


def _round_output(
    packed: SharedChannels,
    weight: Tensor,
    metric: Tensor | None,
    kind: str,
    dtype: torch.dtype,
    inverse: InverseHessian | None,
) -> SharedChannels:
    rank, k = packed.rank, packed.clusters
    stacked, stacked_scales = quantize(packed.weight, kind, inverse, dtype)
    wide = storage.dequantize(stacked, stacked_scales)
    residual = weight if packed.labels is None else weight - wide[:k][packed.labels.long()]
    channels = packed.channels
    if channels is not None:
        residual = residual[channels[rank:].long()]
    factor, inner = _fit(residual, wide[k:], metric)
    if not rank:
        codes, scales = quantize(factor, kind, None, dtype)
        return replace(packed, weight=stacked, weight_scales=stacked_scales, factor=codes, factor_scales=scales)
    of_rank = inverse_hessian(inner)
    codes, scales = quantize_sorted(factor, kind, of_rank, dtype)
    rows = torch.cat([torch.arange(k, device=of_rank.order.device), k + of_rank.order])
    return replace(
        packed,
        weight=stacked[rows],
        weight_scales=stacked_scales[rows],
        factor=codes,
        factor_scales=scales,
        channels=None if channels is None else torch.cat([channels[:rank][of_rank.order], channels[rank:]]),
    )


def _round_input(
    packed: SharedChannels,
    weight: Tensor,
    metric: Tensor | None,
    kind: str,
    dtype: torch.dtype,
    inverse: InverseHessian | None,
) -> SharedChannels:
    rank, k, channels, factor = packed.rank, packed.clusters, packed.channels, packed.factor
    if inverse is None or channels is None or not factor.numel():
        codes, scales = quantize(factor, kind, inverse, dtype)
    else:
        # Pivots compensate for the others too: the fit below says how.
        of_rest = inverse.of(channels[rank:].long())
        codes, scales = quantize_sorted(factor, kind, of_rest, dtype)
        channels = torch.cat([channels[:rank], channels[rank:][of_rest.order]])
    reduced = whole_factor(storage.dequantize(codes, scales), channels, "input")  # [r, K]
    if packed.labels is not None:
        member = torch.nn.functional.one_hot(packed.labels.long(), k)
        reduced = torch.cat([member.T.to(reduced.dtype), reduced])
    stacked, inner = _fit(weight, reduced, metric)
    if k:
        stacked, stacked_scales = quantize(stacked, kind, inner, dtype)
    else:
        of_rank = inverse_hessian(inner)
        stacked, stacked_scales = quantize_sorted(stacked, kind, of_rank, dtype)
        codes, scales = codes[of_rank.order], scales[of_rank.order]
        if channels is not None:
            channels = torch.cat([channels[:rank][of_rank.order], channels[rank:]])
    return replace(
        packed,
        weight=stacked,
        weight_scales=stacked_scales,
        factor=codes,
        factor_scales=scales,
        channels=channels,
    )


def _fit(target: Tensor, basis: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """`A [n, r]` that brings `A basis [r, K]` nearest to `target [n, K]` in the metric, and `basis H basisᵀ`."""
    weighted = (basis if metric is None else basis @ metric).double()
    inner = weighted @ basis.double().T
    ridge = RIDGE * inner.diagonal().mean().clamp(min=TINY)
    damped = inner + ridge * torch.eye(len(inner), dtype=inner.dtype, device=inner.device)
    return torch.linalg.solve(damped, weighted @ target.double().T).T.float(), inner
