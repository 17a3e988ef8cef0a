"""Structural pruning by magnitude: the baseline that needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig, of_units


@dataclass(frozen=True)
class Magnitude(StructuralConfig):
    """Remove the units whose weights have the least sum of squares, the same share of every block.

    `keep`: kept parameters over the targets' parameters, in (0, 1]. Raises ValueError on other values.
    """


def scores(group: Group, config: Magnitude) -> Tensor:
    """Sum of squares of the weights in each unit's rows and columns, `[U]`."""
    return of_units(group, lambda member: member.weight.double().square())


STRUCTURAL[Magnitude] = Structural(scores)
