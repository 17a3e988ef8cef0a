"""Low rank in the metric of the inputs: the end of SWSC's curve that has no clusters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pycompress.formats.packed import Packed
from pycompress.methods import swsc
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.recipe import Config


@dataclass(frozen=True)
class LowRank(Config):
    """`Ŵ = U V`, optimal for the layer's outputs on the calibration data, or for its weights.

    Parameters
    ----------
    keep
        Kept bytes over the targets' bytes, in (0, 1].
    weighting
        As in `SWSC`.
    rank
        The same rank for every target, in place of `keep`.
    allocation, pivot, storage
        As in `SWSC`.
    targets
        Roles of linears ("q", "down") or patterns over module names; None for every linear of the decoder blocks.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Examples
    --------
    >>> import pycompress
    >>> pycompress.LowRank(rank=16).needs_calibration
    True

    Reference: the truncated SVD in the metric of the inputs (Eckart and Young, 1936).
    """

    keep: float = 0.8
    weighting: str = "loss"
    rank: int | None = None
    allocation: str = "loss"
    pivot: bool = True
    storage: str | None = None

    @property
    def needs_calibration(self) -> bool:
        return self.weighting != "none"

    @property
    def shared(self) -> bool:
        return self.as_swsc().shared

    @property
    def by_loss(self) -> bool:
        return self.as_swsc().by_loss

    @property
    def sensitive(self) -> bool:
        return self.as_swsc().sensitive

    def kept_bytes(self, nbytes: int) -> int:
        return self.as_swsc().kept_bytes(nbytes)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.as_swsc()

    def as_swsc(self) -> swsc.SWSC:
        return swsc.SWSC(
            self.keep,
            weighting=self.weighting,
            clusters=0,
            rank=self.rank,
            allocation=self.allocation,
            pivot=self.pivot,
            storage=self.storage,
            targets=self.targets,
        )


def _compress(
    weight: Tensor, statistics: Statistics | None, config: LowRank, budget: int | None, measured: Curve | None
) -> Packed | None:
    return swsc.compress(weight, statistics, config.as_swsc(), budget, measured)


def _curve(weight: Tensor, statistics: Statistics | None, config: LowRank) -> Curve:
    return swsc.curve(weight, statistics, config.as_swsc())


METHODS[LowRank] = Method(
    _compress,
    _curve,
    check=lambda shape, dtype, config: swsc.check(shape, dtype, config.as_swsc()),
)
