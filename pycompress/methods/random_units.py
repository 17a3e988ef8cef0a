"""Structural pruning at random: what any score has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig


@dataclass(frozen=True)
class Random(StructuralConfig):
    """Remove units at random, the same share of every block.

    `keep`: kept parameters over the targets' parameters, in (0, 1]. `seed`: of the order, which is the same for
    groups of one size. Raises ValueError on other values.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_count("seed", 0)


def scores(group: Group, config: Random) -> Tensor:
    """A random permutation, `[U]`."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(group.size, generator=generator).double().to(group.members[0].weight.device)


STRUCTURAL[Random] = Structural(scores, ranking=lambda config: (config.seed,))
