"""Whole decoder blocks dropped: those that change their input least, or the last ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Structural, StructuralConfig

ORDERS = ("influence", "last")


@dataclass(frozen=True)
class LayerDrop(StructuralConfig):
    """Drop whole decoder blocks, as many as `keep` asks for.

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
    order
        "influence" drops the blocks whose output is most like their input, "last" the last ones.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Reference: arXiv:2403.03853 (block influence); arXiv:2305.14864 (the last ones).
    """

    order: str = "influence"

    @property
    def needs_calibration(self) -> bool:
        return self.order == "influence"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("order", *ORDERS)


def blocks(influence: Tensor, config: LayerDrop) -> Tensor:
    """Importance of each block, `[B]`: its influence, or with "last" how far it is from the end."""
    if config.order == "influence":
        return influence.double()
    return torch.arange(len(influence), 0, -1, dtype=torch.float64)


STRUCTURAL[LayerDrop] = Structural(blocks=blocks, needs=("influence",))
