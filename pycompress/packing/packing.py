"""Packs the matrices of a model, block after block, by curves and budgets measured on the dense one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from pycompress.architectures import model as architectures
from pycompress.calibration import gradients
from pycompress.calibration.batches import first_tokens
from pycompress.calibration.records import Records, recorded_importance
from pycompress.calibration.stream import Stream, statistics_before
from pycompress.checkpoint import Checkpoint, Finished
from pycompress.formats.packed import Packed, Rounded
from pycompress.lm.data import Batch
from pycompress.measure.errors import relative_output_error
from pycompress.methods.allocate import allocate
from pycompress.methods.registry import METHODS, Curve, Statistics
from pycompress.nn.weights import dense_weight
from pycompress.packing.plan import Plan, Step, plan
from pycompress.pipeline import Clock, Outcome, Progress
from pycompress.recipe import Recipe
from pycompress.report import Row
from pycompress.surgery.replace import Undo
from pycompress.surgery.replace import replace as put

Sensitivity = Mapping[str, Tensor]
Curves = Mapping[str, Curve]


@dataclass
class Packing:
    """The packing configs of a recipe at work on one model."""

    model: nn.Module
    configs: Recipe
    batches: list[Batch] | None
    saved: Checkpoint
    progress: Progress

    def __post_init__(self) -> None:
        self.replaced = Undo(self.model)
        self.clock = Clock()

    def run(self) -> Outcome:
        steps = plan(self.model, self.configs)
        sensitivity = self._sensitivity(steps)
        shared = [step for step in steps.steps if step.config.shared]
        curves = self._curves(Plan(tuple(shared)), sensitivity)
        budgets = self._budgets(steps, curves, by_loss=bool(sensitivity))
        rows = self._compress(steps.with_budgets(budgets), curves, sensitivity)
        return Outcome(rows, seconds=self.clock.seconds)

    def undo(self) -> None:
        self.replaced.all()

    def _sensitivity(self, steps: Plan) -> Sensitivity:
        """The loss's sensitivity to each output of the matrices whose method asks for it."""
        names = [s.name for s in steps.steps if s.config.sensitive and s.block != architectures.OUTSIDE]
        if self.batches is None or not names:
            return {}
        known = self.saved.load_sensitivity(names)
        if known is not None:
            return known
        sample = first_tokens(self.batches, gradients.TOKENS)
        blocks, progress = architectures.blocks(self.model), partial(self.progress, what="loss gradients")
        with self.clock("gradients"):
            measured = gradients.loss_sensitivity(self.model, blocks, sample, names, progress)
        self.saved.save_sensitivity(measured)
        return measured

    def _curves(self, shared: Plan, sensitivity: Sensitivity) -> Curves:
        """The rate-distortion curve of each matrix of a shared budget, on the dense model."""
        curves: dict[str, Curve] = {}
        if not shared.steps:
            return curves
        stream, by_block = self._stream(), dict(shared.by_block())
        for block in self.progress(range(min(0, shared.steps[0].block), shared.depth), "measuring"):
            here = by_block.get(block, [])
            measured = self.saved.load_curves(block, [step.name for step in here])
            last = block == shared.depth - 1
            if measured is None:
                statistics = self._statistics(stream, here, sensitivity, advance=not last)
                with self.clock("curves"):
                    measured = {step.name: self._curve(step, statistics) for step in here}
                self.saved.save_curves(block, measured)
            elif stream is not None and block != architectures.OUTSIDE and not last:
                self._advance(stream)
            curves.update(measured)
        return curves

    def _budgets(self, steps: Plan, curves: Curves, by_loss: bool) -> dict[str, int]:
        """Bytes for every matrix of a shared budget, from the dense weights or from curves measured on them."""
        budgets: dict[str, int] = {}
        for config in self.configs:
            mine = [step for step in steps.steps if step.config is config]
            budgets |= config.budgets(partial(self._matrices, mine)) or {}
            if config.shared and mine:
                weighted = config.by_loss and by_loss
                weights = {step.name: curves[step.name].energy if weighted else 1.0 for step in mine}
                total = config.kept_bytes(sum(step.nbytes for step in mine))
                budgets |= allocate({step.name: curves[step.name] for step in mine}, weights, total)
        return budgets

    def _compress(self, steps: Plan, curves: Curves, sensitivity: Sensitivity) -> list[Row]:
        """Compress block after block, each calibrated on what the compressed ones before it give."""
        by_block = dict(steps.by_block())
        rows: list[Row] = []
        # A vision tower gives the blocks their inputs, and goes before them.
        if architectures.OUTSIDE in by_block:
            rows += self._block(architectures.OUTSIDE, by_block[architectures.OUTSIDE], None, curves, sensitivity)
        stream = self._stream()
        for block in self.progress(range(steps.depth), "compressing"):
            rows += self._block(block, by_block.get(block, []), stream, curves, sensitivity)
            if stream is not None and block < steps.depth - 1:
                self._advance(stream)
        return rows

    def _advance(self, stream: Stream) -> None:
        with self.clock("calibrate"):
            stream.advance()

    def _block(
        self, block: int, steps: list[Step], stream: Stream | None, curves: Curves, sensitivity: Sensitivity
    ) -> list[Row]:
        """Compress one block, or take what an earlier run made of it, and put it in place."""
        known: Finished | None = self.saved.load_block(block)
        finished: Finished = [] if known is None else known
        self._put(finished)
        for part in self._stages(steps) if known is None else ():
            statistics = self._statistics(stream, part, sensitivity)
            with self.clock("pack"):
                made = [self._matrix(step, statistics.get(step.name), curves.get(step.name)) for step in part]
            self._put(made)
            finished += made
        if known is None:
            self.saved.save_block(block, finished)
        return [row for _, _, row in finished]

    def _put(self, made: Finished) -> None:
        """Put packed weights in place."""
        for name, packed, _ in made:
            if packed is not None:
                self.replaced.note(name)
                put(self.model, name, packed)

    def _stages(self, steps: list[Step]) -> list[list[Step]]:
        """The steps of a block that are calibrated together: all, or each stage on what the one before it gives."""
        staged = any(step.config.staged for step in steps)
        if not staged or steps[0].block == architectures.OUTSIDE:
            return [steps]
        roles = [stage.roles for stage in architectures.architecture_of(self.model).stages]
        stages = [[step for step in steps if step.role in stage] for stage in roles]
        return [stage for stage in stages if stage]

    def _matrix(self, step: Step, statistics: Statistics | None, curve: Curve | None) -> tuple[str, Packed | None, Row]:
        start = time.perf_counter()
        weight = dense_weight(self.model.get_submodule(step.name))
        given = self._recorded(step)
        packed = METHODS[type(step.config)].compress(weight, statistics, step.config, step.budget, curve, **given)
        gram = None if statistics is None else statistics.gram
        error = 0.0 if packed is None else relative_output_error(weight, packed.unpack(), gram)
        after = step.nbytes if packed is None else packed.nbytes
        stored = step.nbytes if isinstance(packed, Rounded) else after
        seconds = time.perf_counter() - start
        kind = "dense" if packed is None else str(packed)
        return step.name, packed, Row(step.name, step.block, kind, step.nbytes, after, stored, error, seconds)

    def _curve(self, step: Step, statistics: Mapping[str, Statistics]) -> Curve:
        weight = dense_weight(self.model.get_submodule(step.name))
        measure = METHODS[type(step.config)].curve
        assert measure is not None
        return measure(weight, statistics.get(step.name), step.config, **self._recorded(step))

    def _recorded(self, step: Step) -> dict[str, Tensor]:
        """The importance of a step's weights along training, where its method reads that."""
        if step.config.recorded is None:
            return {}
        module = self.model.get_submodule(step.name)
        return {"importance": recorded_importance(Records(step.config.recorded), step.name, module)}

    def _matrices(self, steps: list[Step]) -> Iterator[tuple[str, Tensor, Tensor | None]]:
        for step in steps:
            weight = dense_weight(self.model.get_submodule(step.name))
            yield step.name, weight, self._recorded(step).get("importance")

    def _stream(self) -> Stream | None:
        if self.batches is None:
            return None
        with self.clock("calibrate"):
            return Stream.open(self.model, architectures.blocks(self.model), self.batches)

    def _statistics(
        self, stream: Stream | None, steps: list[Step], sensitivity: Sensitivity, advance: bool = False
    ) -> dict[str, Statistics]:
        """Each step's input statistics, measured once for the linears that share an input."""
        if self.batches is not None and steps and steps[0].block == architectures.OUTSIDE:
            modules = {s.name: self.model.get_submodule(s.name) for s in steps if s.config.needs_calibration}
            with self.clock("calibrate"):
                return statistics_before(self.model, architectures.blocks(self.model), self.batches, modules)
        if stream is None:
            return {}
        stages = architectures.architecture_of(self.model).stages
        readers = {role: stage.roles for stage in stages for role in stage.roles}
        first: dict[tuple[str, ...], str] = {}
        for step in steps:
            first.setdefault(readers[step.role], step.name)
        if not first and not advance:
            return {}
        with self.clock("calibrate"):
            measured = stream.statistics({name: self.model.get_submodule(name) for name in first.values()}, advance)
        shared = {step.name: measured[first[readers[step.role]]] for step in steps}
        return {name: replace(each, sensitivity=sensitivity.get(name)) for name, each in shared.items()}
