"""Structural pruning by importance along training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Member, Structural, StructuralConfig, of_units


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

    def squares(member: Member) -> Tensor:
        assert member.recorded is not None
        return member.recorded.double().square()

    return of_units(group, squares)


STRUCTURAL[TrajectoryChannels] = Structural(scores, needs=("recorded",), ranking=lambda config: (config.trajectory,))
