"""What a matrix's forms in codes cost and lose, measured on what would be stored."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pycompress.methods._channels import Channels, Sharing
from pycompress.methods._forms import Form, FormChoice, FormSettings, build, costs_of, ends_whole, is_whole, ranks_of
from pycompress.methods._gptq import TINY
from pycompress.methods.registry import Curve, lower_hull


class CurvePoints:
    """The points of a curve so far; the dense matrix is one."""

    def __init__(self, dense: int) -> None:
        self.nbytes = [torch.tensor([dense])]
        self.errors = [torch.zeros(1, dtype=torch.float64)]
        self.forms = [torch.tensor([-1])]

    def add(self, nbytes: Tensor, errors: Tensor, form: int) -> None:
        self.nbytes.insert(-1, nbytes)
        self.errors.insert(-1, errors)
        self.forms.insert(-1, torch.full_like(nbytes, form))

    def curve(self, energy: float) -> Curve:
        return Curve(torch.cat(self.nbytes), torch.cat(self.errors), energy, torch.cat(self.forms))

    def least(self, nbytes: Tensor) -> Tensor:
        """The error that a mixture of the known points has at these numbers of bytes; infinite below all of them."""
        known, errors = torch.cat(self.nbytes).numpy(), torch.cat(self.errors).numpy()
        chosen = lower_hull(known, errors)
        return torch.from_numpy(np.interp(nbytes.numpy(), known[chosen], errors[chosen], left=np.inf))


# A form after the first has about this share of what rounding costs the first in its bytes, and is built where it
# promises to be better by this margin.
ROUNDING_SHARE = 0.75
MARGIN = 0.03
# Sides of which one is this many times the other: pivots among the longer one's channels have a factor of so many codes
# that they lose more than those of the shorter one.
LONG = 1.5


@dataclass
class Coded:
    """Errors of one matrix's forms in codes."""

    channels: Channels
    weight: Tensor
    config: FormSettings
    # Bytes of the first form's points, and what rounding adds to their errors; what it adds in int8.
    first: tuple[Tensor, Tensor] | None = None
    eight: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def best_first(self, forms: list[Form]) -> list[int]:
        """Places of the forms, those first that leave the others least to show."""
        shorter = "output" if self.shape[0] < self.shape[1] else "input"
        keys = [(form.kind != self.config.kind, form.clusters > 0, form.share != shorter) for form in forms]
        return sorted(range(len(forms)), key=lambda place: keys[place])

    def points(self, form: Form) -> tuple[Tensor, Tensor]:
        """Ranks and bytes of a form."""
        ranks = ranks_of(form, self.shape, self.config)
        return ranks, costs_of(form, ranks, self.weight, self.config)

    def sharing(self, form: Form) -> Sharing:
        return self.channels.cluster(form.share, form.clusters, self.config.seed)

    def tail(self, sharing: Sharing, ranks: Tensor) -> Tensor:
        """The errors of floats, which codes do not get below."""
        tail = self.channels.tail(sharing) if sharing.clusters else self.channels.spectrum[0]
        return tail.cpu()[ranks.clamp(max=len(tail) - 1)]

    def error(self, sharing: Sharing, rank: int, kind: str) -> float:
        known = not sharing.clusters and not is_whole(sharing, rank, self.shape, kind)
        directions = self.channels.spectrum[1] if known else None
        choice = FormChoice(sharing, rank, float("nan"), kind)
        return self.channels.error(build(self.channels, choice, self.weight.dtype, self.config, directions).unpack())

    def ends(self, points: CurvePoints, form: Form, index: int) -> None:
        """Add a form's last point where it is the whole matrix, in int8 but for one channel."""
        ranks, nbytes = self.points(form)
        if form.clusters or not len(ranks) or (form.kind == "int4" and not ends_whole(form, self.shape, self.config)):
            return
        found = self.error(Sharing(form.share), int(ranks[-1]), form.kind)
        self.eight = found if form.kind == "int8" else self.eight
        points.add(nbytes[-1:], torch.tensor([found], dtype=torch.float64), index)

    def follow(self, points: CurvePoints, form: Form, index: int) -> None:
        """Add the points of a form that are worth their bytes; none, where the most promising of them is not.

        Of the first form three ranks are built. What rounding adds to others goes with their bytes about as it does
        there; by how much is measured at the most promising rank and at the last.
        """
        ranks, nbytes = self.points(form)
        if form.kind != self.config.kind or ends_whole(form, self.shape, self.config):
            ranks, nbytes = ranks[:-1], nbytes[:-1]
        if not len(ranks) or (self.first is not None and not form.clusters and self.lopsided(form)):
            return
        least = points.least(nbytes)
        if form.clusters and self.first is not None and not self.may_serve(form, ranks, nbytes, least):
            return
        sharing = self.sharing(form)
        tail = self.tail(sharing, ranks)
        if self.first is None:
            places = sorted({0, len(ranks) // 2, len(ranks) - 1})
            added = [self.error(sharing, int(ranks[place]), form.kind) - float(tail[place]) for place in places]
            self.first = nbytes[places], torch.tensor(added, dtype=torch.float64)
            points.add(nbytes, tail + _between(nbytes, *self.first), index)
            return
        first = _between(nbytes, *self.first)
        promised = self.promised(form, tail, nbytes)
        worth = promised < least
        if not bool(worth.any()):
            return
        gain = torch.where(least.isfinite(), 1 - promised / least, 0).masked_fill(~worth, -1)
        measured: dict[int, float] = {}
        for place in dict.fromkeys((int(gain.argmax()), int(worth.nonzero()[-1]))):
            error = self.error(sharing, int(ranks[place]), form.kind)
            if not measured and error >= float(least[place]):
                return
            measured[place] = float((error - tail[place]) / first[place].clamp(min=TINY))
        places = sorted(measured)
        shares = torch.tensor([measured[place] for place in places], dtype=torch.float64)
        points.add(nbytes[worth], (tail + _between(nbytes, nbytes[places], shares) * first)[worth], index)

    def promised(self, form: Form, tail: Tensor, nbytes: Tensor) -> Tensor:
        """What a form after the first must be expected to lose, of which floats lose `tail`."""
        assert self.first is not None
        added = ROUNDING_SHARE * _between(nbytes, *self.first) if form.kind == self.config.kind else self.eight
        return (tail + added) * (1 + MARGIN)

    def may_serve(self, form: Form, ranks: Tensor, nbytes: Tensor, least: Tensor) -> bool:
        """Whether clusters, before any are made, may promise enough: with a correction they are a product of that many
        more ranks, which loses no less than the best of them (Eckart and Young).
        """
        tail = self.channels.spectrum[0].cpu()
        bound = tail[(ranks + form.clusters).clamp(max=len(tail) - 1)]
        return bool((self.promised(form, bound, nbytes) < least).any())

    def lopsided(self, form: Form) -> bool:
        """Whether the pivots of a form without clusters are among the channels of a side that is much the longer."""
        n, k = self.shape
        return form.kind == self.config.kind and (n / k if form.share == "output" else k / n) > LONG


def _between(nbytes: Tensor, known: Tensor, values: Tensor) -> Tensor:
    """Values at these numbers of bytes, interpolated between those that are known."""
    return torch.from_numpy(np.interp(nbytes.numpy(), known.numpy(), values.numpy()))
