"""What a search chooses between: sizes and units of the groups of each block."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

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
class UnitGroup:
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
        return np.flatnonzero(unpacked(self.masks[pool], total))


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

    blocks: tuple[tuple[UnitGroup, ...], ...]
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


def prefix(group: UnitGroup, size: int) -> Choice:
    """The most important units of each pool."""
    counts = group.counts[size]
    masks = (np.packbits(np.arange(pool) < count).tobytes() for pool, count in zip(group.pools, counts, strict=True))
    return Choice(size, tuple(masks))


def unpacked(mask: bytes, total: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(mask, np.uint8), count=total).astype(bool)


def _nearest(group: UnitGroup, share: float) -> int:
    """The size whose parameters are nearest to a share of the group's."""
    return int(np.abs(np.array(group.parameters) - share * group.parameters[-1]).argmin())
