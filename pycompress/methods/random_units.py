"""Structural pruning at random: what any score has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig


@dataclass(frozen=True)
class Random(StructuralConfig):
    """Remove units at random, the same share of every block.

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
    seed
        Of the order, which is the same for groups of one size.

    Raises
    ------
    ValueError
        For a setting out of its range.
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
