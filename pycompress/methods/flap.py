"""FLAP: channels that hardly fluctuate are replaced by their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods._elimination import column_scores
from pycompress.methods.structural import STRUCTURAL, Group, Refit, Structural, StructuralConfig

STRUCTURES = ("adaptive", "uniform")


@dataclass(frozen=True)
class FLAP(StructuralConfig):
    """Remove the units whose channels fluctuate least around their mean, and put the mean into the readers' bias.

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
    structure
        "adaptive" ranks the standardised scores of all blocks together, "uniform" takes the same share of every block.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Reference: arXiv:2312.11983.
    """

    structure: str = "adaptive"

    @property
    def needs_calibration(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("structure", *STRUCTURES)


def scores(group: Group, config: FLAP) -> Tensor:
    """`Σ var(x_j) ‖W_:j‖²` over each unit's columns of the group's readers, `[U]`, standardised within the group."""
    found = []
    for member in group.readers:
        assert member.gram is not None
        assert member.mean is not None
        variance = (member.gram.double().diagonal() - member.mean.double().square()).clamp(min=0)
        found.append(column_scores(member.weight.double().square() * variance, member.units))
    total = torch.stack(found).sum(0)
    return (total - total.mean()) / total.std().clamp(min=1e-300)


STRUCTURAL[FLAP] = Structural(
    scores,
    needs=("gram", "mean"),
    compared=lambda config: config.structure == "adaptive",
    refit=lambda config: Refit("bias"),
)
