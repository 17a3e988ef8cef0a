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
def evaluation(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout off for the block, and outputs by name on; each module's mode and the configs come back after."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)  # what is no model of transformers is refused elsewhere
    configs = [] if config is None else {id(c): c for c in (config, config.get_text_config(decoder=True))}.values()
    tuples = [config for config in configs if not config.return_dict]
    model.eval()
    try:
        for config in tuples:
            config.return_dict = True
        yield
    finally:
        for config in tuples:
            config.return_dict = False
        for module in training:
            module.training = True
