"""Modules that compute in float32 from 16-bit weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map


def float32(value: Any) -> Any:
    """A floating-point tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def in_float32(module: nn.Module) -> Callable[..., Any]:
    """`module` computing in float32 from its weights as they are, on a CPU, where 16-bit arithmetic is slow and gains
    nothing; the module itself elsewhere. Arguments are cast along; hooks run.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    narrow = {name: t for name, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float32}
    if not narrow or any(t.device.type != "cpu" for t in narrow.values()):
        return module
    wide = {name: tensor.detach().float() for name, tensor in narrow.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(module, wide, tree_map(float32, args), tree_map(float32, kwargs))

    return call
