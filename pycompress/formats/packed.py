"""Packed weights: what a compressed matrix is made of, how many bytes it takes, how it unpacks.

A format is plain tensors and sizes; it knows nothing of modules or models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pycompress.formats import codes
from pycompress.formats import zeros as sparse

# Share of zeros from which a CPU multiplies by a bitmap faster than by the dense matrix.
BITMAP_PAYS = 0.7
TENSORS = ("weight", "factor", "labels", "channels", "weight_scales", "factor_scales")


@dataclass(frozen=True)
class SharedChannels:
    """Channels that share `k` centroids, plus a rank-`r` correction: `Ŵ = C[labels] + U V`.

    `share="output"`: rows of `W [N, K]` share centroids `C [k, K]`; `weight` is `[C; V]`, `[k + r, K]`, `factor`
    is `U [N, r]`, `labels` has one entry a row. `share="input"`: columns share centroids `C [k, N]`; `weight` is
    `[Cᵀ | U]`, `[N, k + r]`, `factor` is `V [r, K]`, `labels` has one entry a column. With `k = 0` there are no
    labels and the format is plain low rank.

    Pivoted (`channels` given): r of the channels, the pivots, are a basis for the correction of the others, so their
    part of the factor is the identity and is not stored. `channels` is a permutation with the pivots first; `factor`
    is `U [N - r, r]` or `V [r, K - r]` for the channels after them. The same product in r² fewer numbers. With all of
    the channels as pivots, the `weight` is the whole matrix, its channels in that order, and the `factor` is empty.

    In `int8` or `int4`, `weight` and `factor` are codes as in `pycompress.formats.codes`, with their scales.

    Reference: arXiv:2501.08631, section 3 (without the dense restoration); arXiv:2501.19090 for pivoting.
    """

    share: str
    weight: Tensor
    factor: Tensor
    labels: Tensor | None
    channels: Tensor | None
    shape: tuple[int, int]
    weight_scales: Tensor | None = None
    factor_scales: Tensor | None = None

    name: ClassVar[str] = "shared_channels"

    def __str__(self) -> str:
        if self.whole:
            return f"whole {self.storage}"
        parts = [self.share] if self.clusters else ["low rank"]
        parts += [f"k={self.clusters}"] if self.clusters else []
        parts += [f"r={self.rank}"] + (["pivoted"] if self.channels is not None else [])
        return " ".join(parts + ([self.storage] if self.storage != "float" else []))

    @property
    def storage(self) -> str:
        return codes.storage_of(self.weight)

    @property
    def rank(self) -> int:
        return codes.width_of(self.factor) if self.share == "output" else len(self.factor)

    @property
    def clusters(self) -> int:
        return (len(self.weight) if self.share == "output" else codes.width_of(self.weight)) - self.rank

    @property
    def whole(self) -> bool:
        """Whether the weight is stored as it is: every channel is a pivot, and nothing is left to a factor."""
        return self.clusters == 0 and self.channels is not None and self.rank == len(self.channels)

    @property
    def nbytes(self) -> int:
        """Bytes as stored, indices included."""
        return _nbytes(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by the names the layer and the saved file use."""
        named = ((name, getattr(self, name)) for name in TENSORS)
        return {name: tensor for name, tensor in named if tensor is not None}

    def spec(self) -> dict[str, Any]:
        """Everything but the tensors, as JSON: enough to rebuild the layer's skeleton."""
        return {
            "format": self.name,
            "share": self.share,
            "clusters": self.clusters,
            "rank": self.rank,
            "pivoted": self.channels is not None,
            "storage": self.storage,
            "shape": list(self.shape),
        }

    def unpack(self) -> Tensor:
        """The dense matrix `[N, K]` this stands for, in float32."""
        weight, factor, k = codes.dequantize(self.weight, self.weight_scales), self.whole_factor(), self.clusters
        if self.share == "output":
            dense = factor @ weight[k:]
            return dense if self.labels is None else dense + weight[:k][self.labels.long()]
        dense = weight[:, k:] @ factor
        return dense if self.labels is None else dense + weight[:, :k][:, self.labels.long()]

    def whole_factor(self) -> Tensor:
        """`U [N, r]` or `V [r, K]` with the pivots' identity filled in, in float32."""
        return whole_factor(codes.dequantize(self.factor, self.factor_scales), self.channels, self.share)


@dataclass(frozen=True)
class Rounded:
    """Weights rounded to `bits` and kept as ordinary values; `nbytes` counts them as if they were packed."""

    values: Tensor
    bits: int
    scales: int

    name: ClassVar[str] = "rounded"

    def __str__(self) -> str:
        return f"rounded to {self.bits} bits"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes plus two 16-bit numbers (scale, zero) for each of the `scales` groups."""
        return (self.values.numel() * self.bits + 7) // 8 + 4 * self.scales

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.values}

    def spec(self) -> dict[str, Any]:
        return {"format": self.name, "bits": self.bits, "scales": self.scales, "shape": list(self.shape)}

    def unpack(self) -> Tensor:
        return self.values.float()


@dataclass(frozen=True)
class Sparse24:
    """Two of every four columns of a row; `values [N, K / 2]` and `positions [N, K / 8]` as in `formats.zeros`."""

    values: Tensor
    positions: Tensor

    name: ClassVar[str] = "sparse24"

    def __str__(self) -> str:
        return "2:4 packed"

    @property
    def shape(self) -> tuple[int, int]:
        return (self.values.shape[0], 2 * self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes as stored, positions included."""
        return _nbytes(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.values, "positions": self.positions}

    def spec(self) -> dict[str, Any]:
        return {"format": self.name, "shape": list(self.shape)}

    def unpack(self) -> Tensor:
        return sparse.unpack24(self.values.float(), self.positions)


@dataclass(frozen=True)
class Bitmap:
    """The weights that are not zero, `values [kept]`, and a bit for every weight; see `pycompress.formats.zeros`.

    `bitmap [N, 8 * ceil(K / 64)]` uint8, `offsets [ceil(N / 16) + 1]` int32.
    """

    values: Tensor
    bitmap: Tensor
    offsets: Tensor
    shape: tuple[int, int]

    name: ClassVar[str] = "bitmap"

    def __str__(self) -> str:
        zeros = f"{1 - len(self.values) / math.prod(self.shape):.0%} zeros"
        if bitmap_pays(self.shape, len(self.values), self.values.device):
            return f"bitmap, {zeros}"
        return f"{zeros}, run dense: bitmap pays from {BITMAP_PAYS:.0%} zeros on the CPU"

    @property
    def nbytes(self) -> int:
        """Bytes as stored, bits and offsets included."""
        return _nbytes(self.tensors())

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.values, "bitmap": self.bitmap, "offsets": self.offsets}

    def spec(self) -> dict[str, Any]:
        return {"format": self.name, "kept": len(self.values), "shape": list(self.shape)}

    def unpack(self) -> Tensor:
        return sparse.unpack_bitmap(self.values.float(), self.bitmap, self.offsets, self.shape[1])


Packed = SharedChannels | Rounded | Sparse24 | Bitmap


def rebuild(spec: dict[str, Any], tensors: dict[str, Tensor]) -> Packed:
    """The packed weight whose `spec()` and `tensors()` these are. Raises `ValueError` for an unknown format."""
    shape = (spec["shape"][0], spec["shape"][1])
    if spec["format"] == Sparse24.name:
        return Sparse24(tensors["weight"], tensors["positions"])
    if spec["format"] == Bitmap.name:
        return Bitmap(tensors["weight"], tensors["bitmap"], tensors["offsets"], shape)
    if spec["format"] == SharedChannels.name:
        return SharedChannels(spec["share"], shape=shape, **{name: tensors.get(name) for name in TENSORS})  # type: ignore[arg-type]
    if spec["format"] == Rounded.name:
        return Rounded(tensors["weight"], spec["bits"], spec["scales"])
    known = ", ".join(format.name for format in (SharedChannels, Rounded, Sparse24, Bitmap))
    raise ValueError(f"unknown format {spec['format']!r}; this version knows {known}")


def pack_zeros(dense: Tensor, of_four: bool = False) -> Sparse24 | Bitmap:
    """A matrix `[N, K]` stored without its zeros; `of_four`: every four columns hold at most two others.

    Two of four are stored as such where K is a multiple of 8, everything else as a bitmap.
    """
    if of_four and dense.shape[1] % 8 == 0:
        return Sparse24(*sparse.pack24(dense))
    return Bitmap(*sparse.pack_bitmap(dense), (dense.shape[0], dense.shape[1]))


def bitmap_pays(shape: tuple[int, int], kept: int, device: torch.device) -> bool:
    """Whether a matrix with `kept` weights that are not zero is multiplied by as a bitmap, or else dense."""
    return device.type == "cpu" and 1 - kept / math.prod(shape) >= BITMAP_PAYS


def _nbytes(tensors: dict[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def whole_factor(factor: Tensor, channels: Tensor | None, share: str) -> Tensor:
    """`U [N, r]` or `V [r, K]`, its pivots' identity filled in where `channels` says which they are."""
    if channels is None:
        return factor
    along = 0 if share == "output" else 1
    identity = torch.eye(factor.shape[1 - along], dtype=factor.dtype, device=factor.device)
    return torch.cat([identity, factor], dim=along).index_select(along, torch.argsort(channels.long()))


def pack_shared(
    share: str, centroids: Tensor, u: Tensor, v: Tensor, labels: Tensor | None, dtype: torch.dtype, pivot: bool = True
) -> SharedChannels:
    """Stack centroids and factors into the stored layout, in floats of `dtype`.

    `centroids [k, K]` (output) or `[k, N]` (input), `u [N, r]`, `v [r, K]`, `labels` of any integer type. `pivot`
    stores the factor without its pivots' identity.
    """
    shape = (u.shape[0], v.shape[1])
    channels: Tensor | None = None
    if pivot and v.shape[0]:
        if share == "output":
            channels, u, v = _pivoted(u, v)
        else:
            channels, rest, base = _pivoted(v.T, u.T)
            u, v = base.T, rest.T
    weight, factor = (torch.cat([centroids, v]), u) if share == "output" else (torch.cat([centroids.T, u], dim=1), v)
    count = shape[0 if share == "output" else 1]
    return SharedChannels(
        share,
        weight.to(dtype).contiguous(),
        factor.to(dtype).contiguous(),
        None if labels is None else indices(labels, count),
        None if channels is None else indices(channels, count),
        shape,
    )


def _pivoted(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rewrite `factor [n, r] @ basis [r, d]` on r of its own rows: channels `[n]`, rest `[n - r, r]`, basis `[r, d]`.

    The pivots are those of Gaussian elimination with partial pivoting, which keeps the rest's entries near one.
    """
    rank = factor.shape[1]
    wide = factor.double()
    # Of a factor that has less than its rank a pivot is zero, and what stands below it is too.
    lower, swaps, _ = torch.linalg.lu_factor_ex(wide)
    order = list(range(len(wide)))
    for row, other in enumerate(swaps.tolist()):
        order[row], order[other - 1] = order[other - 1], order[row]
    channels = torch.tensor(order, device=factor.device)
    rest = torch.linalg.solve_triangular(lower[:rank], lower[rank:], upper=False, unitriangular=True, left=False)
    return channels, rest.to(factor.dtype), (wide[channels[:rank]] @ basis.double()).to(basis.dtype)


def indices(index: Tensor, channels: int) -> Tensor:
    """Numbers of channels in the smallest type that holds them."""
    return index.to(torch.int16 if channels <= torch.iinfo(torch.int16).max else torch.int32).contiguous()
