"""What kernels derive from a tensor that a layer stores, made once and kept while the tensor is there, unchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_kept: Any = WeakTensorKeyDictionary()


def derived(tensor: Tensor, make: Callable[..., Any], *args: Any) -> Any:
    """`make(tensor, *args)`, made again when the tensor was written to.

    What is made while a CUDA graph is captured lies in the graph's memory and is not kept.
    """
    state = (0 if tensor.is_inference() else tensor._version, tensor.data_ptr())
    held = _kept.get(tensor)
    if held is None or held[0] != state:
        held = (state, {})
    key = (make, *args)
    if key not in held[1]:
        made = make(tensor, *args)
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            return made
        held[1][key] = made
        _kept[tensor] = held
    return held[1][key]
