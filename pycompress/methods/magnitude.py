"""Structural pruning by magnitude: the baseline that needs no data."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.importance import column_scores, row_scores
from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig


@dataclass(frozen=True)
class Magnitude(StructuralConfig):
    """Remove the units whose weights have the least sum of squares, the same share of every block.

    `keep`: kept parameters over the targets' parameters, in (0, 1]. Raises ValueError on other values.
    """


def scores(group: Group, config: Magnitude) -> Tensor:
    """Sum of squares of the weights in each unit's rows and columns, `[U]`."""
    rows = [row_scores(member.weight.double().square(), member.units) for member in group.writers]
    columns = [column_scores(member.weight.double().square(), member.units) for member in group.readers]
    return torch.stack(rows + columns).sum(0)


STRUCTURAL[Magnitude] = Structural(scores)
