"""From the last hidden states to logits, as the model's own forward makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pycompress.lm.model import embedding

LOGITS_AT_ONCE = 1 << 25  # 128 MiB in fp32: 128 tokens of a 262k vocabulary


def head_logits(model: PreTrainedModel, hidden: Tensor, head: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Logits `[..., vocabulary]` of last hidden states `[..., d]`, as the model's own forward makes them.

    `head`: what to apply in place of the model's output embedding.
    """
    logits = (head or model.get_output_embeddings())(hidden)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def last_hidden(model: PreTrainedModel, **inputs: Any) -> Tensor:
    """Hidden states `[B, T, d]` that the head reads, whatever the model's config says of outputs."""
    hidden: Tensor = model.base_model(**inputs, use_cache=False, return_dict=True).last_hidden_state
    return hidden


@torch.no_grad()
def require_known_head(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raise `ValueError` for a model that scales or shifts its logits in a way `head_logits` does not know.

    `tokens [T]`: a few ids to try it on.
    """
    tokens = tokens[None].to(embedding(model).device)
    expected = model(input_ids=tokens, use_cache=False, return_dict=True).logits[0].float()
    got = head_logits(model, last_hidden(model, input_ids=tokens)[0]).float()
    difference, scale = (got - expected).abs().max(), expected.abs().max()
    # NaN is not greater, so a model that gives it passes here and shows it in its perplexity.
    if difference > 1e-2 * scale:
        raise ValueError(
            f"{type(model).__name__} changes its logits after the output embedding in a way head_logits does not know; "
            "add it to head_logits in pycompress/lm/head.py"
        )
