"""Linear layer whose channels share centroids, with a low-rank correction; the dense weight is never formed.

M tokens, N outputs, K inputs, k clusters, r rank.
share="output": `weight [k + r, K] = [C; V]`, `factor U [N, r]`, one label a row: `y = (x Cᵀ)[:, labels] + (x Vᵀ) Uᵀ`.
share="input": `weight [N, k + r] = [Cᵀ | U]`, `factor V [r, K]`, one label a column: `y = [s, x Vᵀ] weightᵀ` with
`s[:, c]` the sum of the `x[:, j]` whose label is c.
Pivoted: `channels`, a permutation of the N or K channels, has r pivots first, whose part of the factor is the identity
and is not stored; `factor` is `U [N - r, r]` or `V [r, K - r]` of the channels after them.
Packed: `weight` and `factor` are the codes of `pycompress.storage`, int8 or int4, and have scales.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress import _ext
from pycompress.formats import codes
from pycompress.ops import _shared_linear_checks as checks
from pycompress.ops._arguments import SharedLinearArgs
from pycompress.ops._library import (
    DTYPE_CODES,
    PREFILL,
    autocast,
    autocasts,
    call,
    kernel_in_use,
    register,
    triton_kernel,
)
from pycompress.ops._shared_linear_checks import SharedLayer

__all__ = ["kernel_in_use", "shared_linear", "shared_linear_ref"]

# csrc/cpu/kernels.h and csrc/cuda/shared_linear.h, enum Storage.
STORAGE_CODES = {"float": 0, "int8": 1, "int4": 2}

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, None, None, Tensor | None, None, None, None]


def shared_linear_ref(x: Tensor, *given: Any) -> Tensor:
    """Plain torch in the dtype of `x`; packed numbers are dequantized to it. `given`: the fields of a `SharedLayer`."""
    layer = SharedLayer(*given).dequantized(x.dtype)
    if layer.share_input:
        return F.linear(_reduced(x, layer), layer.weight, layer.bias)
    stacked = F.linear(x, layer.weight)  # [..., k + r]
    low = stacked[..., layer.clusters :]
    y = F.linear(low, layer.factor)
    if layer.channels is not None:
        y = _restored(torch.cat([low, y], dim=-1), layer.channels)
    if layer.labels is not None:
        y = y + stacked[..., : layer.clusters].index_select(-1, layer.labels.int())
    return y if layer.bias is None else y + layer.bias


def _reduced(x: Tensor, layer: SharedLayer) -> Tensor:
    """`[s, x Vᵀ]`: inputs summed by label in float32, then the low-rank part."""
    if layer.channels is None:
        low = F.linear(x, layer.factor)
    else:
        pivots, rest = _permuted(x, layer.channels, layer.rank)
        low = pivots + F.linear(rest, layer.factor)
    if layer.labels is None:
        return low
    return torch.cat([_sum_by_label(x, layer.labels, layer.clusters).to(x.dtype), low], dim=-1)


def _permuted(values: Tensor, channels: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Columns in the order of `channels`: the pivots, then the rest."""
    ordered = values.index_select(-1, channels.int())
    return ordered[..., :rank], ordered[..., rank:]


def _restored(values: Tensor, channels: Tensor) -> Tensor:
    """Columns that are in the order of `channels` back in their own."""
    return torch.empty_like(values).index_copy(-1, channels.long(), values)


def _sum_by_label(values: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Columns of `values [..., n]` summed by label, `[..., clusters]`, at least float32."""
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    return wide.new_zeros((*values.shape[:-1], clusters)).index_add(-1, labels.int(), wide)


def _fake(x: Tensor, *given: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], SharedLayer(*given).outputs))


# What the native kernel is told of sizes and storage, by the dtypes and shapes of tensors that were found to fit.
_known: dict[tuple[Any, ...], tuple[Any, ...]] = {}
MOST_KNOWN = 4096


def _cpu(x: Tensor, *given: Any) -> Tensor:
    *parts, share_input = given
    if x is None:  # which the dispatcher takes for a tensor
        checks.check(x, *given)
    signature = tuple([None if t is None else (t.dtype, t.shape) for t in parts])
    key = (share_input, x.dtype, x.shape[-1:], signature)
    known = _known.get(key)
    if known is None:
        checks.check(x, *given)
        if len(_known) >= MOST_KNOWN:
            _known.clear()
        known = _known[key] = _sizes(x, SharedLayer(*given))
    inputs, outputs, clusters, rank, code, storage_code, wide = known
    if code is None:
        checks.check_values(x, *given)
        return shared_linear_ref(x, *given)
    tensors = [t if t is None or t.is_contiguous() else t.contiguous() for t in parts]
    rows = x if x.is_contiguous() else x.reshape(math.prod(x.shape[:-1]), inputs)
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    row_stride = rows.stride(0) if rows.ndim == 2 else inputs
    tokens = math.prod(x.shape[:-1])
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    sizes = (tokens, inputs, outputs, clusters, rank, row_stride)
    if code == 0 and storage_code == 0 and tokens >= PREFILL:
        _cpu_prefill(
            rows.view(tokens, inputs), SharedLayer._make([*tensors, share_input]), y.view(tokens, outputs), sizes
        )
    else:
        kinds = (code, storage_code, wide, share_input)
        _ext.C.shared_linear(SharedLinearArgs._make((rows, *tensors, y, *sizes, *kinds, _ext.threads())))
    return y


def _sizes(x: Tensor, layer: SharedLayer) -> tuple[Any, ...]:
    """Inputs, outputs, clusters, rank, the kernel's codes of dtype and storage, and whether indices are int32."""
    kinds = DTYPE_CODES.get(x.dtype), STORAGE_CODES[codes.storage_of(layer.weight)]
    return (x.shape[-1], layer.outputs, layer.clusters, layer.rank, *kinds, layer.wide_indices)


def _cpu_prefill(x: Tensor, layer: SharedLayer, y: Tensor, sizes: tuple[int, ...]) -> None:
    """Write `y [M, N]` by torch's products; the native module gathers, scatters and sums by label."""
    weight, factor, _, channels, bias, *_, share_input = layer
    clusters, rank = sizes[3:5]
    reduced, product = x.new_empty(len(x), clusters + rank), None
    low = reduced[:, clusters:]
    if share_input:
        rest = x if channels is None else x.index_select(1, channels[rank:].int())
        torch.mm(rest, factor.T, out=low)
    else:
        torch.mm(x, weight.T, out=reduced)
        product = torch.mm(low, factor.T, out=x.new_empty(len(x), len(factor)))
    kinds = (DTYPE_CODES[x.dtype], STORAGE_CODES["float"], layer.wide_indices, share_input)
    given = SharedLinearArgs._make((x, *layer[:-1], y, *sizes, *kinds, _ext.threads()))
    _ext.C.shared_linear_gather(given, reduced, product)
    if not share_input:
        return
    if bias is None:
        torch.mm(reduced, weight.T, out=y)
    else:
        torch.addmm(bias, reduced, weight.T, out=y)


_op = register(
    "shared_linear(Tensor x, Tensor weight, Tensor factor, Tensor? labels, Tensor? channels, Tensor? bias, "
    "Tensor? weight_scales, Tensor? factor_scales, bool share_input) -> Tensor",
    shared_linear_ref,
    _fake,
    cpu=_cpu,
    cuda=triton_kernel("shared_linear", "shared_linear_cuda"),
    check=checks.check,
    check_values=checks.check_values,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, layer = inputs[0], SharedLayer(*inputs[1:])
    ctx.has_bias, ctx.share_input = layer.bias is not None, layer.share_input
    ctx.save_for_backward(x, *layer._replace(bias=None)[:-1])


def _backward(ctx: Any, grad: Tensor) -> Gradients:
    x, *parts = ctx.saved_tensors
    layer = SharedLayer._make([*parts, ctx.share_input]).dequantized(x.dtype)
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    needed = ctx.needs_input_grad
    backward = _backward_input if layer.share_input else _backward_output
    grad_x, grad_weight, grad_factor = backward(grad_rows, rows, layer, needed)
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    grad_bias = grad_rows.sum(0) if ctx.has_bias and needed[5] else None
    return grad_x, grad_weight, grad_factor, None, None, grad_bias, None, None, None


def _backward_output(
    grad: Tensor, x: Tensor, layer: SharedLayer, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    weight, factor, labels, channels, *_ = layer
    clusters, rank = layer.clusters, layer.rank
    pivots, rest = (None, grad) if channels is None else _permuted(grad, channels, rank)
    grad_stacked = rest @ factor if pivots is None else pivots + rest @ factor
    if labels is not None:
        grad_stacked = torch.cat([_sum_by_label(grad, labels, clusters).to(grad.dtype), grad_stacked], dim=1)
    return (
        grad_stacked @ weight if needed[0] else None,
        grad_stacked.T @ x if needed[1] else None,
        rest.T @ F.linear(x, weight[clusters:]) if needed[2] else None,
    )


def _backward_input(
    grad: Tensor, x: Tensor, layer: SharedLayer, needed: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    weight, factor, labels, channels, *_ = layer
    clusters, rank = layer.clusters, layer.rank
    grad_reduced = grad @ weight  # [M, k + r]
    grad_low = grad_reduced[:, clusters:]
    grad_x = grad_low @ factor if needed[0] else None
    if grad_x is not None and channels is not None:
        grad_x = _restored(torch.cat([grad_low, grad_x], dim=1), channels)
    if grad_x is not None and labels is not None:
        grad_x = grad_x + grad_reduced[:, :clusters].index_select(1, labels.int())
    rest = x if channels is None else _permuted(x, channels, rank)[1]
    return (
        grad_x,
        grad.T @ _reduced(x, layer) if needed[1] else None,
        grad_low.T @ rest if needed[2] else None,
    )


torch.library.register_autograd("pycompress::shared_linear", _backward, setup_context=_save)


def shared_linear(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None = None,
    bias: Tensor | None = None,
    weight_scales: Tensor | None = None,
    factor_scales: Tensor | None = None,
    *,
    share: str,
) -> Tensor:
    """Apply a packed linear layer to `x` without restoring its weight.

    Under `torch.autocast` all take its dtype, as in `F.linear`. Differentiable in x, bias, and weight and factor that
    are not codes.

    Parameters
    ----------
    x
        `[..., K]`, any layout, float32, bfloat16 or float16.
    weight, factor
        As in the module's docstring, of the dtype of `x`, or both int8 or both int4 codes as in `formats.codes`.
    labels
        int16 or int32, `[N]` for share="output", `[K]` for "input", None when k = 0.
    channels
        Of the same length and type, None for a whole factor.
    bias
        `[N]`.
    weight_scales, factor_scales
        Of codes, in the dtype of `x`.
    share
        "output" or "input".

    Returns
    -------
    Tensor
        `[..., N]` in the dtype of `x`, accumulated in float32.

    Raises
    ------
    ValueError
        For sizes that do not fit, several devices, and channels that are no permutation.
    TypeError
        For dtypes that differ.
    IndexError
        For labels without a cluster.

    Reference: arXiv:2501.08631, section 3.
    """
    if share not in ("output", "input"):
        raise ValueError(f'share must be "output" or "input", got {share!r}')
    if autocasts(x):
        x, weight, factor, bias, weight_scales, factor_scales = autocast(
            x, weight, factor, bias, weight_scales, factor_scales
        )
    return call(_op, _cpu, x, weight, factor, labels, channels, bias, weight_scales, factor_scales, share == "input")
