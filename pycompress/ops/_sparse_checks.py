"""What the two linear layers without stored zeros have in common: their checks, and the tokens as kernels take them."""

from __future__ import annotations

import torch
from torch import Tensor


def check_layer(x: Tensor, values: Tensor, kept: Tensor, bias: Tensor | None, name: str, inputs: int) -> None:
    """Raise TypeError on dtypes and ValueError on sizes; `kept [N, B]` is called `name`, x has `inputs` features."""
    if values.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
        given = f"{x.dtype}, {values.dtype}" + ("" if bias is None else f" and {bias.dtype}")
        raise TypeError(f"x, values and bias must share one dtype, got {given}: convert x first")
    if kept.dtype != torch.uint8:
        raise TypeError(f"{name} must be uint8, got {kept.dtype}")
    if bias is not None and bias.shape != (len(kept),):
        raise ValueError(f"bias must be [{len(kept)}], one for each row, got {list(bias.shape)}")
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"x must have {inputs} features in its last dimension, got {list(x.shape)}")


def tokens_of(x: Tensor) -> Tensor:
    """`x [..., K]` as `[M, K]` with contiguous rows; they may be apart."""
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()
