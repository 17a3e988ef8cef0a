"""SWSC: shared weight for similar channels, chosen for each matrix by its output error at equal bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress.formats import SharedChannels, pack_shared
from pycompress.methods.channels import Channels, Sharing, stored_bytes
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.recipe import Config

ALLOCATIONS = ("loss", "error", "uniform")
SHARES = ("output", "input")
WEIGHTINGS = ("loss", "inputs", "none")
# Numbers of clusters to try, as shares of the channels; 0 is plain low rank.
CLUSTER_SHARES = (0, 1 / 32, 1 / 8, 1 / 4)
REFINEMENTS = 3


@dataclass(frozen=True)
class SWSC(Config):
    """Channels of a weight share centroids, plus a low-rank correction: `Ŵ = C[labels] + U V`.

    `keep`: kept bytes over the targets' bytes, in (0, 1]. `share`: "output" (rows), "input" (columns) or "auto", the
    better of the two for each matrix. `weighting`: "inputs" minimises the error of the outputs on calibration data,
    "loss" weighs each output by what the loss feels of it besides, "none" minimises the error of the weights, as
    published. `clusters`, `rank`: fixed for every target; what is left None is chosen
    for each matrix by its error at equal bytes. `allocation`: "loss" spreads one budget over the targets by what a
    byte saves of the loss, "error" by what it saves of the relative output error (as "loss" does where there is no
    calibration), "uniform" gives each target its own share. `pivot`: store the factor in r² fewer numbers. `seed`: of
    K-means. Raises ValueError on other values.

    Reference: arXiv:2501.08631, section 3; `SWSC(weighting="none", share="output", clusters=k, rank=r, pivot=False)`
    is the published method.
    """

    keep: float = 0.8
    share: str = "auto"
    weighting: str = "loss"
    clusters: int | None = None
    rank: int | None = None
    allocation: str = "loss"
    pivot: bool = True
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

    @property
    def needs_calibration(self) -> bool:
        return self.weighting != "none"

    @property
    def fixed(self) -> bool:
        """Whether every matrix gets the clusters and rank that were given, whatever `keep` says."""
        return self.clusters is not None and self.rank is not None


@dataclass(frozen=True)
class Choice:
    """One point on a matrix's curve."""

    sharing: Sharing
    rank: int
    error: float


def candidates(shape: tuple[int, int], config: SWSC) -> list[tuple[str, int]]:
    """The (share, clusters) pairs worth trying on a matrix."""
    pairs: list[tuple[str, int]] = []
    for share in SHARES if config.share == "auto" else (config.share,):
        channels = shape[0 if share == "output" else 1]
        counts = {int(part * channels) for part in CLUSTER_SHARES} if config.clusters is None else {config.clusters}
        pairs += [(share, count) for count in sorted(counts) if count <= channels]
    return [pair for pair in pairs if pair[1] or pair[0] == pairs[0][0]]


def sharings(channels: Channels, config: SWSC) -> list[Sharing]:
    shape = (channels.weight.shape[0], channels.weight.shape[1])
    found = candidates(shape, config)
    if not found:
        raise ValueError(
            f"SWSC.clusters must be at most the number of channels of each target, got {config.clusters} for {shape}"
        )
    return [channels.cluster(share, count, config.seed) for share, count in found]


def least_rank(sharing: Sharing) -> int:
    """A matrix without clusters needs a rank."""
    return 0 if sharing.clusters else 1


def _costs(sharing: Sharing, ranks: int, weight: Tensor, config: SWSC) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    return stored_bytes(sharing, torch.arange(ranks), shape, weight.element_size(), config.pivot)


def problem(weight: Tensor, statistics: Statistics | None, config: SWSC) -> Channels:
    """The matrix in the metric that `config.weighting` asks for."""
    if statistics is None or config.weighting == "none":
        return Channels(weight)
    return Channels(weight, statistics.gram, statistics.sensitivity if config.weighting == "loss" else None)


def curve(weight: Tensor, statistics: Statistics | None, config: SWSC) -> Curve:
    """Every (clusters, rank) of every candidate sharing: bytes and error, the dense matrix last."""
    channels = problem(weight, statistics, config)
    nbytes, errors = [], []
    for sharing in sharings(channels, config):
        tail, least = channels.tail(sharing).cpu(), least_rank(sharing)
        nbytes.append(_costs(sharing, len(tail), weight, config)[least:])
        errors.append(tail[least:])
    dense = weight.numel() * weight.element_size()
    nbytes.append(torch.tensor([dense]))
    errors.append(torch.zeros(1, dtype=torch.float64))
    felt = 1.0 if statistics is None or statistics.sensitivity is None else float(statistics.sensitivity.mean())
    return Curve(torch.cat(nbytes), torch.cat(errors), channels.energy * channels.scale * felt)


def choose(channels: Channels, weight: Tensor, config: SWSC, budget: int) -> Choice | None:
    """The sharing and rank of least error within a budget in bytes, None where the dense matrix fits."""
    if config.fixed:
        sharing = sharings(channels, config)[0]
        return Choice(sharing, config.rank or 0, float("nan"))
    if budget >= weight.numel() * weight.element_size():
        return None
    best: Choice | None = None
    for sharing in sharings(channels, config):
        tail = channels.tail(sharing)
        costs = _costs(sharing, len(tail), weight, config)
        rank = int((costs <= budget).nonzero().max()) if int(costs[0]) <= budget else -1
        rank = rank if config.rank is None else min(rank, config.rank)
        if rank >= least_rank(sharing) and (best is None or float(tail[rank]) < best.error):
            best = Choice(sharing, rank, float(tail[rank]))
    if best is None:
        raise ValueError(f"{budget} bytes hold no packed form of a matrix {list(weight.shape)}; raise keep")
    return best


def refine(channels: Channels, choice: Choice, seed: int) -> Choice:
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
        choice = Choice(sharing, choice.rank, error)
        residual = channels.residual(sharing)
    return choice


def build(channels: Channels, choice: Choice, dtype: torch.dtype, pivot: bool) -> SharedChannels:
    """Pack one choice, the correction fitted to what the centroids leave."""
    centroids = channels.centroids(choice.sharing)
    residual = channels.weight - channels.restore(choice.sharing, centroids)
    u, v = channels.correction(residual, choice.rank)
    return pack_shared(choice.sharing.share, centroids, u, v, choice.sharing.labels, dtype, pivot)


def compress(weight: Tensor, statistics: Statistics | None, config: SWSC, budget: int | None) -> SharedChannels | None:
    """Pack a weight into its budget (`config.keep` of its bytes for None); None leaves it dense."""
    channels = problem(weight, statistics, config)
    if budget is None:
        budget = int(config.keep * weight.numel() * weight.element_size())
    choice = choose(channels, weight, config, budget)
    if choice is None:
        return None
    if not config.fixed:
        choice = refine(channels, choice, config.seed)
    return build(channels, choice, weight.dtype, config.pivot)


def shares_budget(config: SWSC) -> bool:
    return config.allocation != "uniform" and not config.fixed


def reads_loss(config: SWSC) -> bool:
    return config.weighting == "loss" or (config.allocation == "loss" and shares_budget(config))


METHODS[SWSC] = Method(compress, curve, shares_budget, reads_loss)
