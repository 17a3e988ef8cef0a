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

from pycompress import _ext, storage
from pycompress.ops._library import kernel_in_use, register, triton_kernel

__all__ = ["kernel_in_use", "shared_linear", "shared_linear_ref"]

# csrc/cpu/kernels.h, enums Dtype and Storage.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
STORAGE_CODES = {"float": 0, "int8": 1, "int4": 2}
# Tokens from which torch's float32 products on the CPU are faster than the native ones; its 16-bit ones are slower.
PREFILL = 25

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, None, None, Tensor | None, None, None, None]


def shared_linear_ref(
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
    """Plain torch in the dtype of `x`; packed numbers are widened to it."""
    if weight_scales is not None:
        weight = storage.widen(weight, weight_scales).to(x.dtype)
        factor = storage.widen(factor, factor_scales).to(x.dtype)
    if share_input:
        return F.linear(_reduced(x, factor, labels, channels, weight.shape[1] - factor.shape[0]), weight, bias)
    clusters = weight.shape[0] - factor.shape[1]
    stacked = F.linear(x, weight)  # [..., k + r]
    low = stacked[..., clusters:]
    y = F.linear(low, factor)
    if channels is not None:
        y = _restored(torch.cat([low, y], dim=-1), channels)
    if labels is not None:
        y = y + stacked[..., :clusters].index_select(-1, labels.int())
    return y if bias is None else y + bias


def _reduced(x: Tensor, factor: Tensor, labels: Tensor | None, channels: Tensor | None, clusters: int) -> Tensor:
    """`[s, x Vᵀ]`: inputs summed by label in float32, then the low-rank part."""
    if channels is None:
        low = F.linear(x, factor)
    else:
        pivots, rest = _permuted(x, channels, len(factor))
        low = pivots + F.linear(rest, factor)
    return low if labels is None else torch.cat([_sum_by_label(x, labels, clusters).to(x.dtype), low], dim=-1)


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


def _outputs(weight: Tensor, factor: Tensor, channels: Tensor | None, share_input: bool) -> int:
    """N; it is never a side along which numbers are packed."""
    if share_input:
        return weight.shape[0]
    return factor.shape[0] if channels is None else channels.shape[0]


def _fake(
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
    return x.new_empty((*x.shape[:-1], _outputs(weight, factor, channels, share_input)))


def _cpu(
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
    if x.dtype not in DTYPE_CODES:
        return shared_linear_ref(x, weight, factor, labels, channels, bias, weight_scales, factor_scales, share_input)
    rows = x.reshape(-1, x.shape[-1])
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    stacked, rank = (storage.width_of(weight), len(factor)) if share_input else (len(weight), storage.width_of(factor))
    outputs = _outputs(weight, factor, channels, share_input)
    y = torch.empty((rows.shape[0], outputs), dtype=x.dtype)
    # Held here until the call is over: an address keeps no temporary alive.
    tensors = [
        t if t is None or t.is_contiguous() else t.contiguous()
        for t in (weight, factor, labels, channels, bias, weight_scales, factor_scales)
    ]
    sizes = (*rows.shape, outputs, stacked - rank, rank, rows.stride(0))
    if x.dtype == torch.float32 and weight_scales is None and len(rows) >= PREFILL:
        _cpu_prefill(rows, tensors[:5], y, sizes, share_input)
    else:
        _ext.C.shared_linear(
            *map(_ext.address, (rows, *tensors, y)),
            *sizes,
            DTYPE_CODES[x.dtype],
            STORAGE_CODES[storage.storage_of(weight)],
            _wide(labels, channels),
            share_input,
            _ext.threads(),
        )
    return y.view(*x.shape[:-1], outputs)


def _wide(labels: Tensor | None, channels: Tensor | None) -> bool:
    index = labels if labels is not None else channels
    return index is not None and index.dtype == torch.int32


def _cpu_prefill(x: Tensor, tensors: list[Tensor | None], y: Tensor, sizes: tuple[int, ...], share_input: bool) -> None:
    """Write `y [M, N]` by torch's products; the native module gathers, scatters and sums by label."""
    weight, factor, labels, channels, bias = tensors
    assert weight is not None
    assert factor is not None
    clusters, rank = sizes[3:5]
    reduced, product = x.new_empty(len(x), clusters + rank), None
    low = reduced[:, clusters:]
    if share_input:
        rest = x if channels is None else x.index_select(1, channels[rank:].int())
        torch.mm(rest, factor.T, out=low)
    else:
        torch.mm(x, weight.T, out=reduced)
        product = torch.mm(low, factor.T, out=x.new_empty(len(x), len(factor)))
    addresses = map(_ext.address, (x, labels, channels, bias, reduced, product, y))
    _ext.C.shared_linear_gather(*addresses, *sizes, _wide(labels, channels), share_input, _ext.threads())
    if not share_input:
        return
    if bias is None:
        torch.mm(reduced, weight.T, out=y)
    else:
        torch.addmm(bias, reduced, weight.T, out=y)


# csrc/cuda/shared_linear.h, and the most tokens its kernel takes from Triton's, which `make gpu` measures beside it.
STORAGE_CODES = {"float": 0, "int8": 1, "int4": 2}
NATIVE_TOKENS = {"float": 0, "int8": 0, "int4": 0}


def shared_linear_cuda_native(
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
    """The few-token CUDA kernel of csrc/cuda; NATIVE_TOKENS says when it is the op's CUDA implementation.

    Raises RuntimeError where it was not built, and ValueError for tensors it cannot take.
    """
    if not _native_cuda_built():
        raise RuntimeError(f"the CUDA kernels were not built: {_ext.build_info()['cuda']}")
    if not x.is_cuda or x.dtype not in DTYPE_CODES:
        raise ValueError(f"x must be float32, bfloat16 or float16 on CUDA, got {x.dtype} on {x.device}")
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    rank = factor.shape[0] if share_input else storage.width_of(factor)
    clusters = (storage.width_of(weight) if share_input else weight.shape[0]) - rank
    y = x.new_empty((*x.shape[:-1], _outputs(weight, factor, channels, share_input)))
    parts = x.new_empty(_ext.C.shared_linear_cuda_parts(len(rows), clusters, rank), dtype=torch.float32)
    given = (weight, factor, labels, channels, bias, weight_scales, factor_scales)
    tensors = [t if t is None else t.contiguous() for t in given]
    with torch.cuda.device(x.device):
        _ext.C.shared_linear_cuda(
            *map(_ext.address, (rows, *tensors, parts, y)),
            *rows.shape,
            y.shape[-1],
            clusters,
            rank,
            DTYPE_CODES[x.dtype],
            STORAGE_CODES[storage.storage_of(weight)],
            _wide(labels, channels),
            share_input,
            torch.cuda.current_stream().cuda_stream,
        )
    return y


def _native_cuda_built() -> bool:
    return _ext.C is not None and hasattr(_ext.C, "shared_linear_cuda")


_triton = triton_kernel("shared_linear", "shared_linear_cuda")


def _cuda(
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
    few = math.prod(x.shape[:-1]) <= NATIVE_TOKENS[storage.storage_of(weight)]
    launch = shared_linear_cuda_native if few and x.dtype in DTYPE_CODES and _native_cuda_built() else _triton
    return launch(x, weight, factor, labels, channels, bias, weight_scales, factor_scales, share_input)


_op = register(
    "shared_linear(Tensor x, Tensor weight, Tensor factor, Tensor? labels, Tensor? channels, Tensor? bias, "
    "Tensor? weight_scales, Tensor? factor_scales, bool share_input) -> Tensor",
    shared_linear_ref,
    _fake,
    cpu=_cpu,
    cuda=_cuda,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, factor, labels, channels, bias, weight_scales, factor_scales, ctx.share_input = inputs
    ctx.save_for_backward(x, weight, factor, labels, channels, weight_scales, factor_scales)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> Gradients:
    x, weight, factor, labels, channels, weight_scales, factor_scales = ctx.saved_tensors
    if weight_scales is not None:
        weight = storage.widen(weight, weight_scales).to(x.dtype)
        factor = storage.widen(factor, factor_scales).to(x.dtype)
    rows, grad_rows = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    needed = ctx.needs_input_grad
    backward = _backward_input if ctx.share_input else _backward_output
    grad_x, grad_weight, grad_factor = backward(grad_rows, rows, weight, factor, labels, channels, needed)
    grad_x = None if grad_x is None else grad_x.reshape(x.shape)
    grad_bias = grad_rows.sum(0) if ctx.has_bias and needed[5] else None
    return grad_x, grad_weight, grad_factor, None, None, grad_bias, None, None, None


def _backward_output(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rank = factor.shape[1]
    clusters = weight.shape[0] - rank
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
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    rank = factor.shape[0]
    clusters = weight.shape[1] - rank
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
        grad.T @ _reduced(x, factor, labels, channels, clusters) if needed[1] else None,
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

    `x [..., K]`, any layout, float32, bfloat16 or float16; `weight` and `factor` as in the module's docstring, of the
    dtype of `x` or both int8 or both int4 codes as in `pycompress.storage`, which come with `weight_scales` and
    `factor_scales` in the dtype of `x`; `labels` int16 or int32, `[N]` for share="output", `[K]` for "input", None
    when k = 0; `channels` of the same length and type, None for a whole factor; `bias [N]`. Gives `[..., N]` in the
    dtype of `x`, accumulated in float32. Under `torch.autocast` all take its dtype, as in `F.linear`. Differentiable in
    x, bias, and weight and factor that are not codes. Raises ValueError on sizes that do not fit and TypeError on
    dtypes that differ. Reference: arXiv:2501.08631, section 3.
    """
    if share not in ("output", "input"):
        raise ValueError(f'share must be "output" or "input", got {share!r}')
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, factor, bias, weight_scales, factor_scales = (
            _cast(tensor, dtype) for tensor in (x, weight, factor, bias, weight_scales, factor_scales)
        )
    _check_dtypes(x, weight, factor, labels, channels, bias, weight_scales, factor_scales)
    _check_sizes(x, weight, factor, labels, channels, bias, share)
    _check_scales("weight", weight, weight_scales)
    _check_scales("factor", factor, factor_scales)
    return _op(x, weight, factor, labels, channels, bias, weight_scales, factor_scales, share == "input")


def _cast(tensor: Any, dtype: torch.dtype) -> Any:
    """What `torch.autocast` does to the arguments of `F.linear`: floats but float64 take its dtype."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _check_dtypes(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    weight_scales: Tensor | None,
    factor_scales: Tensor | None,
) -> None:
    floats = {"x": x, "weight": weight, "factor": factor, "bias": bias}
    if storage.storage_of(weight) != "float":
        if factor.dtype != weight.dtype or weight_scales is None or factor_scales is None:
            raise TypeError(
                f"weight and factor must both be int8 or both int4 codes, each with its scales, got {weight.dtype} and "
                f"{factor.dtype}, {'no scales' if weight_scales is None or factor_scales is None else 'scales'}"
            )
        floats = {"x": x, "weight_scales": weight_scales, "factor_scales": factor_scales, "bias": bias}
    elif weight_scales is not None or factor_scales is not None:
        raise TypeError(f"scales belong to int8 or int4 codes, got them with a weight in {weight.dtype}")
    given = {name: tensor.dtype for name, tensor in floats.items() if tensor is not None}
    if any(dtype != x.dtype for dtype in given.values()):
        listed = ", ".join(f"{name} {dtype}" for name, dtype in given.items())
        raise TypeError(f"{', '.join(given)} must share one dtype, got {listed}: convert x first")
    indices = [t.dtype for t in (labels, channels) if t is not None]
    if any(dtype not in (torch.int16, torch.int32) or dtype != indices[0] for dtype in indices):
        raise TypeError(f"labels and channels must both be int16 or both int32, got {', '.join(map(str, indices))}")


def _check_sizes(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    share: str,
) -> None:
    along = 0 if share == "output" else 1
    stacked, packed = (len(weight), storage.width_of(weight)), (len(factor), storage.width_of(factor))
    rank = packed[1 - along]
    shared = packed[along] + (0 if channels is None else rank)
    clusters = stacked[along] - rank
    outputs, inputs = (shared, stacked[1]) if share == "output" else (stacked[0], shared)
    if x.shape[-1] != inputs:
        raise ValueError(f"x must have {inputs} features in its last dimension, got {tuple(x.shape)}")
    if clusters < 0:
        raise ValueError(f"the rank {rank} of factor {packed} exceeds weight {stacked}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {tuple(bias.shape)}")
    if (labels is None) != (clusters == 0):
        given = "None" if labels is None else tuple(labels.shape)
        raise ValueError(f"labels must be given exactly when there are clusters, got k = {clusters} and {given}")
    for name, index in (("labels", labels), ("channels", channels)):
        if index is not None and index.shape != (shared,):
            raise ValueError(f"{name} must be [{shared}], got {tuple(index.shape)}")


def _check_scales(name: str, stored: Tensor, scales: Tensor | None) -> None:
    if scales is None:
        return
    expected = storage.scales_shape(len(stored), storage.width_of(stored), storage.storage_of(stored))
    if scales.shape != expected:
        raise ValueError(f"{name}_scales must be {list(expected)}, got {list(scales.shape)}")
