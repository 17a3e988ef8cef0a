"""Whether the tensors of a shared-channel linear layer fit each other; the sizes are those of `shared_linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress.formats import codes
from pycompress.ops._checks import check_floats, check_permutation, check_range, check_tensors, once

NAMES = ("x", "weight", "factor", "labels", "channels", "bias", "weight_scales", "factor_scales")


def check(*args: Any) -> None:
    """Raise TypeError or ValueError unless the arguments fit each other; index values are `check_values`' part."""
    *tensors, share_input = args
    named = dict(zip(NAMES, tensors, strict=True))
    check_tensors({name: named.pop(name) for name in NAMES[:3]}, named)
    x, weight, factor, labels, channels, bias, weight_scales, factor_scales = tensors
    if weight.dim() != 2 or factor.dim() != 2:
        raise ValueError(f"weight and factor must be matrices, got {list(weight.shape)} and {list(factor.shape)}")
    check_dtypes(x, weight, factor, labels, channels, bias, weight_scales, factor_scales)
    check_sizes(x, weight, factor, labels, channels, bias, "input" if share_input else "output")
    check_scales("weight", weight, weight_scales)
    check_scales("factor", factor, factor_scales)


def check_values(*args: Any) -> None:
    """Raise IndexError for labels without a cluster, ValueError for channels that are no permutation."""
    _, weight, factor, labels, channels, *_, share_input = args
    clusters = codes.width_of(weight) - len(factor) if share_input else len(weight) - codes.width_of(factor)
    once(labels, check_range, "labels", clusters)
    once(channels, check_permutation, "channels")


def check_dtypes(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    weight_scales: Tensor | None,
    factor_scales: Tensor | None,
) -> None:
    check_floats(x=x)
    floats = {"x": x, "weight": weight, "factor": factor, "bias": bias}
    if codes.storage_of(weight) != "float":
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


def check_sizes(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    labels: Tensor | None,
    channels: Tensor | None,
    bias: Tensor | None,
    share: str,
) -> None:
    along = 0 if share == "output" else 1
    stacked, packed = (len(weight), codes.width_of(weight)), (len(factor), codes.width_of(factor))
    rank = packed[1 - along]
    shared = packed[along] + (0 if channels is None else rank)
    clusters = stacked[along] - rank
    outputs, inputs = (shared, stacked[1]) if share == "output" else (stacked[0], shared)
    if x.shape[-1:] != (inputs,):
        raise ValueError(f"x must have {inputs} features in its last dimension, got {tuple(x.shape)}")
    if clusters < 0:
        raise ValueError(f"the rank {rank} of factor {packed} exceeds weight {stacked}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"bias must be [{outputs}], got {tuple(bias.shape)}")
    if (labels is None) != bool(clusters == 0):
        given = "None" if labels is None else tuple(labels.shape)
        raise ValueError(f"labels must be given exactly when there are clusters, got k = {clusters} and {given}")
    for name, index in (("labels", labels), ("channels", channels)):
        if index is not None and index.shape != (shared,):
            raise ValueError(f"{name} must be [{shared}], got {tuple(index.shape)}")


def check_scales(name: str, stored: Tensor, scales: Tensor | None) -> None:
    if scales is None:
        return
    if codes.width_of(stored) % codes.BLOCK and codes.storage_of(stored) == "int4":
        raise ValueError(f"{name} in int4 has rows of a multiple of {codes.BLOCK} codes, got {codes.width_of(stored)}")
    expected = codes.scales_shape(len(stored), codes.width_of(stored), codes.storage_of(stored))
    if scales.shape != expected:
        raise ValueError(f"{name}_scales must be {list(expected)}, got {list(scales.shape)}")
