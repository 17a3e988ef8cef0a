"""What every implementation of an op checks of its tensors: one device, index values in range."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from pycompress.formats import zeros

# What torch's generators take.
SEEDS = (-(1 << 63), (1 << 64) - 1)
# Most steps of an iterative op: a run that has not settled by then goes round in a circle.
MOST_ITERATIONS = 1_000_000
# Tensors whose values passed a check, by id: a reference, and what the check was told of which state of the tensor.
_passed: dict[int, tuple[weakref.ref[Tensor], Any]] = {}


def check_tensors(required: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Raise TypeError for what is no dense tensor, ValueError unless all are on the device of the first."""
    device = None
    for name, tensor in (required | (optional or {})).items():
        if tensor is None and name not in required:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense tensor, got {tensor.layout}: call to_dense() first")
        device = tensor.device if device is None else device
        if tensor.device == device:
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{name}, a tensor of shape {tuple(tensor.shape)} is on the meta device and holds no values; "
                f"load the model's weights before running it"
            )
        raise ValueError(f"all tensors must be on one device, got {device} and {name} on {tensor.device}")


def check_finite(name: str, matrix: Tensor) -> None:
    """Raise ValueError for NaN and infinity; where values are not known, nothing."""
    if matrix.is_meta or isinstance(matrix, FakeTensor) or torch.compiler.is_compiling():
        return
    if not bool(torch.isfinite(matrix).all()):
        raise ValueError(f"{name} must be finite, but holds NaN or infinite values")


def check_floats(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}: convert it first")


def check_count(name: str, count: Any, least: int, most: int) -> None:
    if not isinstance(count, (int, torch.SymInt)) or isinstance(count, bool):
        raise TypeError(f"{name} must be an integer, got {type(count).__name__}")
    if not least <= count <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {count}")


def once(tensor: Tensor | None, check: Callable[..., None], *args: Any) -> None:
    """`check(tensor, *args)` unless it passed on this tensor before and neither has been written to since.

    Tensors among `args` count as `tensor` does. Values that nobody can wait for are not checked: on the meta device, in
    functorch's transforms, while a CUDA graph is captured.
    """
    if tensor is None or tensor.is_meta or not tensor.numel():
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if tensor.is_inference() or any(isinstance(arg, Tensor) and arg.is_inference() for arg in args):
        check(tensor, *args)  # inference tensors count no versions
        return
    key = id(tensor)
    state = [tensor._version, tensor.data_ptr(), check]
    for arg in args:
        state += [id(arg), arg._version, arg.data_ptr()] if isinstance(arg, Tensor) else [arg]
    found = _passed.get(key)
    if found is not None and found[0]() is tensor and found[1] == state:
        return
    check(tensor, *args)
    _passed[key] = weakref.ref(tensor, lambda _: _passed.pop(key, None)), state


def check_range(indices: Tensor, name: str, limit: int) -> None:
    low, high = (int(bound) for bound in indices.aminmax())
    if low < 0 or high >= limit:
        raise IndexError(f"{name} must be at least 0 and below {limit}, got {low if low < 0 else high}")


def check_permutation(indices: Tensor, name: str) -> None:
    count = len(indices)
    check_range(indices, name, count)
    seen = torch.zeros(count, dtype=torch.bool, device=indices.device)
    if not bool(seen.index_fill_(0, indices.long(), True).all()):
        raise ValueError(f"{name} must be each of 0 to {count - 1} once")


def check_positions(positions: Tensor) -> None:
    if not zeros.are_pairs(positions):
        raise ValueError("positions must be pairs of two columns of four, the lower one first")


def check_bitmap(bitmap: Tensor, offsets: Tensor, count: int, columns: int) -> None:
    """Offsets follow from the bits, which are as many as the values, none of them beyond the columns."""
    expected = zeros.bit_offsets(bitmap)
    if int(expected[-1]) != count:
        raise ValueError(f"bitmap must have a bit for each of the {count} values, got {int(expected[-1])} bits")
    if not torch.equal(offsets.long(), expected):
        raise IndexError(
            f"offsets must rise from 0 to the number of values, {count}, by at most {zeros.TILE * columns} for "
            f"{zeros.TILE} rows, and be where the values of each tile start, as the bits of bitmap say"
        )
    if zeros.has_bits_beyond(bitmap, columns):
        raise ValueError(f"bitmap must be zero beyond bit {columns} of a row")
