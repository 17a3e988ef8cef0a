"""Subnets found without training: which channels to inherit, how many in each block, what remains refitted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pycompress._brief import brief
from pycompress._executor import EXECUTORS
from pycompress.methods._elimination import Elimination, eliminate, eliminate_unread, phi
from pycompress.methods.structural import (
    STRUCTURAL,
    Group,
    Member,
    Refit,
    Search,
    Structural,
    StructuralConfig,
    of_units,
)
from pycompress.recipe import Checked
from pycompress.search.evolution import Evolution

IMPORTANCES = ("elimination", "phi")
ALLOCATIONS = ("uniform", "loss")
REFORMS = ("exact", "admm", "none")
REFITS = ("readers", "block")
PAPERS_POPULATION = 100
GENERATIONS = 4  # that a number of candidates is divided into


@dataclass(frozen=True)
class SearchSettings(Checked):
    """The rare settings of a `SubnetSearch` that goes on by evolution.

    Parameters
    ----------
    samples
        Candidates are scored on the first so many calibration tokens.
    positions
        At a share of them, in (0, 1].
    population
        Candidates of a generation; None for the paper's 100 or, where those are fewer, a quarter of all.
    mutations, crossovers, parents
        Of a generation; None for the paper's half, 3 of 10, and 1 of 10 but two at least.
    generations
        At most.
    executor
        "local", or "ray".
    workers
        Of "ray".

    Raises
    ------
    ValueError
        For a setting out of its range.

    Reference: arXiv:2409.17372, section 3.3.
    """

    samples: int = 2048
    positions: float = 0.5
    population: int | None = None
    mutations: int | None = None
    crossovers: int | None = None
    parents: int | None = None
    generations: int = 50
    executor: str = "local"
    workers: int = 1

    def __post_init__(self) -> None:
        self.check_count("samples", 2)
        self.check_fraction("positions")
        self.check_count("workers", 1)
        self.check_choice("executor", *EXECUTORS)


@dataclass(frozen=True)
class SubnetSearch(StructuralConfig):
    """Inherit the channels whose removal the others can least compensate for, and refit what reads them.

    From there evolution may go on, by the perplexity of refitted candidates.

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
    importance
        "elimination" removes channels one after the other, each time those that cost the least once the others have
        compensated for them; "phi" takes the paper's scores, which look at each channel alone.
    allocation
        "uniform" keeps the same share of every block, "loss" spends one budget where the elimination's error says it
        saves most.
    reform
        "exact" least squares, "admm" the paper's iteration, "none".
    sequential
        Refit on the inputs that the pruned blocks give, else on the dense model's.
    refit
        "readers" are the linears that read removed channels, "block" every linear, the others towards what their
        remaining rows gave in the dense model; it needs `sequential`, as on dense inputs they give that already.
    candidates
        How many the search may try: 0 for no search, None for as many as the generations hold.
    seconds
        How long it may take.
    masks
        "nested" searches widths and depth, "important" and "free" index sets too.
    depth
        Whether blocks may be dropped.
    seed
        Of the search.
    search
        Its other settings.

    Raises
    ------
    ValueError
        For a setting out of its range.

    Examples
    --------
    >>> import pycompress
    >>> pycompress.SubnetSearch(0.65).candidates
    0
    >>> searched = pycompress.SubnetSearch(0.65, candidates=60, search=pycompress.SearchSettings(population=15))

    Reference: arXiv:2409.17372.
    """

    importance: str = "elimination"
    allocation: str = "loss"
    reform: str = "exact"
    sequential: bool = False
    refit: str = "readers"
    candidates: int | None = 0
    seconds: float | None = None
    masks: str = "nested"
    depth: bool = False
    seed: int = 0
    search: SearchSettings = SearchSettings()

    @property
    def needs_calibration(self) -> bool:
        return True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("importance", *IMPORTANCES)
        self.check_choice("allocation", *ALLOCATIONS)
        self.check_choice("reform", *REFORMS)
        self.check_choice("refit", *REFITS)
        if self.refit == "block" and not (self.sequential and self.reform == "exact"):
            raise ValueError(
                'SubnetSearch(refit="block") needs sequential=True and reform="exact": on the dense inputs the linears '
                'before o and down already give what they gave; set both, or refit="readers"'
            )
        if self.importance == "phi" and self.allocation == "loss":
            raise ValueError('SubnetSearch(allocation="loss") needs importance="elimination", which knows the loss')
        self.check_count("candidates", 0)
        if not isinstance(self.search, SearchSettings):
            raise ValueError(f"SubnetSearch.search must be SearchSettings(...), got {brief(self.search)}")
        if self.candidates != 0 and self.uniform:
            raise ValueError(
                "SubnetSearch(uniform=True) has one width for all blocks and nothing to search; candidates=0"
            )
        if self.candidates != 0 and "kv_heads" in self.parts:
            raise ValueError(
                'SubnetSearch searches widths of MLPs and heads, not parts="kv_heads"; leave that out, or candidates=0'
            )
        _search(self)


def ranked(group: Group, config: SubnetSearch) -> Elimination:
    """The group's units, the first to remove first."""
    if config.importance == "phi":
        order = _phi(group).argsort(stable=True)
        order = order.view(-1, order.shape[-1])
        return Elimination(order.cpu(), torch.zeros(order.shape[1], dtype=torch.float64))
    if not group.readers:
        # Attention multiplies queries by keys: without a channel of one the other's does nothing.
        queries = group.writers[0]
        assert queries.covariance is not None
        return eliminate_unread(_moments(queries), queries.covariance, queries.units)
    (reader,) = group.readers
    assert reader.gram is not None
    units = reader.units if reader.units.ndim == 3 else reader.units[None]
    return eliminate(reader.weight, reader.gram, units, reader.covariance)


def _moments(writer: Member) -> Tensor:
    """Mean of y yᵀ of a linear's outputs, `[N, N]` float64."""
    assert writer.gram is not None
    assert writer.mean is not None
    weight = writer.weight.double()
    moments = weight @ writer.gram.double() @ weight.T
    if writer.bias is None:
        return moments
    bias, mean = writer.bias.double(), weight @ writer.mean.double()
    return moments + torch.outer(bias, mean) + torch.outer(mean, bias) + torch.outer(bias, bias)


def _phi(group: Group) -> Tensor:
    """Row scores of the writers plus column scores of the readers, `[U]`."""

    def of(member: Member) -> Tensor:
        assert member.gram is not None
        return phi(member.weight, member.gram)

    return of_units(group, of)


def _refit(config: SubnetSearch) -> Refit | None:
    if config.reform == "none":
        return None
    if config.reform == "admm":
        return Refit("admm")
    return Refit("weights", config.sequential, config.refit == "block")


def _search(config: SubnetSearch) -> Search | None:
    if config.candidates == 0:
        return None
    rare = config.search
    fits = PAPERS_POPULATION if config.candidates is None else max(4, config.candidates // GENERATIONS)
    size = min(PAPERS_POPULATION, fits) if rare.population is None else rare.population
    evolution = Evolution(
        population=size,
        mutations=size // 2 if rare.mutations is None else rare.mutations,
        crossovers=3 * size // 10 if rare.crossovers is None else rare.crossovers,
        parents=max(2, size // 10) if rare.parents is None else rare.parents,
        generations=rare.generations,
        masks=config.masks,
        seed=config.seed,
        max_candidates=config.candidates,
        max_seconds=config.seconds,
    )
    where = (rare.executor, rare.workers)
    return Search(evolution, rare.samples, rare.positions, config.depth, config.reform != "none", *where)


STRUCTURAL[SubnetSearch] = Structural(
    eliminate=ranked,
    needs=("gram", "covariance"),
    by_error=lambda config: config.allocation == "loss",
    ranking=lambda config: (config.importance,),
    refit=_refit,
    search=_search,
)
