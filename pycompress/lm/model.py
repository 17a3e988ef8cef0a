"""What the measurements ask of a model: its embedding, its positions, evaluation mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from pycompress.lm.state import kept


def embedding(model: PreTrainedModel) -> Tensor:
    """The token embedding `[vocabulary, d]`; ids go to its device."""
    return cast(Tensor, model.get_input_embeddings().weight)


def positions(model: PreTrainedModel) -> int | None:
    """How many tokens a text may have at most, by the model's config; None where it does not say."""
    config = model.config.get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


def require_positions(model: PreTrainedModel, tokens: int, made_of: str) -> None:
    """Raise `ValueError` when `tokens` positions are more than the model has; `made_of` says where they come from."""
    limit = positions(model)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"{type(model).__name__} has {limit} positions, got {tokens} ({made_of}); make that at most {limit}"
        )


@contextmanager
def evaluation(*models: nn.Module) -> Iterator[None]:
    """Dropout off and outputs by name for the block; models and process are as they were after it (`lm.state.kept`)."""
    with kept(*models):
        for model in models:
            model.eval()
            config: Any = getattr(model, "config", None)  # what is no model of transformers is refused elsewhere
            for each in () if config is None else (config, config.get_text_config(decoder=True)):
                each.return_dict = True
        yield
