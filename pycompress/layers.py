"""Compressed layers: parameters, one buffer, a one-line forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pycompress.ops.shared_linear import kernel_in_use, shared_linear_of_layer
from pycompress.storage import CODES, scales_shape, stored_shape


class SharedLinear(nn.Module):
    """A linear layer whose channels share centroids, with a low-rank correction; see `formats.SharedChannels`.

    Takes `x [..., K]`, gives `[..., N]`; no dense weight is ever formed. `weight`, `factor` and `bias` train; stored as
    codes (`storage` "int8" or "int4"), weight and factor stay as they are.
    """

    weight: nn.Parameter
    factor: nn.Parameter
    labels: Tensor | None
    channels: Tensor | None
    weight_scales: Tensor | None
    factor_scales: Tensor | None

    def __init__(
        self,
        shape: tuple[int, int],
        share: str,
        clusters: int,
        rank: int,
        pivoted: bool,
        storage: str,
        bias: bool,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.share, self.clusters, self.rank, self.pivoted = share, clusters, rank, pivoted
        self.storage = storage
        to: dict[str, Any] = {"dtype": dtype, "device": device}
        rows_shared = share == "output"
        channels = self.out_features if rows_shared else self.in_features
        length = channels - rank if pivoted else channels
        stacked = (clusters + rank, self.in_features) if rows_shared else (self.out_features, clusters + rank)
        for name, shape in (("weight", stacked), ("factor", (length, rank) if rows_shared else (rank, length))):
            self.register_parameter(name, _numbers(*shape, storage, dtype, device))
            scales = None if storage == "float" else torch.empty(scales_shape(*shape, storage), **to)
            self.register_buffer(f"{name}_scales", scales)
        self.bias = nn.Parameter(torch.empty(self.out_features, **to)) if bias else None
        index = torch.int16 if channels <= torch.iinfo(torch.int16).max else torch.int32
        for name, present in (("labels", bool(clusters)), ("channels", pivoted)):
            self.register_buffer(name, torch.empty(channels, dtype=index, device=device) if present else None)

    def forward(self, x: Tensor) -> Tensor:
        buffers = self._buffers  # read directly: nn.Module's attributes cost a microsecond each
        return shared_linear_of_layer(
            x,
            self.weight,
            self.factor,
            buffers["labels"],
            buffers["channels"],
            self.bias,
            buffers["weight_scales"],
            buffers["factor_scales"],
            self.share,
            self.in_features,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, share={self.share}, "
            f"clusters={self.clusters}, rank={self.rank}, pivoted={self.pivoted}, storage={self.storage}, "
            f"bias={self.bias is not None}, kernel={kernel_in_use(self.weight)}"
        )


def _numbers(
    rows: int, n: int, storage: str, dtype: torch.dtype | None, device: torch.device | str | None
) -> nn.Parameter:
    """An empty matrix `[rows, n]`, as `pycompress.storage` stores it."""
    codes = {name: code for code, name in CODES.items()}
    empty = torch.empty(stored_shape(rows, n, storage), dtype=codes.get(storage, dtype), device=device)
    return nn.Parameter(empty, requires_grad=storage == "float")


class KeptRotary(nn.Module):
    """Of a rotary embedding's cosines and sines `[..., rotary]`, those of the channels that an attention keeps.

    `channels [kept]`: int32, pairs `(j, j + rotary / 2)` together, ascending.
    """

    channels: Tensor

    def __init__(self, kept: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("channels", torch.empty(kept, dtype=torch.int32, device=device))

    def forward(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return cos.index_select(-1, self.channels), sin.index_select(-1, self.channels)

    def extra_repr(self) -> str:
        return f"channels={len(self.channels)}"
