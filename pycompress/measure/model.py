"""What the measurements ask of a model: its embedding, its positions, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel


def embedding(model: PreTrainedModel) -> Tensor:
    """The token embedding `[vocabulary, d]`; ids go to its device."""
    return cast(Tensor, model.get_input_embeddings().weight)


def require_positions(model: PreTrainedModel, tokens: int, made_of: str) -> None:
    """Raise `ValueError` when `tokens` positions are more than the model has; `made_of` says where they come from."""
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{type(model).__name__} has {limit} positions, got {tokens} ({made_of}); make that at most {limit}"
        )


@contextmanager
def evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off for the block and put each module's own mode back after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
