"""Which pipeline a structural config runs in."""

from __future__ import annotations

from torch import nn

from pycompress.checkpoint import StageCheckpoint
from pycompress.lm.data import Batch
from pycompress.methods.slicegpt import SliceGPT
from pycompress.methods.structural import StructuralConfig
from pycompress.pipeline import Pipeline, Progress
from pycompress.recipe import Config
from pycompress.structural.pruning import Pruning
from pycompress.structural.slicing import Slicing


def structural_pipeline(
    model: nn.Module, config: Config, batches: list[Batch] | None, saved: StageCheckpoint, progress: Progress
) -> Pipeline:
    """What runs `config` on a model. Raises `TypeError` for a config that is not structural."""
    if isinstance(config, SliceGPT):
        return Slicing(model, config, batches, saved, progress)
    if isinstance(config, StructuralConfig):
        return Pruning(model, config, batches, saved, progress)
    raise TypeError(f"{config.name} is no structural method")
