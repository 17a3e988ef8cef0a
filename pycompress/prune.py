"""Structural pruning: choose the channels and blocks that a smaller model inherits, shrink it, refit what remains."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.architectures.supported import Geometry, architecture_of, blocks, geometry
from pycompress.batches import Batch
from pycompress.calibrate import Stream, block_influence, first_tokens
from pycompress.candidates import Encoding, Order
from pycompress.checkpoint import Stage
from pycompress.evolve import Reformed, evolve, narrowed
from pycompress.methods.importance import Elimination
from pycompress.methods.registry import Statistics
from pycompress.methods.structural import STRUCTURAL, Bar, Group, Member, Refit, Search, Structural, StructuralConfig
from pycompress.records import Records
from pycompress.refit import Readers, assign, reader_aims, refit_linears, refit_reader, writer_aims
from pycompress.reform import compensation
from pycompress.replace import dense_weight, recorded_importance
from pycompress.report import DROPPED, Row
from pycompress.search import Result
from pycompress.sensitivity import loss_covariance, weight_saliency
from pycompress.shrink import shrink
from pycompress.subnet import Kept, Subnet
from pycompress.widths import Budget, Parts, Ranked

SENSITIVITY_TOKENS = 4096
# Of refits while searching; the refit of the winner chooses its own.
REFORM_DAMPING = 1e-3
# Linears that read a block's channels, and the parts whose units those are; the others write them.
READERS = {"o": ("attention", "kv_heads"), "down": ("mlp",)}
# A reader's weight `[N, K']` as it is stored, and its relative output error.
Refitted = tuple[Tensor, float]


@dataclass
class Pruning:
    """One structural config at work on one model. `run` gives the report's rows and what undoes the change."""

    model: nn.Module
    config: StructuralConfig
    batches: list[Batch] | None
    saved: Stage
    bar: Bar
    progress: bool = True

    def __post_init__(self) -> None:
        self.method: Structural = STRUCTURAL[type(self.config)]
        self.records = None if self.config.recorded is None else Records(self.config.recorded)
        self.scores = self.method.scores
        self.search = self.method.search(self.config)
        self.refit = self.method.refit(self.config)
        self.architecture = architecture_of(self.model)
        self.sizes = [geometry(self.model, block) for block in range(len(blocks(self.model)))]
        self.paths = self.architecture.paths
        self.budget = Budget(self.sizes, self.config.keep, self.config.parts, self.config.round_to)
        self.means: dict[tuple[int, str], Tensor] = {}
        self.result: Result | None = None
        # What the linears of the rows are called in the model as it was given.
        self.origins: dict[str, str] = {}

    def run(self) -> tuple[list[Row], Callable[[], None]]:
        refit = self.refit
        compensated = refit is not None and refit.kind == "bias"
        # Means are known once units are ranked.
        known = None if compensated else self.saved.load_subnet()
        if known is None:
            subnet = self.choose()
            self.saved.save_subnet(subnet, self.result)
        else:
            subnet, self.result = known
        before = self._bytes()
        dense = None if refit is None or compensated else self._stream()
        biases = self._compensations(subnet) if compensated else {}
        undo = shrink(self.model, subnet, biases, plain=True if self.config.uniform else None)
        try:
            errors: dict[str, float] = {}
            if refit is not None and dense is not None:
                errors = self._refit(subnet, refit, dense)
            return self._rows(subnet, before, errors), undo
        except BaseException:
            undo()
            raise

    def _refit(self, subnet: Subnet, refit: Refit, dense: Stream) -> dict[str, float]:
        """Refit linears block by block; gives the relative output error of each of them."""
        errors: dict[str, float] = {}
        at = self._sequential(dense, refit) if refit.sequential else self._on_dense_inputs(dense, refit)
        for old in self.bar(subnet.kept_blocks, "refitting"):
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

    def _compensations(self, subnet: Subnet) -> dict[str, tuple[Tensor, Tensor | None]]:
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
                    bias = compensation(weight, self.means[block, role].to(weight.device), columns.to(weight.device))
                    bias = bias if linear.bias is None else bias + linear.get_parameter("bias").detach().double()
                    found[self._name(block, role)] = (weight[:, columns.to(weight.device)], bias)
        return found

    def choose(self) -> Subnet:
        """The subnet of the config's size whose units matter most."""
        if self.method.blocks is not None:
            return self._whole_blocks()
        ranked = self._known_ranking() or self._rank()
        left = self._sizes(ranked)
        if self.search is not None:
            return self._evolved(self.search, ranked, left)
        return Subnet(tuple(map(_kept, self.sizes, left, ranked)))

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
            progress=self.progress,
        )
        return subnet

    def _reformed(self) -> Reformed:
        """What refits candidates' `down` on the dense inputs."""
        readers, count = self._readers(self._stream()), len(self.sizes)
        grams = [readers.at(block)["down"].total for block in self.bar(range(count), "inputs")]
        downs = [self._linear(block, "down") for block in range(count)]
        biases = [None if down.bias is None else down.bias.detach().float() for down in downs]
        return Reformed([dense_weight(down).float() for down in downs], grams, biases, REFORM_DAMPING)

    def _readers(self, dense: Stream) -> Readers:
        """Moments of what the linears read that may lose columns."""
        roles = [role for role, parts in READERS.items() if set(parts) & set(self.config.parts)]
        return Readers(dense, {role: self.paths[role] for role in roles}, self.saved)

    def _whole_blocks(self) -> Subnet:
        assert self.method.blocks is not None
        influence = torch.zeros(len(self.sizes), dtype=torch.float64)
        if self.config.needs_calibration:
            known = self.saved.load_ranking(self._ranking)
            if known is None:
                known = {"influence": block_influence(self._stream())}
                self.saved.save_ranking(self._ranking, known)
            influence = known["influence"]
        order = self.method.blocks(influence, self.config).argsort()
        total = sum(size.parameters(Kept()) for size in self.sizes)
        left, gone = total, set[int]()
        for block in order.tolist():
            if left <= self.config.keep * total or len(gone) == len(self.sizes) - 1:
                break
            left -= self.sizes[block].parameters(Kept())
            gone.add(block)
        return Subnet(tuple(None if block in gone else Kept() for block in range(len(self.sizes))))

    def _known_ranking(self) -> list[Parts] | None:
        """What an earlier run has ranked."""
        found = self.saved.load_ranking(self._ranking)
        if found is None:
            return None
        ranked: list[Parts] = [{} for _ in self.sizes]
        for key, tensor in found.items():
            block, name, what = key.split(" ")
            if what == "mean":
                self.means[int(block), name] = tensor
            elif what == "order":
                scores, error = found[f"{block} {name} scores"], found.get(f"{block} {name} error")
                ranked[int(block)][name] = Ranked(tensor, scores, error)
        return ranked

    def _save_ranking(self, ranked: list[Parts]) -> None:
        tensors = {f"{block} {role} mean": mean for (block, role), mean in self.means.items()}
        for block, parts in enumerate(ranked):
            for part, found in parts.items():
                tensors |= {f"{block} {part} order": found.order, f"{block} {part} scores": found.scores}
                tensors |= {} if found.error is None else {f"{block} {part} error": found.error}
        self.saved.save_ranking(self._ranking, tensors)

    @property
    def _ranking(self) -> str:
        return repr((self.config.name, self.config.parts, self.method.ranking(self.config)))

    def _rank(self) -> list[Parts]:
        """Every block's parts ranked, from the dense model."""
        names = [self._name(block, role) for block in range(len(self.sizes)) for role in self.paths]
        saliency: dict[str, tuple[Tensor, Tensor]] = {}
        covariance: dict[str, Tensor] = {}
        if self.batches is not None and {"saliency", "covariance"} & set(self.method.needs):
            sample = first_tokens(self.batches, SENSITIVITY_TOKENS)
            progress = lambda items: self.bar(items, "loss gradients")  # noqa: E731
            if "saliency" in self.method.needs:
                weights = {name: dense_weight(self.model.get_submodule(name)) for name in names}
                saliency = weight_saliency(self.model, blocks(self.model), sample, weights, progress)
            else:
                felt = [*READERS, *([self.sizes[0].holder("q")] if "attention" in self.config.parts else [])]
                read = [self._name(block, role) for block in range(len(self.sizes)) for role in felt]
                covariance = loss_covariance(self.model, blocks(self.model), sample, read, progress)
        reads = {"gram", "mean"} & set(self.method.needs)
        stream = self._stream() if reads else None
        if self.method.learn is not None:
            self.scores = self.method.learn(self._mlp, [b.mlp for b in self.budget.by_share()], self.config, self.bar)
        found = []
        for block in self.bar(range(len(self.sizes)), "ranking"):
            statistics: dict[str, Statistics] = {}
            if stream is not None:
                modules = {stage.roles[0]: self._linear(block, stage.roles[0]) for stage in self.architecture.stages}
                measured = stream.statistics(modules, advance=block < len(self.sizes) - 1)
                for stage in self.architecture.stages:
                    statistics |= dict.fromkeys(stage.roles, measured[stage.roles[0]])
                if "mean" in self.method.needs:
                    self.means |= {(block, role): _mean(statistics[role]) for role in READERS}
            member = lambda role, units: self._member(block, role, units, statistics, saliency, covariance)  # noqa: B023, E731
            found.append({part: self._ranked(group) for part, group in self._groups(block, member).items()})
        self._save_ranking(found)
        return found

    def _groups(self, block: int, member: Callable[[str, Tensor], Member]) -> dict[str, Group]:
        """The block's parts by name, as `widths.Parts` has them."""
        size = self.sizes[block]
        roles = size.part_roles
        found = {}
        if "mlp" in self.config.parts:
            writers = tuple(member(role, size.channel_rows(role)[:, None]) for role in ("gate", "up") if role in roles)
            found["mlp"] = Group(writers, (member("down", size.channel_columns("down")[:, None]),))
        for name, index in self._head_indices(size).items():
            writers = tuple(member(role, units) for role, units in index.items() if role != "o")
            found[name] = Group(writers, (member("o", index["o"]),) if "o" in index else ())
        return found

    def _head_indices(self, size: Geometry) -> dict[str, dict[str, Tensor]]:
        """For each part of the heads that is pruned, by role the rows (of o the columns) of each unit, `[U, C]`, or of
        the units of each key-value head, `[S, U, C]`.
        """
        channels = {role: size.channel_rows(role) for role in ("q", "k", "v")} | {"o": size.channel_columns("o")}
        found = {}
        if "attention" in self.config.parts:
            # What can be chosen apart is, where the method tells what each costs.
            apart = self.method.eliminate is not None
            roles = ("q", "k") if apart else tuple(channels)
            for name, units in _head_units(size).items():
                found[name] = {role: channels[role][:, units].transpose(0, 1).flatten(1) for role in roles}
            if apart:
                found["values"] = {
                    role: channels[role].view(size.kv_heads, -1, size.width).transpose(1, 2) for role in ("v", "o")
                }
        # A single one always stays.
        if "kv_heads" in self.config.parts and size.kv_heads > 1:
            found["kv_heads"] = {role: of.reshape(size.kv_heads, -1) for role, of in channels.items()}
        return found

    def _member(
        self,
        block: int,
        role: str,
        units: Tensor,
        statistics: dict[str, Statistics],
        saliency: dict[str, tuple[Tensor, Tensor]],
        covariance: dict[str, Tensor],
    ) -> Member:
        holder = self.sizes[block].holder(role)
        name = self._name(block, holder)
        linear = self.model.get_submodule(name)
        weight = dense_weight(linear).float()
        inputs = statistics.get(holder)
        reads = role in READERS
        return Member(
            weight,
            units.to(weight.device),
            bias=None if linear.bias is None else linear.get_parameter("bias").detach(),
            gram=None if inputs is None else inputs.gram,
            mean=None if inputs is None else inputs.mean,
            saliency=saliency[name][1 if reads else 0] if name in saliency else None,
            covariance=covariance.get(name),
            recorded=None if self.records is None else recorded_importance(self.records, name, linear),
        )

    def _mlp(self, block: int) -> Group:
        """The block's MLP by its weights alone."""
        return self._groups(block, partial(self._member, block, statistics={}, saliency={}, covariance={}))["mlp"]

    def _ranked(self, group: Group) -> Ranked:
        if self.method.eliminate is not None:
            found: Elimination = self.method.eliminate(group, self.config)
            # The last unit never goes.
            error = torch.cat([found.error, found.error[-1:]])
            order = found.order if len(found.order) > 1 else found.order[0]
            return Ranked(order, error[1:].clone(), error)
        assert self.scores is not None
        scores = self.scores(group, self.config).cpu()
        order = scores.argsort(stable=True)
        return Ranked(order, scores[order])

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
    units = _head_units(size)
    starts = dict(zip(units, (0, len(size.qk_units)), strict=False))
    rows = torch.cat([found[name].order.flip(0) + starts[name] for name in units])
    if "values" in found:
        values = found["values"].order.flip(-1).view(-1, size.width)
    else:
        values = torch.cat([units[name][found[name].order.flip(0)].flatten() for name in units])
    return Order(mlp=mlp, qk=rows[None], vo=values.expand(size.kv_heads, -1))


def _mean(statistics: Statistics) -> Tensor:
    assert statistics.mean is not None
    return statistics.mean


def _head_units(size: Geometry) -> dict[str, Tensor]:
    """Channels of a head that go together, `[U, C]`: all of one kind, or rotary pairs and the channels beside them."""
    if not size.rotary or size.rotary == size.width:
        return {"attention": size.qk_units}
    return {"rotated": size.qk_units, "passed": size.passed[:, None]}


def _kept(size: Geometry, left: Geometry, found: Parts) -> Kept:
    """The units of a block that matter most, as many as are `left`."""
    mlp = None if left.mlp == size.mlp else found["mlp"].kept(left.mlp)
    if left.kv_heads < size.kv_heads:
        return Kept(mlp=mlp, kv_heads=found["kv_heads"].kept(left.kv_heads))
    if left.width == size.width:
        return Kept(mlp=mlp)
    counts = {"attention": left.width, "rotated": left.rotary, "passed": left.width - left.rotary}
    kept = [
        units[found[name].kept(counts[name] // units.shape[1])].flatten() for name, units in _head_units(size).items()
    ]
    channels = torch.cat(kept).sort().values
    values = found["values"].kept(left.width).view(-1, left.width) if "values" in found else channels
    return Kept(mlp=mlp, qk=channels[None], vo=values.expand(size.kv_heads, -1))
