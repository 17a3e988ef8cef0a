"""SWSC: shared weight for similar channels, chosen for each matrix by its output error at equal bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.formats import codes
from pycompress.formats.packed import SharedChannels
from pycompress.methods._channels import Channels
from pycompress.methods._forms import SHARES, Form, FormChoice, build, candidates, costs_of, ranks_of
from pycompress.methods._pricing import Coded, CurvePoints
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.recipe import Config

ALLOCATIONS = ("loss", "error", "uniform")
STORAGES = ("bf16", "int8", "int4")
WEIGHTINGS = ("loss", "inputs", "none")
REFINEMENTS = 3


@dataclass(frozen=True)
class SWSC(Config):
    """Channels of a weight share centroids, plus a low-rank correction: `Ŵ = C[labels] + U V`.

    Parameters
    ----------
    keep
        Kept bytes over the targets' bytes, in (0, 1].
    share
        Whose channels share: "output" (rows), "input" (columns) or "auto", the better of the two for each matrix.
    weighting
        Which error is least: "inputs", of the outputs on calibration data; "loss", of the outputs, each weighted by
        its sensitivity; "none", of the weights, as published.
    clusters
        Centroids of every target; None to choose for each matrix by its error at equal bytes.
    rank
        Rank of every target's correction; None as above.
    allocation
        "loss" allocates one budget to the targets by what a byte saves of the loss, "error" by what it saves of the
        relative output error (as "loss" does without calibration), "uniform" gives each target its own share.
    pivot
        Store the factor in r² fewer numbers.
    storage
        "bf16" (of a bfloat16 model), "int8" with a scale a row, "int4" with a scale for each 64 numbers of a row, or
        int8 where a matrix is better served by it; None for floats of the weights' own dtype.
    seed
        Of K-means.
    targets
        Roles of linears ("q", "down") or patterns over module names; None for every linear of the decoder blocks.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Examples
    --------
    >>> import pycompress
    >>> pycompress.SWSC(keep=0.25, storage="int4").storage
    'int4'
    >>> published = pycompress.SWSC(weighting="none", share="output", clusters=16, rank=8, pivot=False)

    Reference: arXiv:2501.08631, section 3; the published method is the second example.
    """

    keep: float = 0.8
    share: str = "auto"
    weighting: str = "loss"
    clusters: int | None = None
    rank: int | None = None
    allocation: str = "loss"
    pivot: bool = True
    storage: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_fraction("keep")
        self.check_choice("share", "auto", *SHARES)
        self.check_choice("weighting", *WEIGHTINGS)
        self.check_choice("allocation", *ALLOCATIONS)
        self.check_count("clusters", 0)
        self.check_count("rank", 0)
        if self.clusters == 0 and self.rank == 0:
            raise ValueError(f"{self.name} needs clusters or rank above 0, got 0 for both")
        if self.storage is not None:
            self.check_choice("storage", *STORAGES)
        if self.storage == "int4" and (self.rank or 0) % codes.BLOCK:
            raise ValueError(
                f"{self.name}.rank must be a multiple of {codes.BLOCK} for storage='int4', got {self.rank}"
            )

    @property
    def kind(self) -> str:
        """How numbers are stored, as `pycompress.formats.codes` calls it."""
        return "float" if self.storage in (None, "bf16") else str(self.storage)

    @property
    def kinds(self) -> tuple[str, ...]:
        """How the numbers of a matrix may be stored."""
        return ("int4", "int8") if self.kind == "int4" and not self.fixed else (self.kind,)

    @property
    def needs_calibration(self) -> bool:
        return self.weighting != "none"

    @property
    def shared(self) -> bool:
        return self.allocation != "uniform" and not self.fixed

    @property
    def by_loss(self) -> bool:
        return self.allocation == "loss"

    @property
    def sensitive(self) -> bool:
        return self.weighting == "loss" or (self.by_loss and self.shared)

    def kept_bytes(self, nbytes: int) -> int:
        return math.floor(self.keep * nbytes)

    @property
    def fixed(self) -> bool:
        """Whether every matrix gets the clusters and rank that were given, whatever `keep` says."""
        return self.clusters is not None and self.rank is not None


def check(shape: tuple[int, int], dtype: torch.dtype, config: SWSC) -> None:
    """Raise ValueError for a matrix that cannot be packed as the config says."""
    if not candidates(shape, config):
        raise ValueError(
            f"SWSC.clusters must be at most the number of channels of each target, got {config.clusters} for {shape}"
        )
    if config.storage == "bf16" and dtype != torch.bfloat16:
        raise ValueError(
            f'storage="bf16" is for bfloat16 weights, got {dtype}; convert the model by .to(torch.bfloat16), or leave '
            f"storage out to keep its dtype"
        )
    if config.kind == "int4" and shape[1] % codes.BLOCK:
        raise ValueError(f'storage="int4" needs inputs in multiples of {codes.BLOCK}, got {shape[1]}; use "int8"')


def problem(weight: Tensor, statistics: Statistics | None, config: SWSC) -> Channels:
    """The matrix in the metric that `config.weighting` asks for."""
    if statistics is None or config.weighting == "none":
        return Channels(weight)
    return Channels(weight, statistics.gram, statistics.sensitivity if config.weighting == "loss" else None)


def curve(weight: Tensor, statistics: Statistics | None, config: SWSC) -> Curve:
    """Bytes and error of every (clusters, rank) of every candidate form, the dense matrix last.

    The error of codes is that of what would be stored: at some ranks the form is built and measured, and what rounding
    adds there is interpolated between them. CurvePoints that no price of a byte could choose are left out.
    """
    channels = problem(weight, statistics, config)
    forms = candidates((weight.shape[0], weight.shape[1]), config)
    points = CurvePoints(weight.numel() * weight.element_size())
    if config.kind == "float":
        for index, form in enumerate(forms):
            ranks = ranks_of(form, (weight.shape[0], weight.shape[1]), config)
            tail = channels.tail(channels.cluster(form.share, form.clusters, config.seed)).cpu()
            points.add(costs_of(form, ranks, weight, config), tail[ranks], index)
    else:
        coded = Coded(channels, weight, config)
        for index in coded.best_first(forms):
            coded.ends(points, forms[index], index)
        for index in coded.best_first(forms):
            coded.follow(points, forms[index], index)
    sensitivity = 1.0 if statistics is None or statistics.sensitivity is None else float(statistics.sensitivity.mean())
    return points.curve(channels.energy * channels.unit**2 * channels.scale * sensitivity)


def choose(channels: Channels, weight: Tensor, config: SWSC, budget: int, forms: list[Form]) -> FormChoice | None:
    """The best of these forms, and its rank, within a budget in bytes; None where the dense matrix fits."""
    if config.fixed:
        share, clusters, kind = forms[0]
        return FormChoice(channels.cluster(share, clusters, config.seed), config.rank or 0, float("nan"), kind)
    if budget >= weight.numel() * weight.element_size():
        return None
    coded, floats = Coded(channels, weight, config), config.kind == "float"
    best: FormChoice | None = None
    least = float("inf")
    for form in forms if floats else (forms[place] for place in coded.best_first(forms)):
        ranks, nbytes = coded.points(form)
        fitting = ranks[nbytes <= budget]
        if config.rank is not None:
            fitting = fitting[fitting <= config.rank]
        if not len(fitting):
            continue
        rank, sharing = int(fitting[-1]), coded.sharing(form)
        if len(forms) == 1 and not form.clusters:
            return FormChoice(sharing, rank, float("nan"), form.kind)
        tail = float(channels.tail(sharing)[rank] if floats else coded.tail(sharing, fitting[-1]))
        if tail < least and (error := tail if floats else coded.error(sharing, rank, form.kind)) < least:
            best, least = FormChoice(sharing, rank, tail, form.kind), error
    if best is None:
        raise ValueError(f"{budget} bytes hold no packed form of a matrix {list(weight.shape)}; raise keep")
    return best


def refine(channels: Channels, choice: FormChoice, seed: int) -> FormChoice:
    """Cluster again what the low-rank part leaves, fit that part again, and so on while the error falls.

    The first round takes the low-rank part of the whole weight, as if there were no clusters yet: alternation cannot
    leave clusters that have taken what belongs to that part.
    """
    residual = channels.weight
    for _ in range(REFINEMENTS if choice.sharing.clusters and choice.rank else 0):
        u, v = channels.correction(residual, choice.rank)
        left = channels.without(u @ v)
        sharing = left.cluster(choice.sharing.share, choice.sharing.clusters, seed)
        error = float(channels.tail(sharing)[choice.rank])
        if not error < choice.error:
            break
        choice = FormChoice(sharing, choice.rank, error, choice.kind)
        residual = channels.residual(sharing)
    return choice


def compress(
    weight: Tensor, statistics: Statistics | None, config: SWSC, budget: int | None, measured: Curve | None = None
) -> SharedChannels | None:
    """Pack a weight into its budget (`config.keep` of its bytes for None); None leaves it dense.

    With its `measured` curve, only the form that was best there for this budget is tried.
    """
    channels = problem(weight, statistics, config)
    if budget is None:
        budget = int(config.keep * weight.numel() * weight.element_size())
    forms = candidates((weight.shape[0], weight.shape[1]), config)
    if measured is not None:
        best = measured.best(budget)
        forms = forms if best < 0 else [forms[best]]
    choice = choose(channels, weight, config, budget, forms)
    if choice is None:
        return None
    if not config.fixed:
        choice = refine(channels, choice, config.seed)
    return build(channels, choice, weight.dtype, config)


METHODS[SWSC] = Method(compress, curve, check)
