"""Searches the subnets of one model: the candidates of `search`, scored on calibration text with refitted weights."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from pycompress._executor import open_executor
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.lm.data import Batch
from pycompress.methods.structural import Search
from pycompress.search.evolution import search
from pycompress.search.result import Result
from pycompress.search.space import Space, UnitGroup
from pycompress.structural.encoding import Encoding, Order
from pycompress.structural.evaluator import Evaluator, Scorer
from pycompress.structural.least_squares import reform

CACHE_BYTES = 1 << 30


@dataclass
class Reformed:
    """Weights of `down` refitted to the channels a candidate keeps, on the dense inputs; see `least_squares.reform`.

    `weights [N, K]`, `grams [K, K]`, `biases [N]` or None: of each block. The last results, `CACHE_BYTES` of them, are
    held.
    """

    weights: list[Tensor]
    grams: list[Tensor]
    biases: list[Tensor | None]
    damping: float
    found: OrderedDict[tuple[int, bytes], Tensor] = field(default_factory=OrderedDict, repr=False)

    def __call__(self, block: int, role: str, kept: Kept) -> tuple[Tensor, Tensor | None] | None:
        if role != "down" or kept.mlp is None:
            return None
        key = (block, kept.mlp.numpy().tobytes())
        if key not in self.found:
            self.found[key] = reform(self.weights[block], self.grams[block], kept.mlp, damping=self.damping).float()
            while len(self.found) > 1 and sum(tensor.nbytes for tensor in self.found.values()) > CACHE_BYTES:
                self.found.popitem(last=False)
        self.found.move_to_end(key)
        return self.found[key], self.biases[block]


def evolve(
    model: nn.Module,
    batches: Sequence[Batch],
    orders: Sequence[Order],
    shares: Sequence[tuple[float, float]],
    space: Space,
    provider: Reformed | None,
    settings: Search,
    *,
    folder: Path | None,
    identity: str,
    progress: bool,
) -> tuple[Subnet, Result]:
    """The subnet of least perplexity on `batches` that evolution finds, starting from `shares` and from equal ones.

    `orders`: each block's units, most important first; `shares`: for each block the kept share of attention and MLP.
    """
    encoding, evolution = Encoding(model, orders), settings.evolution
    build = partial(_scorer, model, list(batches), list(orders), provider, settings.positions, evolution.seed)
    first = list(OrderedDict.fromkeys([space.nested(shares), space.uniform()]))
    with open_executor(settings.executor, build, settings.workers) as executor:
        result = search(
            space,
            executor.map,
            evolution,
            initial=first,
            folder=folder,
            identity=identity,
            progress=progress,
        )
    return encoding.subnet(result.best), result


def narrowed(space: Space, parts: Sequence[str]) -> Space:
    """The space with only the groups of `parts` ("attention", "mlp") searched, and the others whole."""
    blocks = tuple(
        tuple(
            group if name in parts else _whole(group) for name, group in zip(("attention", "mlp"), block, strict=True)
        )
        for block in space.blocks
    )
    return replace(space, blocks=blocks)


def _whole(group: UnitGroup) -> UnitGroup:
    return replace(group, counts=group.counts[-1:], parameters=group.parameters[-1:])


def _scorer(
    model: nn.Module,
    batches: list[Batch],
    orders: list[Order],
    provider: Reformed | None,
    positions: float,
    seed: int,
) -> Scorer:
    evaluator = Evaluator(model, batches, orders, positions=positions, seed=seed, provider=provider)
    return Scorer(evaluator, Encoding(model, orders))
