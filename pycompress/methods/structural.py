"""What a structural method is: tensor maths from a group of channels and its statistics to a score for each unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from pycompress.recipe import Config

# What scores may be measured from, beside the weights.
NEEDS = ("gram", "mean", "saliency", "influence")


@dataclass(frozen=True)
class Member:
    """One linear of a group: a writer, whose rows are the group's channels, or a reader, whose columns are.

    `weight [N, K]`; `units [U, C]` int64: the rows (of a writer) or columns (of a reader) that each unit covers. The
    others, float32, are there where the method needs them. `gram [K, K]`, `mean [K]`: of x xᵀ and x over the inputs.
    `saliency`: `|W ⊙ ∂loss/∂W|` summed over each row of a writer `[N]`, each column of a reader `[K]`, in nats.
    """

    weight: Tensor
    units: Tensor
    gram: Tensor | None = None
    mean: Tensor | None = None
    saliency: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Linears of one block that share channels; row u of every member's `units` is unit u."""

    writers: tuple[Member, ...]
    readers: tuple[Member, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        return self.writers + self.readers

    @property
    def size(self) -> int:
        """The number of units."""
        return len(self.members[0].units)


@dataclass(frozen=True)
class Structural:
    """`scores(group, config)` gives each unit's importance `[U]` float64: the lowest go first. `blocks(influence [B],
    config)` gives that of whole blocks `[B]`; a method has one of the two.

    `needs`: of `NEEDS`, what is to be measured. `compared`: scores hold across blocks and groups, so that the whole
    model shares one ranking; else each block keeps its share. `refit`: what makes up for removed units, "weights"
    (`reform.reform`), "bias" (`reform.compensation`) or "none".
    """

    scores: Callable[[Group, Any], Tensor] | None = None
    blocks: Callable[[Tensor, Any], Tensor] | None = None
    needs: tuple[str, ...] = ()
    compared: Callable[[Any], bool] = lambda config: False
    refit: str = "none"


STRUCTURAL: dict[type[Config], Structural] = {}
