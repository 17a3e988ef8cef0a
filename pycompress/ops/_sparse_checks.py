"""Whether the tensors of a linear layer without stored zeros fit each other."""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.ops._checks import check_floats


def check_layer(x: Tensor, values: Tensor, kept: Tensor, bias: Tensor | None, name: str, inputs: int) -> None:
    """Raise TypeError on dtypes and ValueError on sizes; `kept [N, B]` is called `name`, x has `inputs` features."""
    check_floats(x=x)
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        given = f"{x.dtype}, {values.dtype}" + ("" if bias is None else f" and {bias.dtype}")
        raise TypeError(f"x, values and bias must share one dtype, got {given}: convert x first")
    if kept.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {kept.dtype}")
    if bias is not None and bias.shape != (len(kept),):
        raise ValueError(f"bias must be [{len(kept)}], one for each row, got {list(bias.shape)}")
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"x must have {inputs} features in its last dimension, got {list(x.shape)}")
