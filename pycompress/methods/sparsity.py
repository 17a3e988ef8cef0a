"""Zeros in a weight: which weights go, by what score, in what pattern."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pycompress.formats.packed import Packed, pack_zeros
from pycompress.methods._gptq import inverse_cholesky
from pycompress.methods._sparsegpt import least, sparsegpt
from pycompress.methods.magnitude import Magnitude
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.methods.trajectory_channels import TrajectoryChannels
from pycompress.methods.wanda import Wanda
from pycompress.recipe import Config, Matrices

SCORES = ("magnitude", "wanda", "sparsegpt", "trajectory")
PATTERNS = '"unstructured", "channels" or "N:M" such as "2:4"'
GROUP = re.compile(r"(\d+):(\d+)")
# Sizes of a matrix that a shared budget chooses between.
LEVELS = 256


@dataclass(frozen=True)
class Prune(Config):
    """Set the weights of least importance to zero, and store what stays.

    Wanda and SparseGPT see the inputs that the linears before give once pruned.

    Parameters
    ----------
    score
        "magnitude"; "wanda", `|W_ij| √(mean x_j²)`, compared within each row; "sparsegpt", whose remaining weights
        compensate for those that go; "trajectory", importance along training.
    pattern
        "unstructured"; "N:M", N weights kept of every M consecutive inputs of a row; "channels", whole coupled rows
        and columns, by the structural method of that score.
    sparsity
        Share of zeros, in (0, 1); of "channels", of parameters that go.
    rate
        In its place, with "magnitude" and "trajectory": weights whose importance is below `std(|W|) * rate` go.
    scope
        "layer", each matrix for itself, or "global", one threshold or one share of zeros over all targets, which
        Wanda and SparseGPT allocate by the loss.
    trajectory
        The folder that `TrajectoryTracker.save` wrote.
    targets
        Roles of linears ("q", "down") or patterns over module names; None for every linear of the decoder blocks.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Examples
    --------
    >>> import pycompress
    >>> pycompress.Prune("sparsegpt", "2:4").keep
    0.5

    Reference: arXiv:2306.11695 (Wanda), arXiv:2301.00774 (SparseGPT), arXiv:2502.17071 (trajectory and rate).
    """

    score: str = "sparsegpt"
    pattern: str = "unstructured"
    sparsity: float | None = None
    rate: float | None = None
    scope: str = "layer"
    trajectory: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pattern", _spelled(self.pattern))
        self.check_choice("score", *SCORES)
        self.check_choice("scope", "layer", "global")
        if self.trajectory is not None:
            object.__setattr__(self, "trajectory", str(self.trajectory))
        if (self.score == "trajectory") != (self.trajectory is not None):
            raise ValueError(
                f'Prune.trajectory goes with score="trajectory": the folder that TrajectoryTracker.save wrote; got '
                f"score={self.score!r}, trajectory={self.trajectory!r}"
            )
        if self.group is not None:
            self._check_group(*self.group)
        elif self.pattern in ("unstructured", "channels"):
            self._check_size()
        else:
            raise ValueError(f"Prune.pattern must be {PATTERNS}, got {self.pattern!r}")
        self.resolved()

    def _check_group(self, kept: int, of: int) -> None:
        if not 0 < kept < of:
            raise ValueError(f"Prune.pattern N:M keeps N of M weights, with 0 < N < M; got {self.pattern!r}")
        if self.sparsity not in (None, 1 - kept / of) or self.rate is not None or self.scope != "layer":
            raise ValueError(
                f"Prune.pattern {self.pattern} says how many of {of} weights stay; leave out sparsity, rate and scope"
            )

    def _check_size(self) -> None:
        if (self.sparsity is None) == (self.rate is None):
            raise ValueError(
                f"Prune needs sparsity, the share of zeros, or rate, the threshold in standard deviations: one of the "
                f"two; got sparsity={self.sparsity!r}, rate={self.rate!r}"
            )
        for name, value, most in (("sparsity", self.sparsity, 1.0), ("rate", self.rate, float("inf"))):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if value is not None and not (number and 0 < value < most):
                raise ValueError(f"Prune.{name} must be in (0, {most:g}), got {value!r}")
        if self.rate is not None and (self.score not in ("magnitude", "trajectory") or self.pattern == "channels"):
            raise ValueError(
                f'Prune.rate is a threshold on magnitudes: it goes with score="magnitude" or "trajectory" and '
                f'pattern="unstructured", got {self.score!r} and {self.pattern!r}; give sparsity instead'
            )
        if self.pattern == "channels" and self.scope != "layer":
            raise ValueError('Prune.scope "global" is for pattern="unstructured"; leave it out')

    @property
    def group(self) -> tuple[int, int] | None:
        """(N, M) of the pattern N:M."""
        found = GROUP.fullmatch(self.pattern)
        return None if found is None else (int(found[1]), int(found[2]))

    @property
    def zeros(self) -> float:
        """Share of zeros, of all targets."""
        if self.group is not None:
            return 1 - self.group[0] / self.group[1]
        assert self.sparsity is not None
        return self.sparsity

    @property
    def keep(self) -> float:
        """Share of weights that stay."""
        return 1 - self.zeros

    @property
    def needs_calibration(self) -> bool:
        return self.score in ("wanda", "sparsegpt")

    @property
    def recorded(self) -> str | None:
        return self.trajectory

    @property
    def shared(self) -> bool:
        return self.scope == "global" and self.rate is None

    @property
    def sensitive(self) -> bool:
        return self.scope == "global" and self.needs_calibration

    @property
    def staged(self) -> bool:
        return self.score == "sparsegpt" or (self.score == "wanda" and self.group is None)

    def kept_bytes(self, nbytes: int) -> int:
        return math.floor(self.keep * nbytes)

    def budgets(self, matrices: Matrices) -> dict[str, int] | None:
        """Bytes of the values that one threshold over all matrices leaves of each."""
        if self.scope != "global" or self.rate is None:
            return None
        count, total, square = 0, 0.0, 0.0
        for _, weight, _ in matrices():
            wide = weight.double()
            count += wide.numel()
            total += float(wide.abs().sum())
            square += float(wide.square().sum())
        deviation = ((square - total * total / count) / max(count - 1, 1)) ** 0.5
        left = {}
        for name, weight, importance in matrices():
            kept = int((scores(weight, None, self, importance) >= self.rate * deviation).sum())
            left[name] = kept * weight.element_size()
        return left

    def resolved(self) -> Config:
        """Itself, or for channels the structural method of its score."""
        if self.pattern != "channels":
            return self
        keep = round(self.keep, 12)
        if self.score == "magnitude":
            return Magnitude(keep, targets=self.targets)
        if self.score == "wanda":
            return Wanda(keep, targets=self.targets)
        if self.score == "trajectory":
            return TrajectoryChannels(keep, trajectory=str(self.trajectory), targets=self.targets)
        raise ValueError(
            'score="sparsegpt" changes single weights and has no channels; give "magnitude", "wanda" or "trajectory", '
            "or the method SubnetSearch, which refits what stays"
        )

    def of_any_size(self) -> Config:
        return replace(self, targets=None, sparsity=None if self.sparsity is None else 0.5)

    @classmethod
    def size(cls, keep: float, settings: Mapping[str, Any]) -> dict[str, float]:
        said = {"sparsity", "rate"} & set(settings) or GROUP.fullmatch(_spelled(settings.get("pattern", "")))
        return {} if said else {"sparsity": round(1 - keep, 12)}


def _spelled(pattern: Any) -> str:
    """A pattern as it was written: YAML reads an unquoted 2:4 as 124, sixty to a unit."""
    return f"{pattern // 60}:{pattern % 60}" if type(pattern) is int else str(pattern)


def scores(weight: Tensor, statistics: Statistics | None, config: Prune, importance: Tensor | None) -> Tensor:
    """Importance of each weight `[N, K]`, float32; its square is what removing that weight alone costs."""
    if importance is not None:
        return importance.float()
    magnitude = weight.float().abs()
    if config.score == "magnitude":
        return magnitude
    assert statistics is not None
    if config.score == "wanda":
        return magnitude * statistics.gram.diagonal().clamp(min=0).sqrt()
    gram = statistics.gram
    return (magnitude / inverse_cholesky(gram).diagonal()).masked_fill(gram.diagonal() == 0, 0)


def compress(
    weight: Tensor,
    statistics: Statistics | None,
    config: Prune,
    budget: int | None,
    measured: Curve | None = None,
    importance: Tensor | None = None,
) -> Packed:
    """The weight without what matters least. `budget`: bytes of the values that stay, without their places."""
    zeros = 0.0 if config.rate is not None else config.zeros
    if budget is not None:
        zeros = 1 - budget / (weight.numel() * weight.element_size())
    if config.score == "sparsegpt":
        assert statistics is not None
        pruned = sparsegpt(weight, statistics.gram, zeros, config.group)
    else:
        found = scores(weight, statistics, config, importance)
        if config.rate is not None and budget is None:
            gone = found < config.rate * float(weight.float().abs().std())
        else:
            gone = _least(found, zeros, config)
        pruned = weight.masked_fill(gone, 0)
    return pack_zeros(pruned.to(weight.dtype), of_four=config.pattern == "2:4")


def _least(found: Tensor, zeros: float, config: Prune) -> Tensor:
    """Where the lowest scores `[N, K]` are, a share `zeros` of them, bool: of a group, of a row or of the matrix."""
    if config.group is not None:
        kept, of = config.group
        return least(found.unflatten(1, (-1, of)), of - kept).flatten(1)
    if config.score == "wanda":
        return least(found, round(zeros * found.shape[1]))
    return least(found.flatten(), round(zeros * found.numel())).view_as(found)


def curve(weight: Tensor, statistics: Statistics | None, config: Prune, importance: Tensor | None = None) -> Curve:
    """Bytes of the values that stay, and the sum of what removing the others alone would cost."""
    n, k = weight.shape
    found = scores(weight, statistics, config, importance)
    costs = found.double().square()
    if statistics is not None and statistics.sensitivity is not None:
        costs *= statistics.sensitivity.double()[:, None]
    if config.score == "wanda":
        ordered = costs.gather(1, found.argsort(dim=1, stable=True)).sum(0)
    else:
        ordered = costs.flatten()[found.flatten().argsort(stable=True)]
    lost = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)]).cpu()
    levels = min(len(ordered), LEVELS)
    gone = torch.arange(levels + 1) * len(ordered) // levels
    nbytes = (len(ordered) - gone) * (n * k // len(ordered)) * weight.element_size()
    return Curve(nbytes, lost[gone], 1.0, torch.arange(len(gone)))


def check(shape: tuple[int, int], dtype: torch.dtype, config: Prune) -> None:
    """Raise ValueError for a matrix whose rows the pattern does not divide."""
    if config.group is not None and shape[1] % config.group[1]:
        raise ValueError(
            f"the pattern {config.pattern} needs inputs in multiples of {config.group[1]}, got {shape[1]}; "
            f'leave this target out or take pattern="unstructured"'
        )


METHODS[Prune] = Method(compress, curve, check)
