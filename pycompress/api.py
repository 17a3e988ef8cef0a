"""`apply`: compress a model by a recipe. Reads as the table of contents of the whole package."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from pycompress import recipe as recipes
from pycompress.architectures import model as architectures
from pycompress.calibration import batches as calibration_batches
from pycompress.checkpoint import Checkpoint
from pycompress.lm.data import Batch
from pycompress.lm.identity import identity_of
from pycompress.lm.model import evaluation
from pycompress.lm.state import neutral
from pycompress.packing.packing import Packing
from pycompress.packing.plan import Plan, check_weights, plan
from pycompress.pipeline import Clock, Outcome, Pipeline, Progress
from pycompress.recipe import Config, Recipe
from pycompress.report import DROPPED, Report, Row, Total
from pycompress.structural.pipeline import structural_pipeline
from pycompress.surgery.shrink import check_free


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

    An error or interruption leaves the model as it was, and any call leaves modes, hooks, random generators and torch's
    settings so; autocast and the default dtype do not reach it.

    Parameters
    ----------
    model
        A causal language model of transformers, or one beside a vision tower.
    recipe
        A config such as `SWSC(keep=0.5)`, a list of them, a method's name, or a YAML path.
    calibration
        Texts or conversations (with a `tokenizer`), ids `[B, T]`, batches (a dict, BatchEncoding or DataLoader), a
        dataset or DataFrame with a column text, messages or input_ids. Padding does not count: what `attention_mask`
        masks is left out. None for methods that need none.
    tokenizer
        The model's own; for texts and conversations.
    checkpoint
        A directory in which progress is kept; the same call after an interruption goes on from there to the same bits,
        and one with another `keep` reuses what was measured.
    progress
        Whether bars are shown.
    bos
        Whether a BOS goes before each window of text; None for what the tokenizer does.

    Returns
    -------
    Report
        A row a module, and totals.

    Raises
    ------
    ValueError, TypeError
        For a recipe, model or calibration that cannot be used, before anything is changed; `ValueError` for activations
        that are not finite, naming where they come from.

    Examples
    --------
    >>> import pycompress
    >>> model = tiny_model("LlamaForCausalLM")
    >>> report = pycompress.apply(model, pycompress.RTN(bits=4, group_size=32), progress=False)
    >>> len(report.rows)
    14
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
    # Every structural method takes all the linears of the blocks.
    check_weights(model, plan(model, structural[:1]))
    steps = plan(model, packing)
    check_weights(model, steps)
    _check_vision(model, structural, steps)
    if structural:
        check_free(model)
    batches = _batches(model, configs, calibration, tokenizer, bos)
    identity = {} if checkpoint is None else _identity(model, batches)
    shown = Progress(progress)
    started: list[Pipeline] = []
    with Checkpoint(checkpoint, identity, configs) as saved:
        try:
            before = _bytes_of(model)
            shrunk: list[Outcome] = []
            clock = Clock()
            for count, config in enumerate(structural, start=1):
                started.append(structural_pipeline(model, config, batches, saved.stage(structural[:count]), shown))
                with clock(config.name):
                    shrunk.append(started[-1].run())
            between = _bytes_of(model)
            started.append(Packing(model, packing, batches, saved, shown))
            packed = started[-1].run()
            return _report(shrunk, packed, before, between, configs, clock.seconds)
        except BaseException:
            for pipeline in reversed(started):
                pipeline.undo()
            raise


def _split(configs: Recipe) -> tuple[Recipe, Recipe]:
    """Structural configs, which go first, and those that pack matrices."""
    structural = [config for config in configs if config.structural]
    packing = [config for config in configs if not config.structural]
    if configs[: len(structural)] != structural:
        late = next(config for before, config in pairwise(configs) if config.structural and not before.structural)
        raise ValueError(
            f"{late.name} makes dense matrices smaller and comes after {packing[0].name}, which packs them; "
            f"put {late.name} first in the recipe"
        )
    for config, following in pairwise(structural):
        if config.final:
            raise ValueError(f"{following.name} takes no sliced blocks; put {config.name} after it in the recipe")
    return structural, packing


def _check_vision(model: nn.Module, structural: Recipe, steps: Plan) -> None:
    """Raise `ValueError` for what a vision-language model or its vision tower cannot be given."""
    if structural and architectures.architecture_of(model).beside:
        raise ValueError(
            f"{structural[0].name} makes whole language models narrower, and {type(model).__name__} holds one beside a "
            f"vision tower; take a method that packs single matrices, such as Prune or SWSC"
        )
    for step in steps.steps:
        if step.block == architectures.OUTSIDE and step.config.shared and step.config.sensitive:
            raise ValueError(
                f"{step.name} is outside the decoder blocks, where the loss's gradients are not measured, and "
                f"{step.config.name} allocates one budget by them; give it a recipe entry of its own with "
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
    return calibration_batches.prepare(model, calibration, tokenizer, bos)


def _identity(model: nn.Module, batches: list[Batch] | None) -> dict[str, str]:
    data = "none" if batches is None else calibration_batches.fingerprint(batches)
    return identity_of(model) | {"calibration data": data}


def _bytes_of(model: nn.Module) -> tuple[int, int]:
    """Bytes of the decoder blocks, and of all tensors, those that are shared counted once."""

    def total(module: nn.Module) -> int:
        unique: dict[int, Tensor] = {t.data_ptr() or id(t): t for t in module.state_dict(keep_vars=True).values()}
        return sum(t.numel() * t.element_size() for t in unique.values())

    return sum(total(block) for block in architectures.blocks(model)), total(model)


def _report(
    shrunk: list[Outcome],
    packed: Outcome,
    before: tuple[int, int],
    between: tuple[int, int],
    configs: Recipe,
    seconds: Mapping[str, float],
) -> Report:
    """`before`, `between`: bytes of the dense model and after the structural methods, as `_bytes_of` gives them.

    `seconds`: of each structural method.
    """
    rows, dropped = _of_dense_model(shrunk)
    packed_rows = [replace(row, before=rows[row.name].before) if row.name in rows else row for row in packed.rows]
    names = {row.name for row in packed_rows}
    left = [row for row in (*rows.values(), *dropped) if row.name not in names]
    saved = sum(row.before - row.after for row in packed.rows if row.block != architectures.OUTSIDE)
    stored = sum(row.before - row.stored for row in packed.rows)
    whole = (*packed_rows, *left)
    return Report(
        whole,
        targets=Total(sum(row.before for row in whole), sum(row.after for row in whole)),
        decoder=Total(before[0], between[0] - saved),
        file=Total(before[1], between[1] - stored),
        recipe=[config.to_dict() for config in configs],
        seconds={**seconds, **packed.seconds},
        searches=tuple(outcome.search for outcome in shrunk if outcome.search is not None),
    )


def _of_dense_model(shrunk: list[Outcome]) -> tuple[dict[str, Row], list[Row]]:
    """Of what the structural methods made, one after the other: the rows by name, their bytes before those of the dense
    model, and the rows of what was dropped on the way.
    """
    rows: dict[str, Row] = {}
    dropped: list[Row] = []
    for outcome in shrunk:
        found = [
            replace(row, before=rows.get(outcome.origins.get(row.name, row.name), row).before) for row in outcome.rows
        ]
        dropped += [row for row in found if row.format == DROPPED]
        rows = {row.name: row for row in found if row.format != DROPPED}
    return rows, dropped
