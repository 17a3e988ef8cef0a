"""LLM-Pruner's first-order score: what the loss would lose with a unit's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig


@dataclass(frozen=True)
class Taylor(StructuralConfig):
    """Remove the units with the least `Σ |W ⊙ ∂loss/∂W|`, the same share of every block.

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

    Reference: arXiv:2305.11627, the element-wise, first-order importance of its code.
    """

    @property
    def needs_calibration(self) -> bool:
        return True


def scores(group: Group, config: Taylor) -> Tensor:
    """The saliency of each unit's rows and columns over all members of the group, `[U]`, in nats."""
    found = []
    for member in group.members:
        assert member.saliency is not None
        found.append(member.saliency.double()[member.units].sum(1))
    return torch.stack(found).sum(0)


STRUCTURAL[Taylor] = Structural(scores, needs=("saliency",))
