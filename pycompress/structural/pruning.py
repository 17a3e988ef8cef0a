"""Structural pruning: choose the channels and blocks that a smaller model inherits, shrink it, refit what remains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.architectures.geometry import Geometry
from pycompress.architectures.model import architecture_of, blocks, geometry
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.calibration.batches import first_tokens
from pycompress.calibration.stream import Stream, block_influence
from pycompress.checkpoint import StageCheckpoint
from pycompress.lm.data import Batch
from pycompress.methods.structural import STRUCTURAL, Refit, Search, Structural, StructuralConfig
from pycompress.nn.weights import assign, dense_weight
from pycompress.pipeline import Outcome, Progress
from pycompress.report import DROPPED, Row
from pycompress.search.result import Result
from pycompress.structural.encoding import Encoding, Order
from pycompress.structural.evolve import Reformed, evolve, narrowed
from pycompress.structural.least_squares import compensation
from pycompress.structural.ranking import READERS, Means, Ranking, head_units
from pycompress.structural.refit import Readers, reader_aims, refit_linears, refit_reader, writer_aims
from pycompress.structural.widths import Budget, Parts
from pycompress.surgery.shrink import shrink

# Of refits while searching; the refit of the winner chooses its own.
REFORM_DAMPING = 1e-3
# A reader's weight `[N, K']` as it is stored, and its relative output error.
Refitted = tuple[Tensor, float]


@dataclass
class Pruning:
    """One structural config at work on one model."""

    model: nn.Module
    config: StructuralConfig
    batches: list[Batch] | None
    saved: StageCheckpoint
    progress: Progress

    def __post_init__(self) -> None:
        self.method: Structural = STRUCTURAL[type(self.config)]
        self.search = self.method.search(self.config)
        self.refit = self.method.refit(self.config)
        self.architecture = architecture_of(self.model)
        self.sizes = [geometry(self.model, block) for block in range(len(blocks(self.model)))]
        self.paths = self.architecture.paths
        self.budget = Budget(self.sizes, self.config.keep, self.config.parts, self.config.round_to)
        self.ranking = Ranking(self.model, self.config, self.batches, self.saved, self.progress, self.budget)
        self.result: Result | None = None
        # What the linears of the rows are called in the model as it was given.
        self.origins: dict[str, str] = {}
        self.undone: Callable[[], None] = lambda: None

    def run(self) -> Outcome:
        refit = self.refit
        compensated = refit is not None and refit.kind == "bias"
        means: Means = {}
        # Means are known once units are ranked.
        known = None if compensated else self.saved.load_subnet()
        if known is None:
            subnet, means = self.choose()
            self.saved.save_subnet(subnet, self.result)
        else:
            subnet, self.result = known
        before = self._bytes()
        dense = None if refit is None or compensated else self._stream()
        biases = self._compensations(subnet, means) if compensated else {}
        self.undone = shrink(self.model, subnet, biases, plain=True if self.config.uniform else None)
        errors = {} if refit is None or dense is None else self._refit(subnet, refit, dense)
        return Outcome(self._rows(subnet, before, errors), self.origins, self.result)

    def undo(self) -> None:
        self.undone()

    def _refit(self, subnet: Subnet, refit: Refit, dense: Stream) -> dict[str, float]:
        """Refit linears block by block; gives the relative output error of each of them."""
        errors: dict[str, float] = {}
        at = self._sequential(dense, refit) if refit.sequential else self._on_dense_inputs(dense, refit)
        for old in self.progress(subnet.kept_blocks, "refitting"):
            new = subnet.kept_blocks.index(old)
            found = self.saved.load_refit(new)
            if found is None:
                kept = subnet.blocks[old]
                assert kept is not None
                found = at(old, new, kept)
                self.saved.save_refit(new, found)
            else:
                for role, (weight, _) in found.items():
                    assign(self._linear(new, role), weight)
            errors |= {self._name(new, role): error for role, (_, error) in found.items()}
        return errors

    def _on_dense_inputs(self, dense: Stream, refit: Refit) -> Callable[[int, int, Kept], dict[str, Refitted]]:
        """What refits a block's narrowed readers from the moments of their inputs in the dense model."""
        readers = self._readers(dense)

        def at(old: int, new: int, kept: Kept) -> dict[str, Refitted]:
            found = {}
            for role, moments in readers.at(old).items():
                whole = dense_weight(dense.blocks[old].get_submodule(self.paths[role]))
                columns = self.sizes[old].columns(role, kept)
                if len(columns) < whole.shape[1]:
                    linear = self._linear(new, role)
                    error = refit_reader(linear, whole, moments, columns, admm=refit.kind == "admm")
                    found[role] = (dense_weight(linear), error)
            return found

        return at

    def _sequential(self, dense: Stream, refit: Refit) -> Callable[[int, int, Kept], dict[str, Refitted]]:
        """What refits a block's linears on what the pruned blocks before it give, in the order they run.

        Each reads what those before it give, refitted.
        """
        pruned = self._stream()
        tokens = dense.tokens

        def at(old: int, new: int, kept: Kept) -> dict[str, Refitted]:
            for stream, position in ((dense, old), (pruned, new)):
                while stream.position < position:
                    stream.advance()
            found: dict[str, Refitted] = {}
            for stage in self.architecture.stages:
                path = self.paths[stage.roles[0]]
                linears = [self._linear(new, role) for role in stage.roles]
                if stage.roles[0] in READERS:
                    errors = refit_linears(linears, reader_aims(dense, pruned, path), tokens)
                elif refit.block:
                    errors = refit_linears(linears, writer_aims(dense, pruned, path, linears), tokens)
                else:
                    continue
                weights = [dense_weight(linear) for linear in linears]
                found |= dict(zip(stage.roles, zip(weights, errors, strict=True), strict=True))
            return found

        return at

    def _compensations(self, subnet: Subnet, means: Means) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Weights and biases of the linears that lose columns, the bias standing for the mean of what is gone."""
        found = {}
        for block in subnet.kept_blocks:
            kept, size = subnet.blocks[block], self.sizes[block]
            assert kept is not None
            for role in READERS:
                columns = size.columns(role, kept)
                linear = self._linear(block, role)
                weight = dense_weight(linear)
                if len(columns) < weight.shape[1]:
                    bias = compensation(weight, means[block, role].to(weight.device), columns.to(weight.device))
                    bias = bias if linear.bias is None else bias + linear.get_parameter("bias").detach().double()
                    found[self._name(block, role)] = (weight[:, columns.to(weight.device)], bias)
        return found

    def choose(self) -> tuple[Subnet, Means]:
        """The subnet of the config's size whose units matter most, and the means that compensations take."""
        if self.method.blocks is not None:
            return self._whole_blocks(self.method.blocks), {}
        ranked, means = self.ranking.run()
        left = self._sizes(ranked)
        if self.search is not None:
            return self._evolved(self.search, ranked, left), means
        return Subnet(tuple(map(_kept, self.sizes, left, ranked))), means

    def _evolved(self, search: Search, ranked: list[Parts], left: list[Geometry]) -> Subnet:
        """The best subnet of a search that starts from these sizes."""
        assert self.batches is not None
        orders = [_order(size, found) for size, found in zip(self.sizes, ranked, strict=True)]
        space = Encoding(self.model, orders).space(self.config.keep, round_to=self.budget.steps, depth=search.depth)
        shares = [(new.width / old.width, new.mlp / old.mlp) for old, new in zip(self.sizes, left, strict=True)]
        provider = self._reformed() if search.refitted and "mlp" in self.config.parts else None
        subnet, self.result = evolve(
            self.model,
            first_tokens(self.batches, search.samples),
            orders,
            shares,
            narrowed(space, self.config.parts),
            provider,
            search,
            folder=self.saved.folder,
            identity=self.saved.key,
            progress=self.progress.shown,
        )
        return subnet

    def _reformed(self) -> Reformed:
        """What refits candidates' `down` on the dense inputs."""
        readers, count = self._readers(self._stream()), len(self.sizes)
        grams = [readers.at(block)["down"].total for block in self.progress(range(count), "inputs")]
        downs = [self._linear(block, "down") for block in range(count)]
        biases = [None if down.bias is None else down.bias.detach().float() for down in downs]
        return Reformed([dense_weight(down).float() for down in downs], grams, biases, REFORM_DAMPING)

    def _readers(self, dense: Stream) -> Readers:
        """Moments of what the linears read that may lose columns."""
        roles = [role for role, parts in READERS.items() if set(parts) & set(self.config.parts)]
        return Readers(dense, {role: self.paths[role] for role in roles}, self.saved)

    def _whole_blocks(self, score: Callable[[Tensor, Any], Tensor]) -> Subnet:
        influence = torch.zeros(len(self.sizes), dtype=torch.float64)
        if self.config.needs_calibration:
            known = self.saved.load_ranking(self.ranking.key)
            if known is None:
                known = {"influence": block_influence(self._stream())}
                self.saved.save_ranking(self.ranking.key, known)
            influence = known["influence"]
        order = score(influence, self.config).argsort()
        total = sum(size.parameters(Kept()) for size in self.sizes)
        left, gone = total, set[int]()
        for block in order.tolist():
            if left <= self.config.keep * total or len(gone) == len(self.sizes) - 1:
                break
            left -= self.sizes[block].parameters(Kept())
            gone.add(block)
        return Subnet(tuple(None if block in gone else Kept() for block in range(len(self.sizes))))

    def _sizes(self, ranked: list[Parts]) -> list[Geometry]:
        """Of each block what is left, at most `config.keep` of the parameters in all."""
        if self.method.by_error(self.config) and not self.config.uniform:
            return self.budget.by_error(ranked)
        if self.method.compared(self.config) and not self.config.uniform:
            return self.budget.by_score(ranked)
        return self.budget.by_share()

    def _stream(self) -> Stream:
        assert self.batches is not None
        return Stream.open(self.model, blocks(self.model), self.batches)

    def _name(self, block: int, role: str) -> str:
        return f"{self.architecture.blocks}.{block}.{self.paths[role]}"

    def _linear(self, block: int, role: str) -> Any:
        return self.model.get_submodule(self._name(block, role))

    def _bytes(self) -> dict[tuple[int, str], int]:
        weights = {(b, r): dense_weight(self._linear(b, r)) for b in range(len(self.sizes)) for r in self.paths}
        return {key: weight.numel() * weight.element_size() for key, weight in weights.items()}

    def _rows(self, subnet: Subnet, before: dict[tuple[int, str], int], errors: dict[str, float]) -> list[Row]:
        rows = []
        for old in range(len(self.sizes)):
            for role in self.paths:
                if old not in subnet.kept_blocks:
                    name = f"{DROPPED} {self._name(old, role)}"
                    self.origins[name] = self._name(old, role)
                    rows.append(Row(name, old, DROPPED, before[old, role], 0, 0, float("nan"), 0.0))
                    continue
                new = subnet.kept_blocks.index(old)
                name = self._name(new, role)
                self.origins[name] = self._name(old, role)
                weight = dense_weight(self.model.get_submodule(name))
                after = weight.numel() * weight.element_size()
                kind = f"dense {weight.shape[0]}x{weight.shape[1]}"
                error = errors.get(name, float("nan"))
                rows.append(Row(name, new, kind, before[old, role], after, after, error, 0.0))
        return rows


def _order(size: Geometry, found: Parts) -> Order:
    """The block's units, the most important first."""
    mlp = found["mlp"].order.flip(0) if "mlp" in found else None
    if "mlp" in found and len(found) == 1:
        return Order(mlp=mlp)
    units = head_units(size)
    starts = dict(zip(units, (0, len(size.qk_units)), strict=False))
    rows = torch.cat([found[name].order.flip(0) + starts[name] for name in units])
    if "values" in found:
        values = found["values"].order.flip(-1).view(-1, size.width)
    else:
        values = torch.cat([units[name][found[name].order.flip(0)].flatten() for name in units])
    return Order(mlp=mlp, qk=rows[None], vo=values.expand(size.kv_heads, -1))


def _kept(size: Geometry, left: Geometry, found: Parts) -> Kept:
    """The units of a block that matter most, as many as are `left`."""
    mlp = None if left.mlp == size.mlp else found["mlp"].kept(left.mlp)
    if left.kv_heads < size.kv_heads:
        return Kept(mlp=mlp, kv_heads=found["kv_heads"].kept(left.kv_heads))
    if left.width == size.width:
        return Kept(mlp=mlp)
    counts = {"attention": left.width, "rotated": left.rotary, "passed": left.width - left.rotary}
    kept = [
        units[found[name].kept(counts[name] // units.shape[1])].flatten() for name, units in head_units(size).items()
    ]
    channels = torch.cat(kept).sort().values
    values = found["values"].kept(left.width).view(-1, left.width) if "values" in found else channels
    return Kept(mlp=mlp, qk=channels[None], vo=values.expand(size.kv_heads, -1))
