"""A text as windows of token ids, the way perplexity scores them and calibration reads them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pycompress.measure.model import embedding, require_positions


def tokenise(model: PreTrainedModel, tokenizer: Any, text: str) -> tuple[Tensor, int | None]:
    """The text's ids `[T]` without special tokens, and the id of the BOS the model expects, if any.

    Raises `ValueError` for fewer than two tokens and for ids that the model's vocabulary lacks.
    """
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.long)
    if len(ids) < 2:
        raise ValueError(f"the text must have at least 2 tokens, got {len(ids)}")
    vocabulary = len(embedding(model))
    if int(ids.max()) >= vocabulary:
        raise ValueError(
            f"the tokenizer gives id {int(ids.max())} but the model's vocabulary has {vocabulary}; "
            "load the tokenizer that belongs to the model"
        )
    bos = tokenizer.bos_token_id
    if bos is None:
        bos = getattr(model.config, "bos_token_id", None)
    return ids, bos if bos is not None and bos < vocabulary else None


def require_window(model: PreTrainedModel, window: int, bos: int | None) -> None:
    """Raise `ValueError` for a window (with the BOS before it) that is no context or exceeds the model's positions."""
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    require_positions(model, window + (bos is not None), "the window" if bos is None else "the window and BOS")


def token_windows(
    model: PreTrainedModel, tokenizer: Any, text: str, window: int = 512, count: int = 64
) -> list[Tensor]:
    """At most `count` whole windows of a text as ids `[1, window]`, or `[1, window + 1]` with the model's BOS first.

    The windows do not overlap and are spread evenly over the text; with enough `count` they are consecutive. A text
    shorter than one window gives itself. Raises `ValueError` as `tokenise` does, and for a window out of range.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 window, got {count}")
    ids, bos = tokenise(model, tokenizer, text)
    require_window(model, window, bos)
    whole = max(1, len(ids) // window)
    count = min(count, whole)
    starts = [i * whole // count * window for i in range(count)]
    prefix = torch.tensor([] if bos is None else [bos], dtype=torch.long)
    return [torch.cat([prefix, ids[start : start + window]])[None] for start in starts]
