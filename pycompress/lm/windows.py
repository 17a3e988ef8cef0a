"""A text as windows of token ids, the way perplexity scores them and calibration reads them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pycompress.lm.data import texts_of
from pycompress.lm.model import embedding, positions, require_positions


def tokenise(model: PreTrainedModel, tokenizer: Any, text: str, bos: bool | None = None) -> tuple[Tensor, Tensor]:
    """The text's ids `[T]` without special tokens, and the ids `[P]` that go before each window of them.

    `bos`: None for what the tokenizer itself puts before a text (of most a BOS, of Qwen's nothing), True for the BOS of
    the tokenizer or the model, False for nothing. Raises `ValueError` for fewer than two tokens, for ids that the
    model's vocabulary lacks, and for `bos=True` where there is none.
    """
    ids = torch.tensor(_encoded(tokenizer, text, special=False), dtype=torch.long)
    if len(ids) < 2:
        raise ValueError(f"the text must have at least 2 tokens, got {len(ids)}")
    prefix = torch.tensor(_prefix(model, tokenizer, bos), dtype=torch.long)
    vocabulary, highest = len(embedding(model)), int(torch.cat([prefix, ids]).max())
    if highest >= vocabulary:
        raise ValueError(
            f"the tokenizer gives id {highest} but the model's vocabulary has {vocabulary}; "
            "load the tokenizer that belongs to the model"
        )
    return ids, prefix


def require_window(model: PreTrainedModel, window: int, prefix: Tensor) -> None:
    """Raise `ValueError` for a window (after `prefix [P]`) that is no context or exceeds the model's positions."""
    if window < 2:
        raise ValueError(f"window must be at least 2 tokens, got {window}")
    require_positions(model, window + len(prefix), "the window and BOS" if len(prefix) else "the window")


def token_windows(
    model: PreTrainedModel,
    tokenizer: Any,
    text: str,
    window: int | None = None,
    count: int = 64,
    bos: bool | None = None,
) -> list[Tensor]:
    """At most `count` whole windows of a text as ids.

    The windows do not overlap and are evenly distributed over the text; with enough `count` they are consecutive. A
    text shorter than one window gives itself.

    Parameters
    ----------
    model, tokenizer
        A causal language model of transformers and its tokenizer.
    text
        The text.
    window
        Ids a window; None for 512, or for what fits the model's positions where those are fewer.
    count
        Windows at most.
    bos
        None for what the tokenizer itself puts before a text, True for a BOS in any case, False for nothing.

    Returns
    -------
    list of Tensor
        `[1, P + window]` int64 each, the `P` ids of a BOS first.

    Raises
    ------
    ValueError
        For fewer than two tokens, ids that the model's vocabulary lacks, and a window out of range.

    Examples
    --------
    >>> from pycompress.measure import token_windows
    >>> windows = token_windows(tiny_model("LlamaForCausalLM", vocab_size=300), byte_tokenizer, "a b c d" * 9, window=8)
    >>> tuple(windows[0].shape)
    (1, 8)
    """
    if count < 1:
        raise ValueError(f"count must be at least 1 window, got {count}")
    ids, prefix = tokenise(model, tokenizer, text, bos)
    window = default_window(model, prefix) if window is None else window
    require_window(model, window, prefix)
    whole = max(1, len(ids) // window)
    count = min(count, whole)
    starts = [i * whole // count * window for i in range(count)]
    return [torch.cat([prefix, ids[start : start + window]])[None] for start in starts]


def windows_of(
    model: PreTrainedModel,
    tokenizer: Any,
    entries: list[Any],
    what: str,
    window: int | None = None,
    bos: bool | None = None,
) -> list[Tensor]:
    """All windows of the texts or conversations that `lm.data.read` gave of `what`, as `token_windows` gives them.

    Texts are joined by blank lines; a conversation is a text of its own, whose template has its BOS.
    """
    if tokenizer is None:
        raise ValueError(f"{what}: texts need a tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)")
    texts = texts_of(entries, tokenizer, what)
    if isinstance(entries[0], str):
        texts = ["\n\n".join(texts)]
    else:
        bos = False
    return [w for text in texts for w in token_windows(model, tokenizer, text, window, count=sys.maxsize, bos=bos)]


def default_window(model: PreTrainedModel, prefix: Tensor) -> int:
    """512 tokens, or as many as the model has positions for."""
    limit = positions(model)
    return 512 if limit is None else min(512, limit - len(prefix))


def _prefix(model: PreTrainedModel, tokenizer: Any, bos: bool | None) -> list[int]:
    if bos is None:
        given, bare = _encoded(tokenizer, "a", special=True), _encoded(tokenizer, "a", special=False)
        starts = [i for i in range(len(given) - len(bare) + 1) if given[i : i + len(bare)] == bare]
        return given[: starts[0]] if starts else []
    if not bos:
        return []
    own = tokenizer.bos_token_id
    own = getattr(model.config, "bos_token_id", None) if own is None else own
    if own is None:
        raise ValueError("bos=True, but neither the tokenizer nor the model has a BOS; leave bos out")
    return [own]


def _encoded(tokenizer: Any, text: str, special: bool) -> list[int]:
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
