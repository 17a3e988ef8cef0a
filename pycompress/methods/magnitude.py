"""Structural pruning by magnitude: the baseline that needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig, of_units


@dataclass(frozen=True)
class Magnitude(StructuralConfig):
    """Remove the units whose weights have the least sum of squares, the same share of every block.

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


def scores(group: Group, config: Magnitude) -> Tensor:
    """Sum of squares of the weights in each unit's rows and columns, `[U]`."""
    return of_units(group, lambda member: member.weight.double().square())


STRUCTURAL[Magnitude] = Structural(scores)
