"""Perplexity of a causal language model on a text, without ever holding a window's logits at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pycompress.lm.data import joined
from pycompress.lm.head import LOGITS_AT_ONCE, head_logits, last_hidden, require_known_head
from pycompress.lm.model import embedding, evaluation
from pycompress.lm.state import neutral
from pycompress.lm.windows import default_window, require_window, tokenise


def perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: Any,
    window: int | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    bos: bool | None = None,
) -> float:
    """exp of the mean cross-entropy, in nats a token, over all predicted tokens of `text`.

    Cross-entropy is in fp32 and autocast does not reach it; logits exist for a slice of tokens at a time.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers and its tokenizer.
    text
        A text, or several in any form that `apply` takes texts in, joined; tokenised without special tokens.
    window
        Ids of the consecutive windows it is cut into, the last may be shorter; None for 512, or what fits the model's
        positions. What the tokenizer itself puts before a text (of most a BOS, of Qwen's nothing) goes before each.
    stride
        Moves the window by fewer ids than it has, and scores only those that the previous windows have not scored.
    max_windows
        Stops early.
    bos
        True for a BOS in any case, False for none.

    Returns
    -------
    float
        Infinity when the mean exceeds what exp can hold, and NaN when the model gives NaN.

    Raises
    ------
    ValueError
        For a window or stride out of range, a text of fewer than two tokens, a tokenizer whose ids the model lacks, and
        a model that does more to its logits than this function knows.

    Examples
    --------
    >>> from pycompress.measure import perplexity
    >>> perplexity(tiny_model("LlamaForCausalLM", vocab_size=300), byte_tokenizer, "to be or not to be", window=8) > 1
    True
    """
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"max_windows must be at least 1, got {max_windows}")
    ids, prefix = tokenise(model, tokenizer, joined(text, "the text", tokenizer), bos)
    window = default_window(model, prefix) if window is None else window
    stride = _checked_stride(model, window, stride, prefix)
    total, count = 0.0, 0
    with neutral(), evaluation(model), torch.inference_mode():
        require_known_head(model, ids[:8])
        for index, (context, new) in enumerate(_windows(ids, window, stride)):
            if max_windows is not None and index >= max_windows:
                break
            tokens = torch.cat([prefix, context])
            scored = min(new, len(tokens) - 1)
            total += _cross_entropy(model, tokens, scored)
            count += scored
    mean = total / count
    return math.inf if mean > 700 else math.exp(mean)


def _checked_stride(model: PreTrainedModel, window: int, stride: int | None, prefix: Tensor) -> int:
    require_window(model, window, prefix)
    stride = window if stride is None else stride
    if not 1 <= stride <= window:
        raise ValueError(f"stride must be from 1 to the window ({window}), got {stride}")
    return stride


def _windows(ids: Tensor, window: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Each window's ids and how many of its last ids no earlier window had."""
    end, scored = min(window, len(ids)), 0
    while True:
        context = ids[max(0, end - window) : end] if stride < window else ids[scored:end]
        if len(context) > 1:
            yield context, end - scored
        if end == len(ids):
            return
        scored, end = end, min(end + stride, len(ids))


def _cross_entropy(model: PreTrainedModel, tokens: Tensor, scored: int) -> float:
    """Summed cross-entropy of the last `scored` of `tokens [T]`."""
    tokens = tokens.to(embedding(model).device)
    hidden = last_hidden(model, input_ids=tokens[None])[0, -scored - 1 : -1]
    targets = tokens[-scored:].to(hidden.device)
    at_once = max(1, LOGITS_AT_ONCE // len(embedding(model)))
    total = 0.0
    for part, target in zip(hidden.split(at_once), targets.split(at_once), strict=True):
        logits = head_logits(model, part).float()
        total += float(cross_entropy(logits, target.to(logits.device), reduction="sum"))
    return total
