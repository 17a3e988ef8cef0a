"""Linear layer over a weight whose zeros, wherever they are, are not stored; the CPU never forms the dense weight.

M tokens, N outputs, K inputs. `values [count]`, `bitmap [N, 8 * ceil(K / 64)]` and `offsets [ceil(N / 16) + 1]` as in
`pycompress.sparse`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress import _ext
from pycompress.formats import zeros
from pycompress.ops import _library
from pycompress.ops._arguments import SparseLinearArgs
from pycompress.ops._checks import check_bitmap, check_tensors, once
from pycompress.ops._library import DTYPE_CODES, autocast, autocasts, call, register, tokens_of
from pycompress.ops._sparse_checks import check_layer


def bitmap_linear_ref(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """Plain torch: the dense weight is formed."""
    return F.linear(x, zeros.unpack_bitmap(values, bitmap, offsets, x.shape[-1]), bias)


def _check(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    check_tensors({"x": x, "values": values, "bitmap": bitmap, "offsets": offsets}, {"bias": bias})
    inputs = x.shape[-1] if x.dim() else 0
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets must be int32, got {offsets.dtype}")
    if values.dim() != 1 or bitmap.dim() != 2 or offsets.shape != (zeros.tiles(len(bitmap)) + 1,):
        raise ValueError(
            f"values must be [count], bitmap [N, bytes] and offsets [ceil(N / {zeros.TILE}) + 1], got "
            f"{list(values.shape)}, {list(bitmap.shape)} and {list(offsets.shape)}"
        )
    if bitmap.shape[1] != zeros.bitmap_bytes(inputs):
        raise ValueError(
            f"x of {inputs} features needs a bitmap of {zeros.bitmap_bytes(inputs)} bytes a row, got "
            f"{bitmap.shape[1]}: x {list(x.shape)}, bitmap {list(bitmap.shape)}"
        )
    check_layer(x, values, bitmap, bias, "bitmap", inputs)


def _check_values(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, bias: Tensor | None) -> None:
    once(bitmap, check_bitmap, offsets, len(values), x.shape[-1])


def _fake(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


def _cpu(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, bitmap, offsets, bias)
    _check_values(x, values, bitmap, offsets, bias)
    code = DTYPE_CODES.get(x.dtype)
    if code is None or not x.numel():
        return bitmap_linear_ref(x, values, bitmap, offsets, bias)
    tokens, values, bitmap, offsets = tokens_of(x), values.contiguous(), bitmap.contiguous(), offsets.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], len(bitmap)), dtype=x.dtype)
    sizes = (*tokens.shape, len(bitmap), tokens.stride(0), len(values))
    _ext.C.bitmap_linear(
        SparseLinearArgs._make((tokens, values, bitmap, offsets, bias, y, *sizes, code, _ext.threads()))
    )
    return y


_op = register(
    "bitmap_linear(Tensor x, Tensor values, Tensor bitmap, Tensor offsets, Tensor? bias) -> Tensor",
    bitmap_linear_ref,
    _fake,
    cpu=_cpu,
    cuda=bitmap_linear_ref,
    check=_check,
    check_values=_check_values,
)


def cuda_kernels() -> str:
    return "reference (no CUDA kernel for bitmaps)"


def describe_bitmap() -> str:
    """One line: which kernels the op has on this installation."""
    return _library.describe(cuda_kernels())


def kernel_in_use(tensor: Tensor) -> str:
    """Name of the kernel that runs for a tensor of this device and dtype, or `reference` and why."""
    return cuda_kernels() if tensor.is_cuda else _library.kernel_in_use(tensor)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bitmap, offsets, bias = inputs
    ctx.save_for_backward(x, values, bitmap, offsets)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, Tensor | None]:
    x, values, bitmap, offsets = ctx.saved_tensors
    inputs, rows = x.shape[-1], grad.reshape(-1, grad.shape[-1])
    grad_x = grad @ zeros.unpack_bitmap(values, bitmap, offsets, inputs) if ctx.needs_input_grad[0] else None
    grad_values = None
    if ctx.needs_input_grad[1]:
        grad_values = zeros.gather_bitmap(rows.T @ x.reshape(-1, inputs), bitmap, len(values))
    grad_bias = rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[4] else None
    return grad_x, grad_values, None, None, grad_bias


torch.library.register_autograd("pycompress::bitmap_linear", _backward, setup_context=_save)


def bitmap_linear(x: Tensor, values: Tensor, bitmap: Tensor, offsets: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, unpack_bitmap(values, bitmap, offsets, K), bias)`, without the dense weight on the CPU.

    Under `torch.autocast` all take its dtype, as in `F.linear`. Differentiable in x, values and bias.

    Parameters
    ----------
    x
        `[..., K]`, any layout, float32, bfloat16 or float16.
    values, bias
        `[count]` and `[N]` of its dtype.
    bitmap
        `[N, 8 * ceil(K / 64)]` uint8, zero past bit K.
    offsets
        `[ceil(N / 16) + 1]` int32, which agree with the bits.

    Returns
    -------
    Tensor
        `[..., N]` in the dtype of `x`, accumulated in float32.

    Raises
    ------
    ValueError
        For sizes that do not fit and bits past the last column.
    TypeError
        For dtypes that differ.
    IndexError
        For offsets that disagree with the bits.
    """
    if autocasts(x):
        x, values, bias = autocast(x, values, bias)
    return call(_op, _cpu, x, values, bitmap, offsets, bias)
