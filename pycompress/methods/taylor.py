"""LLM-Pruner's first-order score: what the loss would lose with a unit's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig


@dataclass(frozen=True)
class Taylor(StructuralConfig):
    """Remove the units with the least `Σ |W ⊙ ∂loss/∂W|`, the same share of every block.

    `keep`: kept parameters over the targets' parameters, in (0, 1]. Raises ValueError on other values.

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
