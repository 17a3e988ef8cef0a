"""Between a model's subnets and the candidates of a search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.architectures import model as architectures
from pycompress.architectures.geometry import Geometry
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.search.space import ATTENTION_STEP, MLP_STEP, Candidate, Space, UnitGroup, ranges, shares


@dataclass(frozen=True)
class Order:
    """Units of a block's groups from the most to the least important, int64; None: as they are numbered.

    `mlp [mlp]`: channels. `qk [S, units]`: rows of `Geometry.qk_units`, then, numbered on from there, the channels
    that are not rotated; S is 1 where one set serves every head. `vo [kv_heads, width]`: channels of a head.
    """

    mlp: Tensor | None = None
    qk: Tensor | None = None
    vo: Tensor | None = None


class Encoding:
    """Translates between a model's subnets and the candidates of a search.

    A block has two groups, attention and MLP. Where heads rotate, attention's first pool are the pairs that serve all
    heads, a second one the channels that pass through, if any; otherwise there is a pool of query and key channels a
    key-value head. A pool of value channels for each key-value head follows.
    """

    def __init__(self, model: nn.Module, orders: Sequence[Order] | None = None) -> None:
        depth = len(architectures.blocks(model))
        self.geometries = [architectures.geometry(model, block) for block in range(depth)]
        given = list(orders) if orders is not None else [Order()] * depth
        if len(given) != depth:
            raise ValueError(f"the model has {depth} blocks, got orders for {len(given)}")
        self.pools = [_pools(geometry, order) for geometry, order in zip(self.geometries, given, strict=True)]

    def space(
        self, keep: float, *, tolerance: float = 0.01, round_to: tuple[int, int] | None = None, depth: bool = True
    ) -> Space:
        """The paper's search space for a share `keep` of the parameters of the blocks' linears (biases not counted).

        Candidates have from `keep - tolerance` to `keep` of them, where sizes are coarse from one step of a group's
        size below `keep`. `round_to`: what head widths and numbers of MLP channels are multiples of, None as `Geometry`
        rounds. `depth=False`: no block is dropped.
        """
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be in (0, 1], got {keep}")
        limits = ranges(keep, len(self.geometries))
        blocks = []
        for geometry in self.geometries:
            head, mlp = round_to or (None, None)
            widths = {geometry.head_width(share, head) for share in shares(limits.attention, ATTENTION_STEP)}
            channels = {geometry.mlp_width(share, mlp) for share in shares(limits.mlp, MLP_STEP)}
            blocks.append((_attention(geometry, sorted(widths)), _mlp(geometry, sorted(channels))))
        found = [group.parameters for block in blocks for group in block]
        total, most = sum(sizes[-1] for sizes in found), math.floor(keep * sum(sizes[-1] for sizes in found))
        step = max((b - a for sizes in found for a, b in itertools.pairwise(sizes)), default=0)
        least = min(math.ceil((keep - tolerance) * total), most - step)
        return Space(tuple(blocks), limits.depth if depth else len(blocks), (least, most))

    def subnet(self, candidate: Candidate) -> Subnet:
        """What a candidate keeps, as channels of the model."""
        kept = []
        for geometry, pools, block in zip(self.geometries, self.pools, candidate.blocks, strict=True):
            kept.append(_kept(geometry, pools, block) if block else None)
        return Subnet(tuple(kept))


def _pools(geometry: Geometry, order: Order) -> tuple[list[Tensor], list[Tensor]]:
    """For each pool of attention and of the MLP the channels `[units, channels a unit]`, most important first."""
    heads, pairs = geometry.kv_heads, geometry.qk_units
    as_numbered = torch.arange(geometry.width).expand(heads, -1)
    if geometry.rotary:
        passed = geometry.passed[:, None]
        qk = torch.arange(len(pairs) + len(passed)) if order.qk is None else order.qk[0]
        attention = [pairs[qk[qk < len(pairs)]]]
        attention += [passed[qk[qk >= len(pairs)] - len(pairs)]] if len(passed) else []
    else:
        attention = [head[:, None] for head in (as_numbered if order.qk is None else order.qk.expand(heads, -1))]
    attention += [head[:, None] for head in (as_numbered if order.vo is None else order.vo)]
    mlp = torch.arange(geometry.mlp) if order.mlp is None else order.mlp
    return attention, [mlp[:, None]]


def _counts(geometry: Geometry, width: int) -> tuple[int, ...]:
    """Units kept of each attention pool at a head width."""
    if not geometry.rotary:
        return (width,) * (2 * geometry.kv_heads)
    rotated = geometry.rotated(width)
    passed = (width - rotated,) if geometry.rotary < geometry.width else ()
    return (rotated // 2, *passed, *(width,) * geometry.kv_heads)


def _attention(geometry: Geometry, widths: list[int]) -> UnitGroup:
    counts = tuple(_counts(geometry, width) for width in widths)
    # Of q and k a head has `width` rows, of o and v too.
    rows = 2 * (geometry.heads + geometry.kv_heads)
    return UnitGroup(counts[-1], counts, tuple(rows * width * geometry.hidden for width in widths))


def _mlp(geometry: Geometry, channels: list[int]) -> UnitGroup:
    attention = _attention(geometry, [geometry.width]).parameters[0]
    channel = (geometry.parameters(Kept()) - attention) // geometry.mlp
    return UnitGroup(
        (geometry.mlp,), tuple((count,) for count in channels), tuple(channel * count for count in channels)
    )


def _kept(geometry: Geometry, pools: tuple[list[Tensor], list[Tensor]], block: tuple[Any, ...]) -> Kept:
    attention, mlp = (
        [
            pool[torch.from_numpy(choice.units(number, len(pool)))].flatten().sort().values
            for number, pool in enumerate(of_group)
        ]
        for of_group, choice in zip(pools, block, strict=True)
    )
    heads = geometry.kv_heads
    qk = torch.cat(attention[:-heads])[None] if geometry.rotary else torch.stack(attention[:-heads])
    vo = torch.stack(attention[-heads:])
    narrower = vo.shape[1] < geometry.width
    return Kept(
        mlp=mlp[0] if len(mlp[0]) < geometry.mlp else None,
        qk=qk.sort(1).values if narrower else None,
        vo=vo if narrower else None,
    )
