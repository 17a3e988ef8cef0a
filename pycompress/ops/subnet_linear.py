"""Dense linear layer over some rows and columns of a stored weight: one matrix, many subnetworks.

M tokens, N rows and K columns of the weight, n and m of them in use. The weight's rows are contiguous, or its columns
are (the transpose of a contiguous matrix), which is what a choice of columns wants: it then reads only what it uses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress import _ext
from pycompress.ops._arguments import SubnetLinearArgs
from pycompress.ops._checks import check_floats, check_range, check_tensors, once
from pycompress.ops._library import DTYPE_CODES, PREFILL, autocast, autocasts, call, register, tokens_of, triton_kernel


def subnet_linear_ref(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None
) -> Tensor:
    """Plain torch: the part of the weight in use is copied."""
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    return F.linear(x, weight if columns is None else weight.index_select(1, columns), bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> None:
    check_tensors({"x": x, "weight": weight}, {"bias": bias, "rows": rows, "columns": columns})
    check_floats(x=x)
    dtype = x.dtype
    if weight.dtype != dtype or (bias is not None and bias.dtype != dtype):
        given = f"{dtype}, {weight.dtype}" + ("" if bias is None else f" and {bias.dtype}")
        raise TypeError(f"x, weight and bias must share one dtype, got {given}: convert x first")
    for name, index in (("rows", rows), ("columns", columns)):
        if index is not None and (index.dtype != torch.int64 or index.dim() != 1):
            raise TypeError(f"{name} must be int64 of one dimension, got {index.dtype} {tuple(index.shape)}")
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], one for each row of weight, got {tuple(bias.shape)}")
    inputs = inputs if columns is None else columns.shape[0]
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"x must have {inputs} features in its last dimension, got {tuple(x.shape)}")


def _check_values(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> None:
    once(rows, check_range, "rows", weight.shape[0])
    once(columns, check_range, "columns", weight.shape[1])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], (weight if rows is None else rows).shape[0]))


def _cpu(x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    _check(x, weight, bias, rows, columns)
    code, values = DTYPE_CODES.get(x.dtype), x.numel()
    by_torch = code == 0 and rows is None and columns is None and values >= PREFILL * x.shape[-1]
    if code is None or not values or by_torch:
        _check_values(x, weight, bias, rows, columns)
        return subnet_linear_ref(x, weight, bias, rows, columns)
    tokens = tokens_of(x)
    if 1 not in weight.stride():
        weight = weight.contiguous()
    bias, rows, columns = (t if t is None else t.contiguous() for t in (bias, rows, columns))
    height, width = weight.shape
    along_rows, along_columns = weight.stride()
    outputs = height if rows is None else rows.shape[0]
    y = torch.empty((*x.shape[:-1], outputs), dtype=x.dtype)
    weight_stride = along_rows if along_columns == 1 else along_columns
    sizes = (*tokens.shape, outputs, height, width, tokens.stride(0), weight_stride)
    transposed = along_columns != 1
    _ext.C.subnet_linear(
        SubnetLinearArgs._make((tokens, weight, bias, rows, columns, y, *sizes, code, transposed, _ext.threads()))
    )
    return y


_op = register(
    "subnet_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? rows, Tensor? columns) -> Tensor",
    subnet_linear_ref,
    _fake,
    cpu=_cpu,
    cuda=triton_kernel("subnet_linear", "subnet_linear_cuda"),
    check=_check,
    check_values=_check_values,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, rows, columns = inputs
    ctx.save_for_backward(x, weight, rows, columns)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    x, weight, rows, columns = ctx.saved_tensors
    needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_x = _op(grad, weight.T, None, columns, rows) if needs_x else None
    flat = grad.reshape(-1, grad.shape[-1])
    grad_weight = flat.T @ x.reshape(-1, x.shape[-1]) if needs_weight else None
    if grad_weight is not None:
        grad_weight = _spread(_spread(grad_weight, 0, rows, weight.shape[0]), 1, columns, weight.shape[1])
    grad_bias = _spread(flat.sum(0), 0, rows, weight.shape[0]) if ctx.has_bias and needs_bias else None
    return grad_x, grad_weight, grad_bias, None, None


def _spread(values: Tensor, dim: int, index: Tensor | None, size: int) -> Tensor:
    """Slices of `values` at the places of `index` among `size`, summed where it repeats."""
    if index is None:
        return values
    shape = [*values.shape]
    shape[dim] = size
    return values.new_zeros(shape).index_add(dim, index, values)


torch.library.register_autograd("pycompress::subnet_linear", _backward, setup_context=_save)


def subnet_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """`F.linear(x, weight[rows][:, columns], bias[rows])`, without a copy of the weight on the CPU.

    The weight is read in place when its rows or its columns are contiguous: a prefix `W[:n, :k]`, a transpose; other
    layouts are copied first. For few tokens, contiguous rows are read whole whatever the columns, so the weights of the
    others must be finite, and contiguous columns are read whole whatever the rows. Under `torch.autocast` all take its
    dtype, as in `F.linear`. Differentiable in x, weight and bias.

    Parameters
    ----------
    x
        `[..., m]`, any layout, float32, bfloat16 or float16.
    weight, bias
        `[N, K]` and `[N]` of its dtype.
    rows, columns
        `[n]` and `[m]` int64, in any order, also repeated, None for all.

    Returns
    -------
    Tensor
        `[..., n]` in the dtype of `x`, accumulated in float32.

    Raises
    ------
    ValueError
        For sizes that do not fit.
    TypeError
        For dtypes that differ.
    IndexError
        For indices outside the weight.

    Examples
    --------
    >>> import torch
    >>> from pycompress.ops import subnet_linear
    >>> subnet_linear(torch.ones(1, 2), torch.eye(3), rows=torch.tensor([2, 0]), columns=torch.tensor([0, 2]))
    tensor([[1., 1.]])
    """
    if autocasts(x):
        x, weight, bias = autocast(x, weight, bias)
    return call(_op, _cpu, x, weight, bias, rows, columns)
