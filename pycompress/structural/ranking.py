"""Ranks the units of every block of a dense model by a structural method's scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress.architectures.geometry import Geometry
from pycompress.architectures.model import architecture_of, blocks
from pycompress.calibration import gradients
from pycompress.calibration.batches import first_tokens
from pycompress.calibration.gradients import loss_covariance, weight_saliency
from pycompress.calibration.records import Records, recorded_importance
from pycompress.calibration.stream import Stream
from pycompress.checkpoint import StageCheckpoint
from pycompress.lm.data import Batch
from pycompress.methods._elimination import Elimination
from pycompress.methods.registry import Statistics
from pycompress.methods.structural import STRUCTURAL, Group, Member, Structural, StructuralConfig
from pycompress.nn.weights import dense_weight
from pycompress.pipeline import Progress
from pycompress.structural.widths import Budget, Parts, Ranked

# Linears that read a block's channels, and the parts whose units those are; the others write them.
READERS = {"o": ("attention", "kv_heads"), "down": ("mlp",)}
# Of what the readers of a block read, `[K]` by block and role.
Means = dict[tuple[int, str], Tensor]


class Rankings(NamedTuple):
    """Each block's parts with their units in order, and the means of what their readers read where the method asks."""

    blocks: list[Parts]
    means: Means


@dataclass
class Ranking:
    """The scores of one structural config on one model. `budget`: of the config, for methods that learn their scores.

    `key`: the settings that decide it, under which `saved` keeps it.
    """

    model: nn.Module
    config: StructuralConfig
    batches: list[Batch] | None
    saved: StageCheckpoint
    progress: Progress
    budget: Budget

    def __post_init__(self) -> None:
        self.method: Structural = STRUCTURAL[type(self.config)]
        self.scores = self.method.scores
        self.records = None if self.config.recorded is None else Records(self.config.recorded)
        self.architecture = architecture_of(self.model)
        self.sizes = self.budget.sizes
        self.key = repr((self.config.name, self.config.parts, self.method.ranking(self.config)))

    def run(self) -> Rankings:
        known = self._known()
        if known is not None:
            return known
        measured = self._measured()
        self._save(measured)
        return measured

    def _known(self) -> Rankings | None:
        """What an earlier run has ranked."""
        found = self.saved.load_ranking(self.key)
        if found is None:
            return None
        ranked: list[Parts] = [{} for _ in self.sizes]
        means: Means = {}
        for key, tensor in found.items():
            block, name, what = key.split(" ")
            if what == "mean":
                means[int(block), name] = tensor
            elif what == "order":
                scores, error = found[f"{block} {name} scores"], found.get(f"{block} {name} error")
                ranked[int(block)][name] = Ranked(tensor, scores, error)
        return Rankings(ranked, means)

    def _save(self, rankings: Rankings) -> None:
        tensors = {f"{block} {role} mean": mean for (block, role), mean in rankings.means.items()}
        for block, parts in enumerate(rankings.blocks):
            for part, found in parts.items():
                tensors |= {f"{block} {part} order": found.order, f"{block} {part} scores": found.scores}
                tensors |= {} if found.error is None else {f"{block} {part} error": found.error}
        self.saved.save_ranking(self.key, tensors)

    def _measured(self) -> Rankings:
        """Every block's parts ranked, from the dense model."""
        names = [self._name(block, role) for block in range(len(self.sizes)) for role in self.architecture.paths]
        saliency: dict[str, tuple[Tensor, Tensor]] = {}
        covariance: dict[str, Tensor] = {}
        if self.batches is not None and {"saliency", "covariance"} & set(self.method.needs):
            sample = first_tokens(self.batches, gradients.TOKENS)
            progress = partial(self.progress, what="loss gradients")
            if "saliency" in self.method.needs:
                weights = {name: dense_weight(self.model.get_submodule(name)) for name in names}
                saliency = weight_saliency(self.model, blocks(self.model), sample, weights, progress)
            else:
                read_by_role = [*READERS, *([self.sizes[0].holder("q")] if "attention" in self.config.parts else [])]
                read = [self._name(block, role) for block in range(len(self.sizes)) for role in read_by_role]
                covariance = loss_covariance(self.model, blocks(self.model), sample, read, progress)
        reads = {"gram", "mean"} & set(self.method.needs)
        stream = self._stream() if reads else None
        if self.method.learn is not None:
            self.scores = self.method.learn(
                self._mlp, [b.mlp for b in self.budget.by_share()], self.config, self.progress
            )
        ranked: list[Parts] = []
        means: Means = {}
        for block in self.progress(range(len(self.sizes)), "ranking"):
            statistics: dict[str, Statistics] = {}
            if stream is not None:
                modules = {stage.roles[0]: self._linear(block, stage.roles[0]) for stage in self.architecture.stages}
                measured = stream.statistics(modules, advance=block < len(self.sizes) - 1)
                for stage in self.architecture.stages:
                    statistics |= dict.fromkeys(stage.roles, measured[stage.roles[0]])
                if "mean" in self.method.needs:
                    means |= {(block, role): _mean(statistics[role]) for role in READERS}
            member = lambda role, units: self._member(block, role, units, statistics, saliency, covariance)  # noqa: B023, E731
            ranked.append({part: self._ranked(group) for part, group in self._groups(block, member).items()})
        return Rankings(ranked, means)

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
            for name, units in head_units(size).items():
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

    def _stream(self) -> Stream:
        assert self.batches is not None
        return Stream.open(self.model, blocks(self.model), self.batches)

    def _name(self, block: int, role: str) -> str:
        return f"{self.architecture.blocks}.{block}.{self.architecture.paths[role]}"

    def _linear(self, block: int, role: str) -> Any:
        return self.model.get_submodule(self._name(block, role))


def _mean(statistics: Statistics) -> Tensor:
    assert statistics.mean is not None
    return statistics.mean


def head_units(size: Geometry) -> dict[str, Tensor]:
    """Channels of a head that go together, `[U, C]`: all of one kind, or rotary pairs and the channels beside them."""
    if not size.rotary or size.rotary == size.width:
        return {"attention": size.qk_units}
    return {"rotated": size.qk_units, "passed": size.passed[:, None]}
