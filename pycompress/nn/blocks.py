"""Modules of blocks whose heads or residual stream are narrower than the model's class makes them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from inspect import signature
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from pycompress._brief import brief
from pycompress.architectures.description import Branch
from pycompress.architectures.supported import ARCHITECTURES


class KeptRotary(nn.Module):
    """Of a rotary embedding's cosines and sines `[..., rotary]`, those of the channels that an attention keeps.

    `channels [kept]`: int32, pairs `(j, j + rotary / 2)` together, ascending.
    """

    channels: Tensor

    def __init__(self, kept: int, rotary: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.rotary = rotary
        self.register_buffer("channels", torch.empty(kept, dtype=torch.int32, device=device))

    def forward(self, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return cos.index_select(-1, self.channels), sin.index_select(-1, self.channels)

    def check(self, name: str, given: Mapping[str, Any] | None = None, assign: bool = False) -> None:
        """Raise `ValueError` unless the channels, or those `given`, are such pairs."""
        own, found = self.channels, (given or {}).get("channels", self.channels)
        if not isinstance(found, Tensor) or found.dtype != own.dtype or found.shape != own.shape:
            kind = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else brief(found)
            raise ValueError(f"{name}.channels must be {own.dtype} {list(own.shape)}, got {kind}")
        if found.is_meta or not len(found):
            return
        low, high = found.long().chunk(2)
        ascending = bool((low.diff() > 0).all()) and int(low[0]) >= 0 and int(low[-1]) < self.rotary // 2
        if len(low) != len(high) or not ascending or bool((high - low != self.rotary // 2).any()):
            raise ValueError(
                f"{name}.channels must be pairs of channels (j, j + {self.rotary // 2}) below {self.rotary}, ascending"
            )

    def check_loading(self, state_dict: Mapping[str, Any], prefix: str, assign: bool = False) -> None:
        """`check` what a state dict has for this layer."""
        if f"{prefix}channels" in state_dict:
            self.check(prefix.removesuffix("."), {"channels": state_dict[f"{prefix}channels"]})

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        self.check_loading(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"channels={len(self.channels)}"


class GainlessNorm(nn.Module):
    """Divides `h [..., d]`, coordinates of vectors of `hidden` numbers, by the root of these numbers' mean square."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.hidden, self.eps = hidden, eps

    def forward(self, h: Tensor) -> Tensor:
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        square = wide.square().sum(-1, keepdim=True) / self.hidden
        return (wide * torch.rsqrt(square + self.eps)).to(h.dtype)

    def extra_repr(self) -> str:
        return f"hidden={self.hidden}, eps={self.eps}"


class SlicedBlock(nn.Module):
    """A decoder block whose residual stream is narrower than the model's hidden size; `sliced_class` makes its classes.

    `shortcuts` take the stream past attention and past the MLP, each `[width after, width before]`; `projections` take
    outputs that have a norm of their own from the hidden size to the stream's width. Both are the identity where the
    width does not change. In a `parallel` block the second shortcut is the only one.
    """

    block_class: ClassVar[type[nn.Module]]
    architecture: ClassVar[str]
    branches: ClassVar[tuple[Branch, Branch]]
    arguments: ClassVar[tuple[str, ...]]
    parallel: bool
    shortcuts: nn.ModuleList
    projections: nn.ModuleList

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs |= zip(self.arguments, args, strict=False)
        written = self._branch(0, hidden_states, kwargs)
        if self.parallel:
            added: Tensor = written + self._branch(1, hidden_states, {})
            return self.shortcuts[1](hidden_states) + added  # type: ignore[no-any-return]
        hidden_states = self.shortcuts[0](hidden_states) + written
        return self.shortcuts[1](hidden_states) + self._branch(1, hidden_states, {})  # type: ignore[no-any-return]

    def _branch(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        branch = self.branches[number]
        hidden = getattr(self, branch.norm)(hidden)
        for name in branch.modules:
            found = getattr(self, name)(hidden, **kwargs)
            hidden = found[0] if isinstance(found, tuple) else found
        if branch.norm_after is not None:
            hidden = getattr(self, branch.norm_after)(hidden)
        if branch.dropout is not None and self.training:
            drop = getattr(self, branch.dropout)
            hidden = drop(hidden) if isinstance(drop, nn.Module) else dropout(hidden, drop)
        return self.projections[number](hidden)  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        return f"Sliced{self.block_class.__name__}"

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.block_class, self.architecture), self.__dict__


@cache
def sliced_class(block_class: Any, architecture: str) -> type[SlicedBlock]:
    """The subclass of an architecture's block class that runs as a `SlicedBlock`.

    It has the name of `block_class`, since that is how device maps and recorded outputs find a model's blocks.
    """
    own = {
        "block_class": block_class,
        "architecture": architecture,
        "branches": ARCHITECTURES[architecture].branches,
        "arguments": tuple(signature(block_class.forward).parameters)[2:],
    }
    return type(block_class.__name__, (SlicedBlock, block_class), own)


def _blank(block_class: Any, architecture: str) -> SlicedBlock:
    made = sliced_class(block_class, architecture)
    return made.__new__(made)
