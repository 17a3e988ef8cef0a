"""What a structurally pruned model keeps of the dense one: channels, heads and blocks, as indices. Tensors only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIELDS = {"mlp": 1, "qk": 2, "vo": 2, "kv_heads": 1}


@dataclass(frozen=True, eq=False)
class Kept:
    """What one block keeps: int64 indices on the CPU, ascending; None keeps all.

    `mlp [m]`: MLP channels. `qk [S, w]`, `vo [kv_heads', w]`: channels of a head, one row a kept key-value head, or for
    `qk` a single row that serves them all (S = 1). `kv_heads [kv_heads']`: key-value heads, each with the query heads
    that read it. Sequences are converted. Raises `ValueError` for indices that are empty, negative, repeated or out of
    order; `Geometry.check` says whether they fit a block.
    """

    mlp: Tensor | None = None
    qk: Tensor | None = None
    vo: Tensor | None = None
    kv_heads: Tensor | None = None

    def __post_init__(self) -> None:
        for name, ndim in FIELDS.items():
            object.__setattr__(self, name, _indices(name, getattr(self, name), ndim))
        if self.qk is not None and self.vo is not None and self.qk.shape[1] != self.vo.shape[1]:
            raise ValueError(
                f"qk keeps {self.qk.shape[1]} channels a head and vo {self.vo.shape[1]}; the heads of a block have "
                f"one width, so keep as many of each"
            )

    def to_dict(self) -> dict[str, Any]:
        """Lists of indices by field, without the fields that keep all; `from_dict` takes it back."""
        found = {name: getattr(self, name) for name in FIELDS}
        return {name: index.tolist() for name, index in found.items() if index is not None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Kept:
        unknown = set(fields) - set(FIELDS)
        if unknown:
            raise ValueError(f"unknown fields {', '.join(sorted(unknown))}; a block keeps {', '.join(FIELDS)}")
        return cls(**fields)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kept) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[object, ...]:
        found = [getattr(self, name) for name in FIELDS]
        return tuple(None if index is None else (index.shape, index.numpy().tobytes()) for index in found)


@dataclass(frozen=True)
class Subnet:
    """What each block of a model keeps, first to last; a block that is None is dropped.

    Raises `ValueError` when no block is left.
    """

    blocks: tuple[Kept | None, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if not any(kept is not None for kept in self.blocks):
            raise ValueError("the subnet keeps no block; keep at least one")

    @classmethod
    def whole(cls, depth: int) -> Subnet:
        """All of a model of `depth` blocks."""
        return cls((Kept(),) * depth)

    @property
    def depth(self) -> int:
        """The number of blocks kept."""
        return len(self.kept_blocks)

    @property
    def kept_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that stay, in order."""
        return tuple(index for index, kept in enumerate(self.blocks) if kept is not None)

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; `from_dict` takes it back."""
        return {"blocks": [None if kept is None else kept.to_dict() for kept in self.blocks]}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Subnet:
        return cls(tuple(None if kept is None else Kept.from_dict(kept) for kept in fields["blocks"]))


def _indices(name: str, values: Any, ndim: int) -> Tensor | None:
    if values is None:
        return None
    index = torch.as_tensor(values).detach().cpu()
    if index.ndim != ndim or index.numel() == 0:
        what = "one row of indices" if ndim == 1 else "rows of indices, [rows, width]"
        raise ValueError(f"{name} must be {what}, at least one each, got shape {list(index.shape)}")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(f"{name} must be indices, got {index.dtype}; of a mask take mask.nonzero()")
    index = index.to(torch.int64, copy=True).contiguous()
    if int(index.min()) < 0 or bool((index.diff(dim=-1) <= 0).any()):
        raise ValueError(f"{name} must be ascending indices from 0 on, each once, got {index.tolist()}")
    return index
