"""What a structural method is: tensor maths from a group of channels and its statistics to a score for each unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pycompress.methods._elimination import Elimination, column_scores, row_scores
from pycompress.recipe import Config
from pycompress.search.evolution import Evolution

# What scores may be measured from, beside the weights.
NEEDS = ("gram", "mean", "saliency", "covariance", "influence", "recorded")
PARTS = ("mlp", "attention", "kv_heads")


@dataclass(frozen=True)
class ShrinkConfig(Config, abstract=True):
    """What every method that makes the dense matrices themselves smaller is told; these go first in a recipe.

    Parameters
    ----------
    keep
        Kept parameters over those of the decoder blocks' linears, in (0, 1].
    """

    keep: float = 0.8

    @property
    def structural(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fraction("keep")
        if self.targets is not None:
            raise ValueError(f"{self.name} narrows whole blocks and takes no targets; leave them out")


@dataclass(frozen=True)
class StructuralConfig(ShrinkConfig, abstract=True):
    """What every method that removes channels or blocks is told.

    Parameters
    ----------
    keep
        Kept parameters over those of the decoder blocks' linears, in (0, 1].
    parts
        Where units may go: "mlp" (channels), and either "attention" (channels, as many of every head) or "kv_heads"
        (whole key-value heads, each with the query heads that read it).
    round_to
        Widths of MLPs are multiples of it, those of heads of 8 at most; None for 64 where a quarter of the channels is
        as many.
    uniform
        The same widths for all blocks, so that transformers loads the saved model without pycompress.

    Raises
    ------
    ValueError
        For a setting out of its range.
    """

    parts: tuple[str, ...] = ("mlp",)
    round_to: int | None = None
    uniform: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("round_to", 1)
        object.__setattr__(self, "parts", (self.parts,) if isinstance(self.parts, str) else tuple(self.parts))
        if not self.parts or set(self.parts) - set(PARTS):
            raise ValueError(f"{self.name}.parts must be one or more of {', '.join(PARTS)}, got {self.parts}")
        if {"attention", "kv_heads"} <= set(self.parts):
            raise ValueError(
                f'{self.name}.parts: "attention" narrows heads and "kv_heads" drops whole ones; give one of the two'
            )


@dataclass(frozen=True)
class Member:
    """One linear of a group: a writer, whose rows are the group's channels, or a reader, whose columns are.

    `weight [N, K]`; `units [U, C]` int64: the rows (of a writer) or columns (of a reader) that each
    unit covers, or `[S, U, C]` where S sets lose a unit each at a time. The others, float32, are there where the method
    needs them. `gram [K, K]`, `mean [K]`: of x xᵀ and x over the inputs. `saliency`: `|W ⊙ ∂loss/∂W|` summed over each
    row of a writer `[N]`, each column of a reader `[K]`, in nats. `covariance [N, N]`: of the loss's gradients by the
    outputs of a reader and of queries, in nats² over the output's unit squared.
    `recorded [N, K]`: importance of each weight along training. `bias [N]`: the linear's, if it has one.
    """

    weight: Tensor
    units: Tensor
    gram: Tensor | None = None
    mean: Tensor | None = None
    saliency: Tensor | None = None
    covariance: Tensor | None = None
    recorded: Tensor | None = None
    bias: Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Linears of one block that share channels; row u of every member's `units` is unit u. Queries and keys alone have
    no reader: attention multiplies them.
    """

    writers: tuple[Member, ...]
    readers: tuple[Member, ...]

    @property
    def members(self) -> tuple[Member, ...]:
        return self.writers + self.readers

    @property
    def size(self) -> int:
        """The number of units."""
        return self.members[0].units.shape[-2]


def of_units(group: Group, of: Callable[[Member], Tensor]) -> Tensor:
    """Sum over each unit's rows of the writers and columns of the readers, `[U]`, of what `of` gives of each weight."""
    rows = [row_scores(of(member), member.units) for member in group.writers]
    columns = [column_scores(of(member), member.units) for member in group.readers]
    return torch.stack(rows + columns).sum(0)


@dataclass(frozen=True)
class Refit:
    """What compensates for removed units, in the linears that read them or in every linear of the block (`block`).

    `kind`, as in `structural.least_squares`: "weights" (`reform`), "admm" (`reform_admm`), "bias" (`compensation`).
    `sequential`: inputs are those of the pruned blocks before, else the dense model's.
    """

    kind: str = "weights"
    sequential: bool = False
    block: bool = False


@dataclass(frozen=True)
class Search:
    """Evolution that goes on from the method's own choice.

    `samples`: calibration tokens that candidates are run on, of which a share `positions` is scored. `depth`: blocks
    may be dropped. `refitted`: candidates have their `down` refitted to the dense inputs. `executor`, `workers`: as in
    `_executor.open_executor`.
    """

    evolution: Evolution
    samples: int
    positions: float
    depth: bool
    refitted: bool
    executor: str
    workers: int


# A progress bar over items, and what it says.
Bar = Callable[[Iterable[Any], str], Iterable[Any]]
# A group and the config, to each unit's importance.
Scores = Callable[[Group, Any], Tensor]
# The MLP's group of each block, the units that stay of it, the config and a bar.
Learn = Callable[[Callable[[int], Group], list[int], Any, Bar], Scores]


@dataclass(frozen=True)
class Structural:
    """`scores(group, config)` gives each unit's importance `[U]` float64: the lowest go first. `eliminate(group,
    config)` gives an order with its error instead, of queries and keys apart from values and o; `blocks(influence [B],
    config)` the importance of whole blocks `[B]`; `learn(groups, counts, config, bar)` gives `scores` once it has seen
    the MLPs of all blocks. A method has one of the four.

    `needs`: of `NEEDS`, what is to be measured. `compared`: scores hold across blocks and groups, so that the whole
    model shares one ranking; `by_error`: the budget is allocated by the eliminations' errors; else each block keeps its
    share. `ranking(config)`: the settings that decide scores and order, beside `parts`. `refit(config)`: None leaves
    what stays as it is. `search(config)`: None takes the choice as it is.
    """

    scores: Scores | None = None
    eliminate: Callable[[Group, Any], Elimination] | None = None
    blocks: Callable[[Tensor, Any], Tensor] | None = None
    learn: Learn | None = None
    needs: tuple[str, ...] = ()
    compared: Callable[[Any], bool] = lambda config: False
    by_error: Callable[[Any], bool] = lambda config: False
    ranking: Callable[[Any], tuple[Any, ...]] = lambda config: ()
    refit: Callable[[Any], Refit | None] = lambda config: None
    search: Callable[[Any], Search | None] = lambda config: None


STRUCTURAL: dict[type[Config], Structural] = {}
