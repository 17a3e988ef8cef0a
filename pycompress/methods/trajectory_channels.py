"""Structural pruning by importance along training."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pycompress.methods.structural import STRUCTURAL, Group, Member, Structural, StructuralConfig, of_units


@dataclass(frozen=True)
class TrajectoryChannels(StructuralConfig):
    """Remove the units whose weights' importances along training have the least sum of squares.

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
    trajectory
        The folder that `TrajectoryTracker.save` wrote.

    Raises
    ------
    ValueError
        For a setting out of its range.

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
