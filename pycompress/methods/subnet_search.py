"""Subnets found without training: which channels to inherit, how many in each block, what remains refitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.methods.importance import Elimination, column_scores, eliminate, phi, row_scores
from pycompress.methods.structural import STRUCTURAL, Group, Refit, Structural, StructuralConfig

IMPORTANCES = ("elimination", "phi")
ALLOCATIONS = ("uniform", "loss")
REFORMS = ("exact", "admm", "none")


@dataclass(frozen=True)
class SubnetSearch(StructuralConfig):
    """Inherit the channels whose removal the others can least make up for, and refit what reads them.

    `importance`: "elimination" removes channels one after the other, each time those that cost the least once the
    others have made up for them; "phi" takes the paper's scores, which look at each channel alone. `allocation`:
    "uniform" keeps the same share of every block, "loss" spends one budget where the elimination's error says it saves
    most. `reform`: "exact" least squares, "admm" the paper's iteration, "none". `sequential`: refit on the inputs that
    the pruned blocks give, else on the dense model's. Raises ValueError on other values.

    Reference: arXiv:2409.17372.
    """

    importance: str = "elimination"
    allocation: str = "loss"
    reform: str = "exact"
    sequential: bool = False

    @property
    def needs_calibration(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("importance", *IMPORTANCES)
        self.check_choice("allocation", *ALLOCATIONS)
        self.check_choice("reform", *REFORMS)
        if self.importance == "phi" and self.allocation == "loss":
            raise ValueError('SubnetSearch(allocation="loss") needs importance="elimination", which knows the loss')


def ranked(group: Group, config: SubnetSearch) -> Elimination:
    """The group's units, the first to remove first."""
    if config.importance == "phi":
        order = _phi(group).argsort(stable=True)
        return Elimination(order[None].cpu(), torch.zeros(len(order), dtype=torch.float64))
    (reader,) = group.readers
    assert reader.gram is not None
    return eliminate(reader.weight, reader.gram, reader.units[None], reader.covariance)


def _phi(group: Group) -> Tensor:
    """Row scores of the writers plus column scores of the readers, `[U]`."""
    found = []
    for members, score in ((group.writers, row_scores), (group.readers, column_scores)):
        for member in members:
            assert member.gram is not None
            found.append(score(phi(member.weight, member.gram), member.units))
    return torch.stack(found).sum(0)


def _refit(config: SubnetSearch) -> Refit | None:
    if config.reform == "none":
        return None
    return Refit("weights" if config.reform == "exact" else "admm", config.sequential and config.reform == "exact")


STRUCTURAL[SubnetSearch] = Structural(
    eliminate=ranked,
    needs=("gram", "covariance"),
    by_error=lambda config: config.allocation == "loss",
    refit=_refit,
)
