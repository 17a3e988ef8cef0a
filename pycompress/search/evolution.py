"""Evolution over subnets, given what evaluates them."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from pycompress._files import folder_of, read_json, sealed, unsealed, write_json, write_whole
from pycompress.search.result import Evaluated, Result, or_infinite, or_none
from pycompress.search.space import Candidate, Choice, Space, UnitGroup, prefix, unpacked


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
    run = _SearchRun(space, evolution, list(initial) or [space.uniform()], folder, identity)
    with tqdm(total=run.expected, initial=len(run.history), desc="searching", disable=not progress) as bar:
        run.all(evaluate, bar)
    best = run.ranked[0]
    return Result(best.candidate, best.perplexity, tuple(run.history))


class _Scored(NamedTuple):
    """Orders candidates by perplexity, then by content."""

    perplexity: float
    digest: str
    candidate: Candidate


class _SearchRun:
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
        self.ranked: list[_Scored] = []
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

    def _ranked(self, evaluate: Evaluate, candidates: list[Candidate], bar: Any) -> list[_Scored]:
        """The candidates with their perplexities, logged one by one; fewer when the time is spent."""
        known = {entry.digest: entry for entry in self.history if entry.generation == self.generation}
        ranked = [_Scored(known[c.digest].perplexity, c.digest, c) for c in candidates if c.digest in known]
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
            ranked.append(_Scored(perplexity, candidate.digest, candidate))
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
            best = [(or_infinite(row["perplexity"]), Candidate.from_list(row["candidate"])) for row in found["best"]]
            self.ranked = [_Scored(perplexity, candidate.digest, candidate) for perplexity, candidate in best]

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

    def _size(self, group: UnitGroup, size: int, chance: float) -> int:
        return int(self.rng.integers(len(group.counts))) if self.rng.random() < chance else size

    def _masks(self, group: UnitGroup, choice: Choice, size: int, chance: float) -> Choice:
        if self.evolution.masks == "nested":
            return prefix(group, size)
        if size == choice.size and self.rng.random() >= chance:
            return choice
        masks = (
            mutate_mask(self.rng, unpacked(mask, total), count, self.evolution.similarity, self.prefer)
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

    def save(self, generation: int, rng: np.random.Generator, ranked: list[_Scored]) -> None:
        if self.file is None:
            return
        best = [{"perplexity": or_none(r.perplexity), "candidate": r.candidate.to_list()} for r in ranked]
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
            file.write(json.dumps(sealed(entry.to_dict())).encode() + b"\n")
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
            return [Evaluated.from_dict(unsealed(json.loads(line))) for line in whole.splitlines()]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{self._log} is damaged; delete it and {self.file} to start the search over") from error

    @property
    def _log(self) -> Path:
        assert self.file is not None
        return self.file.with_suffix(".jsonl")
