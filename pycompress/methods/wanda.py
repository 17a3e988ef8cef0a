"""Wanda's weights times activations, summed over channels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods._elimination import column_scores
from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig


@dataclass(frozen=True)
class Wanda(StructuralConfig):
    """Remove the units whose channels count least in what reads them: `Σ |W_ij| ‖x_j‖`, the same share of every block.

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

    Reference: arXiv:2306.11695, summed over the columns of a unit as in arXiv:2312.11983's Wanda-sp.
    """

    @property
    def needs_calibration(self) -> bool:
        return True


def scores(group: Group, config: Wanda) -> Tensor:
    """`Σ |W_ij| √(mean x_j²)` over each unit's columns of the group's readers, `[U]`."""
    found = []
    for member in group.readers:
        assert member.gram is not None
        norms = member.gram.double().diagonal().sqrt()
        found.append(column_scores(member.weight.double().abs() * norms, member.units))
    return torch.stack(found).sum(0)


STRUCTURAL[Wanda] = Structural(scores, needs=("gram",))
