"""Whether the tensors of a shared-channel linear layer fit each other; the sizes are those of `shared_linear`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pycompress.formats import codes
from pycompress.ops._checks import check_floats, check_permutation, check_range, check_tensors, once


class SharedLayer(NamedTuple):
    """The arguments of `shared_linear` beside `x`, in the order of its schema."""

    weight: Tensor
    factor: Tensor
    labels: Tensor | None
    channels: Tensor | None
    bias: Tensor | None
    weight_scales: Tensor | None
    factor_scales: Tensor | None
    share_input: bool

    @property
    def outputs(self) -> int:
        """N; it is never a side along which numbers are packed."""
        if self.share_input:
            return self.weight.shape[0]
        return self.factor.shape[0] if self.channels is None else self.channels.shape[0]

    @property
    def rank(self) -> int:
        return self.factor.shape[0] if self.share_input else codes.width_of(self.factor)

    @property
    def clusters(self) -> int:
        return (codes.width_of(self.weight) if self.share_input else self.weight.shape[0]) - self.rank

    @property
    def wide_indices(self) -> bool:
        """Whether labels and channels are int32."""
        index = self.labels if self.labels is not None else self.channels
        return index is not None and index.dtype == torch.int32

    def dequantized(self, dtype: torch.dtype) -> SharedLayer:
        """The layer with its numbers as floats of a dtype, where they are codes."""
        if self.weight_scales is None or self.factor_scales is None:
            return self
        weight = codes.dequantize(self.weight, self.weight_scales).to(dtype)
        factor = codes.dequantize(self.factor, self.factor_scales).to(dtype)
        return self._replace(weight=weight, factor=factor, weight_scales=None, factor_scales=None)


def check(x: Any, *given: Any) -> None:
    """Raise TypeError or ValueError unless the arguments fit each other; index values are `check_values`' part."""
    layer = SharedLayer(*given)
    tensors = dict(zip(SharedLayer._fields[:-1], given[:-1], strict=True))
    check_tensors({"x": x, "weight": tensors.pop("weight"), "factor": tensors.pop("factor")}, tensors)
    if layer.weight.dim() != 2 or layer.factor.dim() != 2:
        shapes = f"{list(layer.weight.shape)} and {list(layer.factor.shape)}"
        raise ValueError(f"weight and factor must be matrices, got {shapes}")
    check_dtypes(x, layer)
    check_sizes(x, layer)
    check_scales("weight", layer.weight, layer.weight_scales)
    check_scales("factor", layer.factor, layer.factor_scales)


def check_values(x: Any, *given: Any) -> None:
    """Raise IndexError for labels without a cluster, ValueError for channels that are no permutation."""
    layer = SharedLayer(*given)
    once(layer.labels, check_range, "labels", layer.clusters)
    once(layer.channels, check_permutation, "channels")


def check_dtypes(x: Tensor, layer: SharedLayer) -> None:
    weight, factor, labels, channels, bias, weight_scales, factor_scales, _ = layer
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


def check_sizes(x: Tensor, layer: SharedLayer) -> None:
    weight, factor, labels, channels, bias, *_, share_input = layer
    along = 1 if share_input else 0
    stacked, packed = (len(weight), codes.width_of(weight)), (len(factor), codes.width_of(factor))
    rank = packed[1 - along]
    shared = packed[along] + (0 if channels is None else rank)
    clusters = stacked[along] - rank
    outputs, inputs = (stacked[0], shared) if share_input else (shared, stacked[1])
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
