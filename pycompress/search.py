"""Evolutionary search over what each block keeps (arXiv 2409.17372, section 3.3). Plain data: no model, no tensors."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from pycompress.files import folder_of, read_json, sealed, unsealed, write_json, write_whole

# The paper's search spaces (its table 7), by kept ratio: the least share of channels a block keeps, and the fewest
# blocks of models of 12 and 24 (OPT), 32, 40, 60 and 80 (LLaMA) blocks. At 0.7 the
# paper gives 0.3 or 0.7 for attention.
KEEPS = (0.5, 0.6, 0.7, 0.8, 0.9)
LEAST_ATTENTION = (0.6, 0.6, 0.7, 0.8, 0.9)
LEAST_MLP = (0.1, 0.1, 0.2, 0.4, 0.6)
LEAST_DEPTH = {
    12: (8, 10, 10, 12, 12),
    24: (16, 20, 20, 24, 24),
    32: (28, 28, 30, 32, 32),
    40: (32, 32, 36, 40, 40),
    60: (52, 52, 56, 60, 60),
    80: (72, 72, 76, 80, 80),
}
ATTENTION_STEP, MLP_STEP = 0.01, 0.05


@dataclass(frozen=True)
class Ranges:
    """Least kept share of attention and MLP channels in a block, and the fewest blocks."""

    attention: float
    mlp: float
    depth: int


def ranges(keep: float, depth: int) -> Ranges:
    """The paper's ranges for a kept ratio and a number of blocks, interpolated between its rows.

    Below its last row, one half, the shares of channels fall in proportion to `keep`.
    """
    by_depth = [float(np.interp(keep, KEEPS, fewest)) / blocks for blocks, fewest in LEAST_DEPTH.items()]
    fewest = math.ceil(depth * float(np.interp(depth, list(LEAST_DEPTH), by_depth)) - 1e-9)
    below = min(1.0, keep / KEEPS[0])
    return Ranges(
        attention=below * float(np.interp(keep, KEEPS, LEAST_ATTENTION)),
        mlp=below * float(np.interp(keep, KEEPS, LEAST_MLP)),
        depth=max(1, fewest),
    )


def shares(least: float, step: float) -> list[float]:
    """`least`, `least + step`, … below 1, and 1."""
    found = (least + index * step for index in range(math.ceil((1 - least) / step)))
    return [share for share in found if share < 1 - 1e-9] + [1.0]


@dataclass(frozen=True)
class Group:
    """One group of channels of a block: what there is to choose from, and in which sizes.

    `pools`: how many units each index set chooses from (a head's channels or rotary pairs, MLP channels); units of a
    pool are numbered from the most to the least important. Of a pool `counts[size][pool]` units are kept, and the
    group then has `parameters[size]` parameters; sizes ascend, the last keeps all.
    """

    pools: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...]
    parameters: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.counts or len(self.counts) != len(self.parameters) or self.counts[-1] != self.pools:
            raise ValueError(
                f"a group has parameters for each size and its last size keeps all of its pools, got {self}"
            )
        if any(a >= b for a, b in itertools.pairwise(self.parameters)):
            raise ValueError(f"the sizes of a group ascend, got {self.parameters} parameters")


class Choice(NamedTuple):
    """What a candidate keeps of a group: the number of its size, and for each pool a packed mask of its units."""

    size: int
    masks: tuple[bytes, ...]

    def units(self, pool: int, total: int) -> np.ndarray:
        """Indices of the kept units of a pool of `total`, ascending."""
        return np.flatnonzero(_unpacked(self.masks[pool], total))


@dataclass(frozen=True, order=True)
class Candidate:
    """For each block a choice a group; a block without choices is dropped."""

    blocks: tuple[tuple[Choice, ...], ...]

    @property
    def depth(self) -> int:
        """The number of blocks kept."""
        return sum(map(bool, self.blocks))

    @property
    def digest(self) -> str:
        """A hash of the content."""
        return hashlib.sha256(json.dumps(self.to_list()).encode()).hexdigest()[:24]

    def to_list(self) -> list[list[Any]]:
        """What JSON can hold; `from_list` takes it back."""
        return [[[choice.size, [mask.hex() for mask in choice.masks]] for choice in block] for block in self.blocks]

    @classmethod
    def from_list(cls, blocks: list[list[Any]]) -> Candidate:
        return cls(
            tuple(tuple(Choice(size, tuple(map(bytes.fromhex, masks))) for size, masks in block) for block in blocks)
        )


@dataclass(frozen=True)
class Space:
    """What is searched: the groups of each block, the fewest blocks, the range `parameters` of a candidate's size.

    Raises `ValueError` when no candidate has a size in the range.
    """

    blocks: tuple[tuple[Group, ...], ...]
    least_depth: int
    parameters: tuple[int, int]

    def __post_init__(self) -> None:
        smallest = sorted(sum(group.parameters[0] for group in block) for block in self.blocks)
        largest = sum(group.parameters[-1] for block in self.blocks for group in block)
        least, most = self.parameters
        if not 1 <= self.least_depth <= len(self.blocks):
            raise ValueError(f"the fewest blocks must be from 1 to {len(self.blocks)}, got {self.least_depth}")
        if least > most or least > largest or most < sum(smallest[: self.least_depth]):
            raise ValueError(
                f"no candidate has from {least} to {most} parameters; sizes of this space are from "
                f"{sum(smallest[: self.least_depth])} to {largest}"
            )

    def size(self, candidate: Candidate) -> int:
        """Parameters of a candidate."""
        return self._parameters([[choice.size for choice in block] for block in candidate.blocks])

    def fits(self, sizes: Sequence[Sequence[int]]) -> bool:
        """Whether these sizes, for each block one a group or none, are in range together."""
        least, most = self.parameters
        return sum(map(bool, sizes)) >= self.least_depth and least <= self._parameters(sizes) <= most

    def holds(self, candidate: Candidate) -> bool:
        """Whether the size and the depth of a candidate are in range."""
        return self.fits([[choice.size for choice in block] for block in candidate.blocks])

    def _parameters(self, sizes: Sequence[Sequence[int]]) -> int:
        each = zip(self.blocks, sizes, strict=True)
        return sum(g.parameters[size] for groups, block in each for g, size in zip(groups, block, strict=False))

    def nested(self, shares: Sequence[Sequence[float]]) -> Candidate:
        """The candidate of the most important units nearest to `shares`, brought into the range of sizes.

        `shares`: for each block the kept share of each group's parameters; none for a block that is dropped. A
        candidate that is too large has all of its sizes lowered in proportion, and then what is left filled up; one
        that is too small grows.
        """
        wanted = [
            [_nearest(group, share) for group, share in zip(groups, block, strict=bool(block))]
            for groups, block in zip(self.blocks, shares, strict=True)
        ]
        most = self.parameters[1]
        cut = next(
            (step for step in range(101) if self.size(self._lowered(wanted, 1 - step / 100)) <= most),
            None,
        )
        if cut is None:
            raise ValueError(f"the blocks chosen have more than {most} parameters at their smallest; drop more of them")
        chosen = self._lowered(wanted, 1 - cut / 100)
        chosen = self._filled(chosen, wanted)
        # Where the sizes asked for are too small together, all may grow.
        return chosen if self.size(chosen) >= self.parameters[0] else self._filled(chosen, None)

    def _filled(self, candidate: Candidate, wanted: list[list[int]] | None) -> Candidate:
        """Raise one size after another, in turns, up to `wanted` and as long as the candidate fits."""
        grown = True
        while grown and self.size(candidate) < self.parameters[1]:
            grown = False
            for index, block in enumerate(candidate.blocks):
                for group, choice in enumerate(block):
                    last = len(self.blocks[index][group].counts) - 1 if wanted is None else wanted[index][group]
                    if choice.size < last:
                        larger = self._with_size(candidate, index, group, choice.size + 1)
                        if self.size(larger) <= self.parameters[1]:
                            candidate, grown = larger, True
        return candidate

    def uniform(self) -> Candidate:
        """All blocks, each group with the same share of its parameters as the largest candidate that fits."""
        whole = sum(group.parameters[-1] for block in self.blocks for group in block)
        share = self.parameters[1] / whole
        return self.nested([[share] * len(groups) for groups in self.blocks])

    def _lowered(self, wanted: list[list[int]], share: float) -> Candidate:
        return Candidate(
            tuple(
                tuple(prefix(group, math.floor(share * size)) for group, size in zip(groups, block, strict=False))
                for groups, block in zip(self.blocks, wanted, strict=True)
            )
        )

    def _with_size(self, candidate: Candidate, block: int, group: int, size: int) -> Candidate:
        choices = list(candidate.blocks[block])
        choices[group] = prefix(self.blocks[block][group], size)
        return Candidate((*candidate.blocks[:block], tuple(choices), *candidate.blocks[block + 1 :]))


@dataclass(frozen=True)
class Evolution:
    """Settings of the search; the defaults are the paper's.

    `mask`, `size` and `depth`: probabilities of a mutation in the first generation and in later ones, of a group's
    masks and of its size for each group, of the depth for each candidate. `similarity`: the share of the smaller of
    two masks that a mutated one has in common with the old one. `masks`: "free" draws masks uniformly; "important"
    prefers more important units; "nested" always keeps the most important ones, so that only sizes are searched.
    A generation has `population` candidates: the `mutations` and `crossovers` of the best `parents`, the others (in the
    first generation all) mutations of the initial ones. `tries`: draws of one candidate, before it is given up, that
    are out of range or known. `max_candidates` evaluations or `max_seconds` end the search early.
    """

    population: int = 100
    mutations: int = 50
    crossovers: int = 30
    parents: int = 10
    generations: int = 50
    mask: tuple[float, float] = (0.6, 0.3)
    size: tuple[float, float] = (0.3, 0.1)
    depth: tuple[float, float] = (0.0, 0.1)
    similarity: float = 0.8
    masks: str = "free"
    tries: int = 1000
    seed: int = 0
    max_candidates: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.masks not in ("free", "important", "nested"):
            raise ValueError(f"masks must be 'free', 'important' or 'nested', got {self.masks!r}")
        for name in ("population", "parents", "generations", "tries"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if min(self.mutations, self.crossovers) < 0 or self.mutations + self.crossovers > self.population:
            raise ValueError(
                f"mutations and crossovers are part of the population of {self.population}, "
                f"got {self.mutations} and {self.crossovers}"
            )
        chances = [*self.mask, *self.size, *self.depth, self.similarity]
        if not all(0 <= chance <= 1 for chance in chances):
            raise ValueError(f"probabilities and the similarity must be from 0 to 1, got {chances}")
        if self.max_candidates is not None and self.max_candidates < 1:
            raise ValueError(f"max_candidates must be at least 1, got {self.max_candidates}")

    def of_generations(self, later: bool) -> tuple[float, float, float]:
        """Probabilities of a mutation of masks, size and depth."""
        return self.mask[later], self.size[later], self.depth[later]


@dataclass(frozen=True)
class Evaluated:
    """One evaluated candidate: its digest, perplexity, parameters and depth, its generation (from 0), and the seconds
    since the search began, interruptions not counted.
    """

    digest: str
    perplexity: float
    parameters: int
    depth: int
    generation: int
    seconds: float


@dataclass(frozen=True)
class Result:
    """The best candidate, its perplexity, and every candidate that was evaluated, in order."""

    best: Candidate
    perplexity: float
    history: tuple[Evaluated, ...] = field(repr=False)

    def to_json(self, path: str | Path | None = None) -> str:
        """The result as JSON text, written to `path` too where one is given. Infinite perplexities are null."""
        found = {"perplexity": _finite(self.perplexity), "best": self.best.to_list()}
        text = json.dumps(found | {"history": [_row(entry) for entry in self.history]}, indent=1)
        if path is not None:
            Path(path).write_text(text)
        return text

    @classmethod
    def from_json(cls, text: str) -> Result:
        """The result that `to_json` wrote."""
        data = json.loads(text)
        history = tuple(_evaluated(row) for row in data["history"])
        return cls(Candidate.from_list(data["best"]), _infinite(data["perplexity"]), history)

    def plot(self, path: str | Path) -> None:
        """All perplexities and the best so far over evaluations; needs `pip install pycompress[plot]`."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Result.plot needs matplotlib: pip install pycompress[plot]") from error
        values = [entry.perplexity for entry in self.history]
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axis = figure.subplots()
        axis.plot(range(1, len(values) + 1), values, ".", alpha=0.4, label="candidate")
        axis.plot(range(1, len(values) + 1), list(itertools.accumulate(values, min)), label="best")
        axis.set_yscale("log")
        axis.set_xlabel("candidates evaluated")
        axis.set_ylabel("perplexity on the calibration sample")
        axis.legend(frameon=False)
        figure.savefig(path, dpi=120)


Evaluate = Callable[[list[Candidate]], Iterable[float]]


def search(
    space: Space,
    evaluate: Evaluate,
    evolution: Evolution | None = None,
    *,
    initial: Sequence[Candidate] = (),
    folder: str | Path | None = None,
    identity: str = "",
    progress: bool = True,
) -> Result:
    """The candidate of least perplexity that evolution finds.

    `evaluate` gives the perplexity of each of a list of candidates, in their order, one after the other; candidates
    that begin alike are neighbours in that list. NaN counts as infinite. `initial`: where evolution starts from, by
    default `space.uniform()`. `folder`: where the state is kept; after an interruption the same call goes on from there
    to the same result, bit for bit unless `max_seconds` decides, and one with other budgets or more generations
    continues it. `identity` tells
    searches in one folder apart that differ in the model or the data. Raises `ValueError` for an initial candidate that
    is not in the space, and for damaged state.
    """
    evolution = evolution or Evolution()
    run = _Run(space, evolution, list(initial) or [space.uniform()], folder, identity)
    with tqdm(total=run.expected, initial=len(run.history), desc="searching", disable=not progress) as bar:
        run.all(evaluate, bar)
    best = run.ranked[0]
    return Result(best.candidate, best.perplexity, tuple(run.history))


class _Ranked(NamedTuple):
    """Orders candidates by perplexity, then by content."""

    perplexity: float
    digest: str
    candidate: Candidate


class _Run:
    """A search on its way: the best candidates so far, the random generator, what was evaluated."""

    def __init__(
        self, space: Space, evolution: Evolution, initial: list[Candidate], folder: str | Path | None, identity: str
    ) -> None:
        for candidate in initial:
            _check(space, candidate)
        self.space, self.evolution, self.initial = space, evolution, initial
        self.prefer = evolution.masks == "important"
        self.rng = np.random.Generator(np.random.PCG64(evolution.seed))
        self.generation = 0
        self.ranked: list[_Ranked] = []
        self.history: list[Evaluated] = []
        unlimited = replace_field(evolution, generations=1, max_candidates=None, max_seconds=None)
        settings = repr((space, unlimited, [c.digest for c in initial], identity))
        self.state = _State(folder, hashlib.sha256(settings.encode()).hexdigest()[:8])
        self._resume()
        self.begun = time.monotonic() - (self.history[-1].seconds if self.history else 0.0)

    @property
    def expected(self) -> int:
        """Evaluations in all, at most."""
        planned = self.evolution.population * self.evolution.generations
        return min(planned, self.evolution.max_candidates or planned)

    def all(self, evaluate: Evaluate, bar: Any) -> None:
        """Generation after generation, until one of the limits or until there is nothing new."""
        while self.generation < self.evolution.generations:
            proposed = self._proposed()
            earlier = sum(entry.generation < self.generation for entry in self.history)
            ranked = self._ranked(evaluate, proposed[: self.expected - earlier], bar)
            self.ranked = sorted([*self.ranked, *ranked])[: self.evolution.parents]
            if not proposed or len(ranked) < len(proposed):
                return
            self.generation += 1
            self.state.save(self.generation, self.rng, self.ranked)

    def _ranked(self, evaluate: Evaluate, candidates: list[Candidate], bar: Any) -> list[_Ranked]:
        """The candidates with their perplexities, logged one by one; fewer when the time is spent."""
        known = {entry.digest: entry for entry in self.history if entry.generation == self.generation}
        ranked = [_Ranked(known[c.digest].perplexity, c.digest, c) for c in candidates if c.digest in known]
        new = sorted(candidate for candidate in candidates if candidate.digest not in known)
        if not new or self._late():
            return ranked
        best = min([entry.perplexity for entry in self.history], default=math.inf)
        for candidate, value in zip(new, evaluate(new), strict=True):
            perplexity = math.inf if math.isnan(value) else float(value)
            seconds = time.monotonic() - self.begun
            size, depth = self.space.size(candidate), candidate.depth
            entry = Evaluated(candidate.digest, perplexity, size, depth, self.generation, seconds)
            self.history.append(entry)
            self.state.append(entry)
            ranked.append(_Ranked(perplexity, candidate.digest, candidate))
            best = min(best, perplexity)
            bar.set_postfix(best=f"{best:.4g}", generation=self.generation + 1, refresh=False)
            bar.update()
            if self._late():
                break
        return ranked

    def _late(self) -> bool:
        most = self.evolution.max_seconds
        return most is not None and bool(self.history) and time.monotonic() - self.begun >= most

    def _resume(self) -> None:
        found = self.state.load()
        self.history = self.state.entries()
        if found is not None:
            self.generation = found["generation"]
            self.rng.bit_generator.state = found["random"]
            best = [(_infinite(row["perplexity"]), Candidate.from_list(row["candidate"])) for row in found["best"]]
            self.ranked = [_Ranked(perplexity, candidate.digest, candidate) for perplexity, candidate in best]

    def _proposed(self) -> list[Candidate]:
        """The candidates of the generation, without any that an earlier one had."""
        seen = {entry.digest for entry in self.history if entry.generation < self.generation}
        found: list[Candidate] = []

        def add(count: int, draw: Callable[[], Candidate | None]) -> None:
            for _ in range(count):
                drawn = (draw() for _ in range(self.evolution.tries))
                candidate = next((c for c in drawn if c and self.space.holds(c) and c.digest not in seen), None)
                if candidate is None:
                    return
                seen.add(candidate.digest)
                found.append(candidate)

        first, later = self.evolution.of_generations(False), self.evolution.of_generations(True)
        if self.generation:
            parents = [entry.candidate for entry in self.ranked]
            add(self.evolution.mutations, lambda: self._mutated(self._one_of(parents), later))
            if len(parents) > 1:
                add(self.evolution.crossovers, lambda: self._crossed(parents))
        else:
            for candidate in self.initial:
                add(1, lambda candidate=candidate: candidate)  # type: ignore[misc]
        add(self.evolution.population - len(found), lambda: self._mutated(self._one_of(self.initial), first))
        return found

    def _one_of(self, candidates: list[Candidate]) -> Candidate:
        return candidates[int(self.rng.integers(len(candidates)))]

    def _mutated(self, candidate: Candidate, chances: tuple[float, float, float]) -> Candidate | None:
        """A mutation; None where the sizes drawn are out of range, before masks are."""
        mask_chance, size_chance, depth_chance = chances
        blocks = list(candidate.blocks)
        if self.rng.random() < depth_chance:
            self._change_depth(blocks)
        sizes = [
            [self._size(group, choice.size, size_chance) for group, choice in zip(groups, block, strict=False)]
            for groups, block in zip(self.space.blocks, blocks, strict=True)
        ]
        if not self.space.fits(sizes):
            return None
        return Candidate(
            tuple(
                tuple(self._masks(*each, mask_chance) for each in zip(groups, block, new, strict=False))
                for groups, block, new in zip(self.space.blocks, blocks, sizes, strict=True)
            )
        )

    def _size(self, group: Group, size: int, chance: float) -> int:
        return int(self.rng.integers(len(group.counts))) if self.rng.random() < chance else size

    def _masks(self, group: Group, choice: Choice, size: int, chance: float) -> Choice:
        if self.evolution.masks == "nested":
            return prefix(group, size)
        if size == choice.size and self.rng.random() >= chance:
            return choice
        masks = (
            mutate_mask(self.rng, _unpacked(mask, total), count, self.evolution.similarity, self.prefer)
            for mask, total, count in zip(choice.masks, group.pools, group.counts[size], strict=True)
        )
        return Choice(size, tuple(np.packbits(mask).tobytes() for mask in masks))

    def _change_depth(self, blocks: list[tuple[Choice, ...]]) -> None:
        """Drop or bring back random blocks until a new depth is reached; those brought back have random sizes."""
        depth = int(self.rng.integers(self.space.least_depth, len(blocks) + 1))
        kept = [index for index, block in enumerate(blocks) if block]
        dropped = [index for index, block in enumerate(blocks) if not block]
        for index in self.rng.choice(kept, max(0, len(kept) - depth), replace=False):
            blocks[index] = ()
        for index in self.rng.choice(dropped, depth - len(kept), replace=False) if depth > len(kept) else ():
            groups = self.space.blocks[index]
            blocks[index] = tuple(prefix(group, int(self.rng.integers(len(group.counts)))) for group in groups)

    def _crossed(self, parents: list[Candidate]) -> Candidate:
        """Each group from one of two parents; a block that one of them lacks from either as it is."""
        pair = self.rng.choice(len(parents), 2, replace=False)
        blocks = []
        for ours, theirs in zip(*(parents[int(index)].blocks for index in pair), strict=True):
            if ours and theirs:
                blocks.append(tuple((a, b)[int(self.rng.integers(2))] for a, b in zip(ours, theirs, strict=True)))
            else:
                blocks.append((ours, theirs)[int(self.rng.integers(2))])
        return Candidate(tuple(blocks))


def mutate_mask(
    rng: np.random.Generator, mask: np.ndarray, count: int, similarity: float, prefer: bool = False
) -> np.ndarray:
    """A random mask of `count` units that has at least `similarity` of the smaller mask in common with `mask`.

    The distribution is that of uniform masks redrawn until they overlap so much (algorithm 1 of arXiv 2409.17372), by
    one draw: of the overlap's size, from what is left of the hypergeometric distribution, then of its units and the
    others. `prefer`: units are drawn with weights that fall by a factor of e with each tenth of the pool.
    """
    old, rest = np.flatnonzero(mask), np.flatnonzero(~mask)
    least = max(math.ceil(similarity * min(count, len(old)) - 1e-9), count - len(rest))
    overlap = _overlap(rng, len(old), len(rest), count, least)
    new = np.zeros(len(mask), dtype=bool)
    for units, drawn in ((old, overlap), (rest, count - overlap)):
        # The largest of log weights with Gumbel noise are a weighted draw without replacement.
        keys = rng.gumbel(size=len(units)) - (10 * units / len(mask) if prefer else 0)
        new[units[np.argsort(-keys, kind="stable")[:drawn]]] = True
    return new


def _overlap(rng: np.random.Generator, old: int, rest: int, count: int, least: int) -> int:
    """A hypergeometric draw of how many of `count` units are among `old`, given that at least `least` are."""
    values = np.arange(least, min(count, old) + 1)
    logs = np.array([_log_binomial(old, int(k)) + _log_binomial(rest, count - int(k)) for k in values])
    cumulative = np.cumsum(np.exp(logs - logs.max()))
    return int(values[np.searchsorted(cumulative[:-1], rng.random() * cumulative[-1], side="right")])


def _log_binomial(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def prefix(group: Group, size: int) -> Choice:
    """The most important units of each pool."""
    counts = group.counts[size]
    masks = (np.packbits(np.arange(pool) < count).tobytes() for pool, count in zip(group.pools, counts, strict=True))
    return Choice(size, tuple(masks))


def _unpacked(mask: bytes, total: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=total).astype(bool)


def _nearest(group: Group, share: float) -> int:
    """The size whose parameters are nearest to a share of the group's."""
    return int(np.abs(np.array(group.parameters) - share * group.parameters[-1]).argmin())


def _check(space: Space, candidate: Candidate) -> None:
    if len(candidate.blocks) != len(space.blocks):
        raise ValueError(f"an initial candidate has {len(candidate.blocks)} blocks, the space {len(space.blocks)}")
    for index, (groups, block) in enumerate(zip(space.blocks, candidate.blocks, strict=True)):
        if block and len(block) != len(groups):
            raise ValueError(f"block {index} of an initial candidate has {len(block)} groups, the space {len(groups)}")
        for group, choice in zip(groups, block, strict=False):
            kept = tuple(len(choice.units(pool, total)) for pool, total in enumerate(group.pools))
            if not 0 <= choice.size < len(group.counts) or kept != group.counts[choice.size]:
                raise ValueError(
                    f"block {index} of an initial candidate keeps {kept} units, which is no size of the space"
                )
    if not space.holds(candidate):
        raise ValueError(
            f"an initial candidate has {candidate.depth} blocks and {space.size(candidate)} parameters, the space at "
            f"least {space.least_depth} blocks and from {space.parameters[0]} to {space.parameters[1]} parameters"
        )


class _State:
    """A search on disk: `search-*.json` after each generation, and a line in `search-*.jsonl` for each evaluation."""

    def __init__(self, folder: str | Path | None, name: str) -> None:
        self.file = None if folder is None else folder_of(folder, "folder") / f"search-{name}.json"
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)

    def save(self, generation: int, rng: np.random.Generator, ranked: list[_Ranked]) -> None:
        if self.file is None:
            return
        best = [{"perplexity": _finite(r.perplexity), "candidate": r.candidate.to_list()} for r in ranked]
        state = {"generation": generation, "random": rng.bit_generator.state, "best": best}
        write_json(self.file, state)

    def load(self) -> dict[str, Any] | None:
        if self.file is None or not self.file.exists():
            return None
        return read_json(self.file, f"delete it and {self._log.name} beside it to start the search over")

    def append(self, entry: Evaluated) -> None:
        if self.file is None:
            return
        with self._log.open("ab") as file:
            file.write(json.dumps(sealed(_row(entry))).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def entries(self) -> list[Evaluated]:
        """What was evaluated. A last line that an interruption cut short is removed."""
        if self.file is None or not self._log.exists():
            return []
        data = self._log.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            write_whole(self._log, whole)
        try:
            return [_evaluated(unsealed(json.loads(line))) for line in whole.splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._log} is damaged; delete it and {self.file} to start the search over") from error

    @property
    def _log(self) -> Path:
        assert self.file is not None
        return self.file.with_suffix(".jsonl")


def _row(entry: Evaluated) -> dict[str, Any]:
    return asdict(entry) | {"perplexity": _finite(entry.perplexity)}


def _evaluated(row: dict[str, Any]) -> Evaluated:
    return Evaluated(**(row | {"perplexity": _infinite(row["perplexity"])}))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _infinite(value: float | None) -> float:
    return math.inf if value is None else value
