"""Linear layer over a weight of which two of every four columns are stored; the CPU never forms the dense weight.

M tokens, N outputs, K inputs; `values [N, K / 2]` and `positions [N, K / 8]` as in `pycompress.sparse`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from torch.utils.weak import WeakTensorKeyDictionary

from pycompress import _ext
from pycompress.formats import zeros
from pycompress.ops import _library
from pycompress.ops._arguments import Sparse24LinearCudaArgs, SparseLinearArgs
from pycompress.ops._checks import check_positions, check_tensors, once
from pycompress.ops._library import (
    DTYPE_CODES,
    autocast,
    autocasts,
    call,
    check_native_cuda,
    native_cuda_built,
    register,
    tokens_of,
)
from pycompress.ops._sparse_checks import check_layer

NATIVE_TOKENS = 16  # the most that the kernel of csrc/cuda takes, its TOKENS
CUSPARSELT_SIZES = 32  # both sizes of a weight are multiples of it
_cusparselt: Any = WeakTensorKeyDictionary()


def sparse24_linear_ref(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    """Plain torch: the dense weight is formed."""
    return F.linear(x, zeros.unpack24(values, positions), bias)


def _check(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> None:
    check_tensors({"x": x, "values": values, "positions": positions}, {"bias": bias})
    if values.dim() != 2 or positions.dim() != 2 or values.shape != (len(positions), 4 * positions.shape[1]):
        raise ValueError(
            f"values must be [N, K / 2] and positions [N, K / 8], got {list(values.shape)} and {list(positions.shape)}"
        )
    check_layer(x, values, positions, bias, "positions", 2 * values.shape[1])


def _check_values(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> None:
    once(positions, check_positions)


def _fake(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], values.shape[0]))


def _cpu(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, values, positions, bias)
    _check_values(x, values, positions, bias)
    code = DTYPE_CODES.get(x.dtype)
    if code is None or not x.numel():
        return sparse24_linear_ref(x, values, positions, bias)
    tokens, values, positions = tokens_of(x), values.contiguous(), positions.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = torch.empty((*x.shape[:-1], len(values)), dtype=x.dtype)
    sizes = (*tokens.shape, len(values), tokens.stride(0), values.numel())
    _ext.C.sparse24_linear(
        SparseLinearArgs._make((tokens, values, positions, None, bias, y, *sizes, code, _ext.threads()))
    )
    return y


def sparse24_linear_cuda_native(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    """The few-token CUDA kernel of csrc/cuda, for at most NATIVE_TOKENS tokens.

    Raises RuntimeError where it was not built, and ValueError for tensors it cannot take.
    """
    check_native_cuda("sparse24_linear", x)
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    if len(tokens) > NATIVE_TOKENS:
        raise ValueError(f"x must have at most {NATIVE_TOKENS} tokens, got {len(tokens)}")
    values, positions = values.contiguous(), positions.contiguous()
    bias = None if bias is None else bias.contiguous()
    y = x.new_empty((*x.shape[:-1], len(values)))
    floats = _ext.C.sparse24_linear_cuda_workspace(len(tokens), len(values))
    workspace = x.new_empty(floats, dtype=torch.float32)
    sizes = (*tokens.shape, len(values), DTYPE_CODES[x.dtype])
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        _ext.C.sparse24_linear_cuda(
            Sparse24LinearCudaArgs._make((tokens, values, positions, bias, workspace, y, *sizes, stream))
        )
    return y


def cuda_kernels() -> str:
    """What computes on CUDA: with few tokens, then with many."""
    few = f"native to {NATIVE_TOKENS} tokens, then " if native_cuda_built("sparse24_linear") else ""
    return few + ("cuSPARSELt" if torch.backends.cusparselt.is_available() else "reference (no cuSPARSELt)")


def describe_sparse24() -> str:
    """One line: which kernels the op has on this installation."""
    return _library.describe(cuda_kernels())


def kernel_in_use(tensor: Tensor) -> str:
    """Name of the kernels that run for a tensor of this device and dtype, or `reference` and why."""
    return cuda_kernels() if tensor.is_cuda and tensor.dtype in DTYPE_CODES else _library.kernel_in_use(tensor)


def _cuda(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None) -> Tensor:
    if x.dtype in DTYPE_CODES and math.prod(x.shape[:-1]) <= NATIVE_TOKENS and native_cuda_built("sparse24_linear"):
        return sparse24_linear_cuda_native(x, values, positions, bias)
    packed = _for_cusparselt(values, positions)
    if packed is None:
        return sparse24_linear_ref(x, values, positions, bias)
    return F.linear(x, packed, bias).contiguous()  # of numbers of tokens that cuSPARSELt pads it is the transpose


def _for_cusparselt(values: Tensor, positions: Tensor) -> Any:
    """The weight as torch's own 2:4 tensor, or None where cuSPARSELt cannot take it; made once for each `values`.

    It is made again when the values have changed. A CUDA graph must find it made: its memory would be the graph's.
    """
    shape = (len(values), 2 * values.shape[1])
    if values.dtype not in (torch.bfloat16, torch.float16) or any(size % CUSPARSELT_SIZES for size in shape):
        return None
    version = 0 if values.is_inference() else values._version
    if values not in _cusparselt or _cusparselt[values][0] != version:
        if not torch.backends.cusparselt.is_available() or torch.cuda.is_current_stream_capturing():
            return None
        dense = zeros.unpack24(values.detach(), positions)
        _cusparselt[values] = (version, SparseSemiStructuredTensorCUSPARSELT.from_dense(dense))
    return _cusparselt[values][1]


_op = register(
    "sparse24_linear(Tensor x, Tensor values, Tensor positions, Tensor? bias) -> Tensor",
    sparse24_linear_ref,
    _fake,
    cpu=_cpu,
    cuda=_cuda,
    check=_check,
    check_values=_check_values,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, positions, bias = inputs
    ctx.save_for_backward(x, values, positions)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor | None]:
    x, values, positions = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    return (
        grad @ zeros.unpack24(values, positions) if ctx.needs_input_grad[0] else None,
        zeros.gather24(rows.T @ x.reshape(-1, x.shape[-1]), positions) if ctx.needs_input_grad[1] else None,
        None,
        rows.sum(0) if ctx.has_bias and ctx.needs_input_grad[3] else None,
    )


torch.library.register_autograd("pycompress::sparse24_linear", _backward, setup_context=_save)


def sparse24_linear(x: Tensor, values: Tensor, positions: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear(x, unpack24(values, positions), bias)`, without the dense weight on the CPU.

    Under `torch.autocast` all take its dtype, as in `F.linear`. Differentiable in x, values and bias.

    Parameters
    ----------
    x
        `[..., K]`, any layout, float32, bfloat16 or float16.
    values, bias
        `[N, K / 2]` and `[N]` of its dtype.
    positions
        `[N, K / 8]` uint8.

    Returns
    -------
    Tensor
        `[..., N]` in the dtype of `x`, accumulated in float32.

    Raises
    ------
    ValueError
        For sizes that do not fit and positions that do not ascend.
    TypeError
        For dtypes that differ.
    """
    if autocasts(x):
        x, values, bias = autocast(x, values, bias)
    return call(_op, _cpu, x, values, positions, bias)
