"""`apply`: compress a model by a recipe. Reads as the table of contents of the whole package."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from dataclasses import replace as replace_field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pycompress import calibrate
from pycompress import recipe as recipes
from pycompress.allocate import spread
from pycompress.architectures import supported as groups
from pycompress.batches import Batch
from pycompress.calibrate import Stream
from pycompress.checkpoint import Checkpoint, Finished, identity_of
from pycompress.formats import Packed, Rounded
from pycompress.measure.errors import relative_output_error
from pycompress.measure.model import evaluation
from pycompress.methods import METHODS, Curve, ShrinkConfig, SliceGPT, Statistics
from pycompress.plan import Plan, Step, plan
from pycompress.prune import Pruning
from pycompress.recipe import Config, Recipe
from pycompress.records import Records
from pycompress.replace import Undo, dense_weight, recorded_importance, replace
from pycompress.report import DROPPED, Report, Row, Total
from pycompress.search import Result
from pycompress.sensitivity import loss_sensitivity
from pycompress.shrink import check_free
from pycompress.slicing import Slicing
from pycompress.state import neutral

SENSITIVITY_TOKENS = 4096


def apply(
    model: nn.Module,
    recipe: Config | list[Config] | tuple[Config, ...] | str | Path,
    calibration: Any = None,
    *,
    tokenizer: Any = None,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    bos: bool | None = None,
) -> Report:
    """Compress a Hugging Face causal LM in place, and report what it cost and saved.

    `recipe`: a config such as `SWSC(keep=0.5)`, a list of them, a method's name, or a YAML path. `calibration`: texts
    or conversations (with a `tokenizer`), ids `[B, T]`, batches (a dict, BatchEncoding or DataLoader), a dataset or
    DataFrame with a column text, messages or input_ids. Padding does not count: what `attention_mask` masks is left
    out. `bos`: whether a BOS goes before each window of text, None for what the tokenizer does. `checkpoint`: a
    directory in which progress is kept; the same call after an interruption goes on from there to the same bits, and
    one with another `keep` reuses what was measured. An error or interruption leaves the model as it was, and any call
    leaves modes, hooks, random generators and torch's settings so; autocast and the default dtype do not reach it.
    Raises `ValueError` or `TypeError` for a recipe, model or calibration that cannot be used, before anything is
    changed, and `ValueError` for activations that are not finite, naming where they come from.
    """
    with neutral(), evaluation(model):
        return _apply(model, recipe, calibration, tokenizer, checkpoint, progress, bos)


def _apply(
    model: nn.Module,
    recipe: Config | list[Config] | tuple[Config, ...] | str | Path,
    calibration: Any,
    tokenizer: Any,
    checkpoint: str | Path | None,
    progress: bool,
    bos: bool | None,
) -> Report:
    configs = recipes.parse(recipe)
    structural, packing = _split(configs)
    steps = plan(model, packing)
    # Every structural method takes all the linears of the blocks.
    _check_weights(model, plan(model, [*structural[:1]]))
    _check_weights(model, steps)
    _check_vision(model, structural, steps)
    if structural:
        check_free(model)
    batches = _batches(model, configs, calibration, tokenizer, bos)
    identity = {} if checkpoint is None else _identity(model, batches)
    with Checkpoint(checkpoint, identity, configs) as saved:
        job = _Job(model, batches, saved, progress)
        try:
            before = _bytes_of(model)
            pruned = job.prune(structural)
            between = _bytes_of(model)
            steps = plan(model, packing)
            job.feel(steps)
            rows = job.compress(job.allocate(steps, packing))
            return replace_field(_report(pruned, rows, before, between, configs), searches=tuple(job.searches))
        except BaseException:
            job.undo_all()
            raise


@dataclass
class _Job:
    """One run of `apply`: what its stages share."""

    model: nn.Module
    batches: list[Batch] | None
    saved: Checkpoint
    progress: bool

    def __post_init__(self) -> None:
        self.undo = Undo(self.model)
        self.shrunk: list[Callable[[], None]] = []
        self.searches: list[Result] = []
        self.sensitivity: dict[str, Tensor] = {}
        self.curves: dict[str, Curve] = {}

    def prune(self, configs: list[ShrinkConfig]) -> list[Row]:
        """Shrink the model by one structural method after the other; rows of what it is then made of."""
        rows: dict[str, Row] = {}
        dropped: list[Row] = []
        for count, config in enumerate(configs, start=1):
            stage = self.saved.stage(configs[:count])
            runner = Slicing if isinstance(config, SliceGPT) else Pruning
            work: Any = runner(self.model, config, self.batches, stage, self._bar, self.progress)  # type: ignore[arg-type]
            found, undo = work.run()
            self.shrunk.append(undo)
            self.searches += [] if work.result is None else [work.result]
            # Bytes before are those of the dense model.
            found = [
                replace_field(row, before=rows.get(work.origins.get(row.name, row.name), row).before) for row in found
            ]
            dropped += [row for row in found if row.format == DROPPED]
            rows = {row.name: row for row in found if row.format != DROPPED}
        return [*rows.values(), *dropped]

    def undo_all(self) -> None:
        """Put the model back as it was."""
        self.undo.all()
        for undo in reversed(self.shrunk):
            undo()

    def allocate(self, steps: Plan, configs: Recipe) -> Plan:
        """Give every step of a shared budget its bytes, from the dense weights or from curves measured on them."""
        budgets: dict[str, int] = {}
        for config in configs:
            whole = METHODS[type(config)].budgets(config)
            if whole is not None:
                budgets |= whole(config, partial(self._matrices, [s for s in steps.steps if s.config is config]))
        shared = [step for step in steps.steps if METHODS[type(step.config)].shared(step.config)]
        if not shared:
            return steps.with_budgets(budgets)
        self.curves = curves = self._curves(shared, steps.depth)
        for config in configs:
            mine = [step.name for step in shared if step.config is config]
            if mine:
                total = math.floor(config.keep * sum(s.nbytes for s in shared if s.config is config))  # type: ignore[attr-defined]
                by_loss = getattr(config, "allocation", "") == "loss" and self.sensitivity
                weights = {name: curves[name].energy if by_loss else 1.0 for name in mine}
                budgets |= spread({name: curves[name] for name in mine}, weights, total)
        return steps.with_budgets(budgets)

    def feel(self, steps: Plan) -> None:
        """Measure what the loss feels of each output of the matrices whose method asks for it."""
        felt = [step for step in steps.steps if METHODS[type(step.config)].sensitive(step.config)]
        names = [step.name for step in felt if step.block != groups.OUTSIDE]
        if self.batches is None or not names:
            return
        found = self.saved.load_sensitivity(names)
        if found is None:
            sample = calibrate.first_tokens(self.batches, SENSITIVITY_TOKENS)
            bar = partial(tqdm, desc="loss gradients", unit="batch", disable=not self.progress)
            found = loss_sensitivity(self.model, groups.blocks(self.model), sample, names, bar)
            self.saved.save_sensitivity(found)
        self.sensitivity = found

    def _curves(self, shared: list[Step], depth: int) -> dict[str, Curve]:
        stream = self._stream()
        curves: dict[str, Curve] = {}
        for block in self._bar(range(min(0, shared[0].block), depth), "measuring"):
            here = [step for step in shared if step.block == block]
            found = self.saved.load_curves(block, [step.name for step in here])
            last = block == depth - 1
            if found is None:
                statistics = self._statistics(stream, here, advance=not last)
                found = {step.name: self._curve(step, statistics) for step in here}
                self.saved.save_curves(block, found)
            elif stream is not None and block != groups.OUTSIDE and not last:
                stream.advance()
            curves.update(found)
        return curves

    def compress(self, steps: Plan) -> list[Row]:
        """Compress block after block, each calibrated on what the compressed ones before it give."""
        by_block = dict(steps.by_block())
        # A vision tower gives the blocks their inputs, and goes before them.
        rows = self._block(groups.OUTSIDE, by_block[groups.OUTSIDE], None) if groups.OUTSIDE in by_block else []
        stream = self._stream()
        for block in self._bar(range(steps.depth), "compressing"):
            rows += self._block(block, by_block.get(block, []), stream)
            if stream is not None and block < steps.depth - 1:
                stream.advance()
        return rows

    def _block(self, block: int, steps: list[Step], stream: Stream | None) -> list[Row]:
        """Compress one block, or take what an earlier run made of it, and put it in place."""
        known: Finished | None = self.saved.load_block(block)
        finished: Finished = [] if known is None else known
        self._put(finished)
        for part in self._stages(steps) if known is None else ():
            statistics = self._statistics(stream, part)
            made = [self._matrix(step, statistics.get(step.name)) for step in part]
            self._put(made)
            finished += made
        if known is None:
            self.saved.save_block(block, finished)
        return [row for _, _, row in finished]

    def _put(self, made: Finished) -> None:
        """Put packed weights in place."""
        for name, packed, _ in made:
            if packed is not None:
                self.undo.note(name)
                replace(self.model, name, packed)

    def _stages(self, steps: list[Step]) -> list[list[Step]]:
        """The steps of a block that are calibrated together: all, or each stage on what the one before it gives."""
        staged = any(METHODS[type(step.config)].staged(step.config) for step in steps)
        if not staged or steps[0].block == groups.OUTSIDE:
            return [steps]
        roles = [stage.roles for stage in groups.architecture_of(self.model).stages]
        found = [[step for step in steps if step.role in stage] for stage in roles]
        return [part for part in found if part]

    def _matrix(self, step: Step, statistics: Statistics | None) -> tuple[str, Packed | None, Row]:
        start = time.perf_counter()
        weight = dense_weight(self.model.get_submodule(step.name))
        curve = self.curves.get(step.name)
        given = self._recorded(step)
        packed = METHODS[type(step.config)].compress(weight, statistics, step.config, step.budget, curve, **given)
        gram = None if statistics is None else statistics.gram
        error = 0.0 if packed is None else relative_output_error(weight, packed.unpack(), gram)
        after = step.nbytes if packed is None else packed.nbytes
        stored = step.nbytes if isinstance(packed, Rounded) else after
        seconds = time.perf_counter() - start
        kind = "dense" if packed is None else str(packed)
        return step.name, packed, Row(step.name, step.block, kind, step.nbytes, after, stored, error, seconds)

    def _curve(self, step: Step, statistics: dict[str, Statistics]) -> Curve:
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
        return Stream.open(self.model, groups.blocks(self.model), self.batches)

    def _statistics(self, stream: Stream | None, steps: list[Step], advance: bool = False) -> dict[str, Statistics]:
        """Each step's input statistics, measured once for the linears that share an input."""
        if self.batches is not None and steps and steps[0].block == groups.OUTSIDE:
            modules = {s.name: self.model.get_submodule(s.name) for s in steps if s.config.needs_calibration}
            return calibrate.statistics_before(self.model, groups.blocks(self.model), self.batches, modules)
        if stream is None:
            return {}
        stages = {role: stage.roles for stage in groups.architecture_of(self.model).stages for role in stage.roles}
        first: dict[tuple[str, ...], str] = {}
        for step in steps:
            first.setdefault(stages[step.role], step.name)
        if not first and not advance:
            return {}
        measured = stream.statistics({name: self.model.get_submodule(name) for name in first.values()}, advance)
        shared = {step.name: measured[first[stages[step.role]]] for step in steps}
        return {n: replace_field(s, sensitivity=self.sensitivity.get(n)) for n, s in shared.items()}

    def _bar(self, blocks: Iterable[Any], what: str) -> Iterable[Any]:
        return tqdm(blocks, desc=what, disable=not self.progress)


def _split(configs: Recipe) -> tuple[list[ShrinkConfig], Recipe]:
    """Structural configs, which go first, and those that pack matrices."""
    structural = [config for config in configs if isinstance(config, ShrinkConfig)]
    packing = [config for config in configs if not isinstance(config, ShrinkConfig)]
    if configs[: len(structural)] != structural:
        late = next(config for before, config in pairwise(configs) if config in structural and before in packing)
        raise ValueError(
            f"{late.name} makes dense matrices smaller and comes after {packing[0].name}, which packs them; "
            f"put {late.name} first in the recipe"
        )
    for config, following in pairwise(structural):
        if isinstance(config, SliceGPT):
            raise ValueError(f"{following.name} takes no sliced blocks; put {config.name} after it in the recipe")
    return structural, packing


def _check_weights(model: nn.Module, steps: Plan) -> None:
    for step in steps.steps:
        weight = dense_weight(model.get_submodule(step.name))
        if weight.is_meta:
            raise ValueError(f"{step.name} is on the meta device; load the model's weights before compressing it")
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{step.name} holds NaN or infinite weights; load the model again from a sound file")
        if step.config.recorded is not None:
            shape = model.get_submodule(step.name).get_parameter("weight").shape
            Records(step.config.recorded).check(step.name, tuple(shape))
        if type(step.config) not in METHODS:
            continue
        try:
            METHODS[type(step.config)].check((weight.shape[0], weight.shape[1]), weight.dtype, step.config)
        except ValueError as error:
            raise ValueError(f"{step.name}: {error}") from error


def _check_vision(model: nn.Module, structural: list[ShrinkConfig], steps: Plan) -> None:
    """Raise `ValueError` for what a vision-language model or its vision tower cannot be given."""
    if structural and groups.architecture_of(model).beside:
        raise ValueError(
            f"{structural[0].name} makes whole language models narrower, and {type(model).__name__} holds one beside a "
            f"vision tower; take a method that packs single matrices, such as Prune or SWSC"
        )
    for step in steps.steps:
        method = METHODS[type(step.config)]
        if step.block == groups.OUTSIDE and method.shared(step.config) and method.sensitive(step.config):
            raise ValueError(
                f"{step.name} is outside the decoder blocks, where the loss's gradients are not measured, and "
                f"{step.config.name} spreads one budget by them; give it a recipe entry of its own with "
                f'scope="layer" or allocation="uniform"'
            )


def _batches(
    model: nn.Module, configs: Recipe, calibration: Any, tokenizer: Any, bos: bool | None
) -> list[Batch] | None:
    if calibration is None:
        needing = sorted({config.name for config in configs if config.needs_calibration})
        if needing:
            raise ValueError(
                f"{', '.join(needing)} reads the inputs of each layer and needs calibration=…: texts with a tokenizer, "
                f'ids [B, T], batches with input_ids or a dataset (or weighting="none" to go without)'
            )
        return None
    return calibrate.prepare(model, calibration, tokenizer, bos)


def _identity(model: nn.Module, batches: list[Batch] | None) -> dict[str, str]:
    data = "none" if batches is None else calibrate.fingerprint(batches)
    return identity_of(model) | {"calibration data": data}


def _bytes_of(model: nn.Module) -> tuple[int, int]:
    """Bytes of the decoder blocks, and of all tensors, those that are shared counted once."""

    def total(module: nn.Module) -> int:
        unique: dict[int, Tensor] = {t.data_ptr() or id(t): t for t in module.state_dict(keep_vars=True).values()}
        return sum(t.numel() * t.element_size() for t in unique.values())

    return sum(total(block) for block in groups.blocks(model)), total(model)


def _report(
    pruned: list[Row], packed: list[Row], before: tuple[int, int], between: tuple[int, int], configs: Recipe
) -> Report:
    """`between`: bytes once the structural methods are done, as `_bytes_of` gives them."""
    dense = {row.name: row for row in pruned}
    rows = [replace_field(row, before=dense[row.name].before) if row.name in dense else row for row in packed]
    rows += [row for row in pruned if row.name not in {row.name for row in packed}]
    saved = sum(row.before - row.after for row in packed if row.block != groups.OUTSIDE)
    stored = sum(row.before - row.stored for row in packed)
    return Report(
        tuple(rows),
        targets=Total(sum(row.before for row in rows), sum(row.after for row in rows)),
        decoder=Total(before[0], between[0] - saved),
        file=Total(before[1], between[1] - stored),
        recipe=[config.to_dict() for config in configs],
    )
