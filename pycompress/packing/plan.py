"""What will be done to a model: one step a matrix. Pure and printable; knows names and shapes only."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import nn

from pycompress.architectures.model import linears, outside, select
from pycompress.calibration.records import Records
from pycompress.methods.registry import METHODS
from pycompress.nn.weights import dense_weight
from pycompress.recipe import Config, Recipe
from pycompress.surgery.replace import check_replaceable


@dataclass(frozen=True)
class Step:
    """One matrix `[N, K]` and the config that compresses it. `budget`: bytes it may take, None where it chooses.

    Of a matrix outside the decoder blocks, `block` is `architectures.model.OUTSIDE`.
    """

    name: str
    block: int
    role: str
    shape: tuple[int, int]
    nbytes: int
    config: Config
    budget: int | None = None


@dataclass(frozen=True)
class Plan:
    """Steps in order of execution; those outside the blocks come first."""

    steps: tuple[Step, ...]

    @property
    def depth(self) -> int:
        """Blocks up to the last that has a step: nothing is run behind it."""
        return 1 + max((step.block for step in self.steps), default=-1)

    def by_block(self) -> Iterator[tuple[int, list[Step]]]:
        """Blocks that have steps, each with its steps."""
        for block, steps in groupby(self.steps, key=lambda step: step.block):
            yield block, list(steps)

    def with_budgets(self, budgets: dict[str, int]) -> Plan:
        steps = tuple(dataclasses.replace(s, budget=budgets.get(s.name, s.budget)) for s in self.steps)
        return dataclasses.replace(self, steps=steps)

    def __str__(self) -> str:
        rows = [f"{'module':<44}{'shape':>14}{'bytes':>12}{'budget':>12}  config"]
        for s in self.steps:
            budget = "" if s.budget is None else f"{s.budget}"
            rows.append(f"{s.name:<44}{'x'.join(map(str, s.shape)):>14}{s.nbytes:>12}{budget:>12}  {s.config.name}")
        return "\n".join(rows)


def plan(model: nn.Module, recipe: Recipe) -> Plan:
    """The steps a recipe takes on a model, nothing loaded or run.

    Raises `ValueError` for an unknown architecture, a target that names nothing or cannot be replaced (see
    `check_replaceable`), or a matrix two configs claim.
    """
    claimed: dict[str, Step] = {}
    for config in recipe:
        for linear in select(model, config.targets):
            if linear.name in claimed:
                raise ValueError(
                    f"{linear.name} is a target of both {claimed[linear.name].config.name} and {config.name}; "
                    f"give the two different targets"
                )
            check_replaceable(model, linear.name)
            weight = dense_weight(model.get_submodule(linear.name))
            shape = (weight.shape[0], weight.shape[1])
            nbytes = weight.numel() * weight.element_size()
            claimed[linear.name] = Step(linear.name, linear.block, linear.role, shape, nbytes, config)
    order = {linear.name: index for index, linear in enumerate(outside(model) + linears(model))}
    steps = sorted(claimed.values(), key=lambda step: order[step.name])
    return Plan(tuple(steps))


def check_weights(model: nn.Module, steps: Plan) -> None:
    """Raise `ValueError` for a weight that cannot be read, or that its method cannot pack as its config says."""
    for step in steps.steps:
        weight = dense_weight(model.get_submodule(step.name))
        if weight.is_meta:
            raise ValueError(f"{step.name} is on the meta device; load the model's weights before compressing it")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{step.name} holds NaN or infinite weights; load the model again from an intact file")
        if step.config.recorded is not None:
            shape = model.get_submodule(step.name).get_parameter("weight").shape
            Records(step.config.recorded).check(step.name, tuple(shape))
        if type(step.config) not in METHODS:
            continue
        try:
            METHODS[type(step.config)].check((weight.shape[0], weight.shape[1]), weight.dtype, step.config)
        except ValueError as error:
            raise ValueError(f"{step.name}: {error}") from error
