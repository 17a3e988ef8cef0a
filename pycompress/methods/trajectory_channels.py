"""Structural pruning by importance along training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.importance import column_scores, row_scores
from pycompress.methods.structural import STRUCTURAL, Group, Structural, StructuralConfig


@dataclass(frozen=True)
class TrajectoryChannels(StructuralConfig):
    """Remove the units whose weights' importances along training have the least sum of squares, as `Magnitude` does of
    the weights.

    `keep`: kept parameters over the targets' parameters, in (0, 1]. `trajectory`: the folder that
    `TrajectoryTracker.save` wrote. Raises ValueError on other values.

    Reference: arXiv:2502.17071 for the importance.
    """

    trajectory: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trajectory is None:
            raise ValueError("TrajectoryChannels needs trajectory, the folder that TrajectoryTracker.save wrote")
        object.__setattr__(self, "trajectory", str(self.trajectory))

    @property
    def recorded(self) -> str | None:
        return self.trajectory


def scores(group: Group, config: TrajectoryChannels) -> Tensor:
    """Sum of squared importances in each unit's rows and columns, `[U]`."""
    found = []
    for members, sums in ((group.writers, row_scores), (group.readers, column_scores)):
        for member in members:
            assert member.recorded is not None
            found.append(sums(member.recorded.double().square(), member.units))
    return torch.stack(found).sum(0)


STRUCTURAL[TrajectoryChannels] = Structural(scores, needs=("recorded",), ranking=lambda config: (config.trajectory,))
