"""Gram matrices: `X Xᵀ` and `X H Xᵀ`, exactly symmetric, accumulated in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress import _ext
from pycompress.ops._arguments import GramArgs
from pycompress.ops._checks import check_floats, check_tensors
from pycompress.ops._library import accumulator, dispatch, register, triton_kernel


def gram_ref(x: Tensor, h: Tensor | None) -> Tensor:
    """Plain torch; the lower triangle is mirrored so that the result is symmetric to the last bit."""
    x = x.to(accumulator(x.dtype))
    y = x if h is None else x @ h.to(x.dtype)
    lower = (y @ x.mT).tril()
    return lower + lower.tril(-1).mT


def _check(x: Tensor, h: Tensor | None) -> None:
    check_tensors({"x": x}, {"h": h})
    if x.dim() < 2:
        raise ValueError(f"gram needs x [..., n, d], got a shape of {tuple(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"gram needs a floating-point x, got {x.dtype}: convert it first")
    if h is None:
        return
    check_floats(h=h)
    d = x.shape[-1]
    if h.shape[-2:] != (d, d) or h.shape[:-2] not in (x.shape[:-2], torch.Size()):
        raise ValueError(
            f"gram needs h of shape {(d, d)}, with or without the leading sizes {tuple(x.shape[:-2])} of x, "
            f"got {tuple(h.shape)}"
        )


def _fake(x: Tensor, h: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=accumulator(x.dtype))


def _cpu(x: Tensor, h: Tensor | None) -> Tensor:
    _check(x, h)
    if x.dtype == torch.float64:
        return gram_ref(x, h)
    x = x.to(torch.float32)
    y = x if h is None else x @ h.to(torch.float32)
    n, d = x.shape[-2:]
    y, x = y.contiguous(), x.contiguous()
    out = torch.empty((*x.shape[:-1], n), dtype=torch.float32)
    _ext.C.gram(GramArgs(y, x, out, x.shape[:-2].numel(), n, d, _ext.threads()))
    return out


_op = register(
    "gram(Tensor x, Tensor? h) -> Tensor",
    gram_ref,
    _fake,
    cpu=_cpu,
    cuda=triton_kernel("gram", "gram_cuda"),
    check=_check,
)


def gram(x: Tensor, h: Tensor | None = None) -> Tensor:
    """Inner products of the rows of `x`, in the metric `h` where one is given.

    Parameters
    ----------
    x
        `[..., n, d]`, floating.
    h
        `[..., d, d]` symmetric, its leading sizes those of `x` or none.

    Returns
    -------
    Tensor
        `[..., n, n]`, float32 (float64 for float64), exactly symmetric.

    Raises
    ------
    ValueError
        For other shapes or devices.
    TypeError
        For integers.

    Examples
    --------
    >>> import torch
    >>> from pycompress.ops import gram
    >>> gram(torch.tensor([[3.0, 4.0]]))
    tensor([[25.]])
    """
    return dispatch(_op, x, h)
