"""SWSC: shared weight for similar channels, chosen for each matrix by its output error at equal bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress import storage
from pycompress.formats import SharedChannels, pack_shared
from pycompress.methods.channels import Channels, Sharing, stored_bytes
from pycompress.methods.registry import METHODS, Curve, Method, Statistics
from pycompress.methods.rounding import round_shared, round_to
from pycompress.recipe import Config

ALLOCATIONS = ("loss", "error", "uniform")
SHARES = ("output", "input")
STORAGES = ("bf16", "int8", "int4")
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
    calibration), "uniform" gives each target its own share. `pivot`: store the factor in r² fewer numbers. `storage`:
    "bf16" (of a bfloat16 model), "int8" with a scale a row or "int4" with a scale for each 64 numbers of a row; None
    for floats of the weights' own dtype. `seed`: of K-means. Raises ValueError on other values.

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
        if self.storage == "int4" and (self.rank or 0) % storage.BLOCK:
            raise ValueError(
                f"{self.name}.rank must be a multiple of {storage.BLOCK} for storage='int4', got {self.rank}"
            )

    @property
    def kind(self) -> str:
        """How numbers are stored, as `pycompress.storage` calls it."""
        return "float" if self.storage in (None, "bf16") else str(self.storage)

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
        # Inputs' centroids lie along the rows, which int4 stores in blocks.
        step = storage.BLOCK if config.kind == "int4" and share == "input" else 1
        counts = {int(part * channels) // step * step for part in CLUSTER_SHARES}
        counts = counts if config.clusters is None else {config.clusters}
        pairs += [(share, count) for count in sorted(counts) if count <= channels]
    return [pair for pair in pairs if pair[1] or pair[0] == pairs[0][0]]


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
    if config.kind == "int4" and shape[1] % storage.BLOCK:
        raise ValueError(f'storage="int4" needs inputs in multiples of {storage.BLOCK}, got {shape[1]}; use "int8"')


def _ranks(sharing: Sharing, shape: tuple[int, int], config: SWSC) -> Tensor:
    """The ranks that the storage can hold; a matrix without clusters needs one."""
    if config.kind == "int4":
        return torch.arange(0 if sharing.clusters else storage.BLOCK, min(shape) + 1, storage.BLOCK)
    ranks = torch.arange(0 if sharing.clusters else 1, min(shape) + 1)
    # A packed weight of the dense shape would load into the dense module where pycompress is not imported.
    return ranks[sharing.clusters + ranks != shape[0 if sharing.share == "output" else 1]]


def _costs(sharing: Sharing, ranks: Tensor, weight: Tensor, config: SWSC) -> Tensor:
    shape = (weight.shape[0], weight.shape[1])
    return stored_bytes(sharing, ranks, shape, weight.element_size(), config.pivot, config.kind)


def problem(weight: Tensor, statistics: Statistics | None, config: SWSC) -> Channels:
    """The matrix in the metric that `config.weighting` asks for."""
    if statistics is None or config.weighting == "none":
        return Channels(weight)
    return Channels(weight, statistics.gram, statistics.sensitivity if config.weighting == "loss" else None)


def _noise(channels: Channels, config: SWSC, dtype: torch.dtype) -> float:
    """The error that codes add, taken to be what rounding the whole weight would cost."""
    if config.kind == "float":
        return 0.0
    return channels.error(storage.widen(*round_to(channels.weight, config.kind, None, dtype)))


def curve(weight: Tensor, statistics: Statistics | None, config: SWSC) -> Curve:
    """Every (clusters, rank) of every candidate sharing: bytes and error, the dense matrix last."""
    channels = problem(weight, statistics, config)
    shape = (weight.shape[0], weight.shape[1])
    nbytes, errors, chosen = [], [], []
    noise = _noise(channels, config, weight.dtype)
    for index, (share, clusters) in enumerate(candidates(shape, config)):
        sharing = channels.cluster(share, clusters, config.seed)
        ranks = _ranks(sharing, shape, config)
        nbytes.append(_costs(sharing, ranks, weight, config))
        errors.append(channels.tail(sharing).cpu()[ranks] + noise)
        chosen.append(torch.full_like(ranks, index))
    nbytes.append(torch.tensor([weight.numel() * weight.element_size()]))
    errors.append(torch.zeros(1, dtype=torch.float64))
    chosen.append(torch.tensor([-1]))
    felt = 1.0 if statistics is None or statistics.sensitivity is None else float(statistics.sensitivity.mean())
    energy = channels.energy * channels.scale * felt
    return Curve(torch.cat(nbytes), torch.cat(errors), energy, torch.cat(chosen))


def choose(
    channels: Channels, weight: Tensor, config: SWSC, budget: int, pairs: list[tuple[str, int]]
) -> Choice | None:
    """The best of these sharings, and its rank, within a budget in bytes; None where the dense matrix fits."""
    if config.fixed:
        return Choice(channels.cluster(*pairs[0], config.seed), config.rank or 0, float("nan"))
    if budget >= weight.numel() * weight.element_size():
        return None
    best: Choice | None = None
    for share, clusters in pairs:
        ranks = _ranks(sharing := Sharing(share, clusters), (weight.shape[0], weight.shape[1]), config)
        fitting = ranks[_costs(sharing, ranks, weight, config) <= budget]
        if config.rank is not None:
            fitting = fitting[fitting <= config.rank]
        if not len(fitting):
            continue
        rank, sharing = int(fitting[-1]), channels.cluster(share, clusters, config.seed)
        error = float(channels.tail(sharing)[rank])
        if best is None or error < best.error:
            best = Choice(sharing, rank, error)
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


def build(channels: Channels, choice: Choice, dtype: torch.dtype, config: SWSC) -> SharedChannels:
    """Pack one choice, the correction fitted to what the centroids leave."""
    centroids = channels.centroids(choice.sharing)
    residual = channels.weight - channels.restore(choice.sharing, centroids)
    parts = (choice.sharing.share, centroids, *channels.correction(residual, choice.rank), choice.sharing.labels)
    if config.kind == "float":
        return pack_shared(*parts, dtype, config.pivot)
    packed = pack_shared(*parts, torch.float32, config.pivot)
    return round_shared(packed, channels.weight, channels.metric, config.kind, dtype)


def compress(
    weight: Tensor, statistics: Statistics | None, config: SWSC, budget: int | None, measured: Curve | None = None
) -> SharedChannels | None:
    """Pack a weight into its budget (`config.keep` of its bytes for None); None leaves it dense.

    With its `measured` curve, only the sharing that was best there for this budget is tried.
    """
    channels = problem(weight, statistics, config)
    if budget is None:
        budget = int(config.keep * weight.numel() * weight.element_size())
    pairs = candidates((weight.shape[0], weight.shape[1]), config)
    if measured is not None:
        best = measured.best(budget)
        pairs = pairs if best < 0 else [pairs[best]]
    choice = choose(channels, weight, config, budget, pairs)
    if choice is None:
        return None
    if not config.fixed:
        choice = refine(channels, choice, config.seed)
    return build(channels, choice, weight.dtype, config)


def shares_budget(config: SWSC) -> bool:
    return config.allocation != "uniform" and not config.fixed


def reads_loss(config: SWSC) -> bool:
    return config.weighting == "loss" or (config.allocation == "loss" and shares_budget(config))


METHODS[SWSC] = Method(compress, curve, check, shares_budget, reads_loss)
