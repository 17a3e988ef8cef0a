"""Calibration data as batches of ids that a model takes, without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from pycompress.lm import data
from pycompress.lm.data import Batch
from pycompress.lm.model import embedding, require_positions
from pycompress.lm.windows import windows_of

FEW_TOKENS = 100
TOKENS_AT_ONCE = 4096


def prepare(model: Any, calibration: Any, tokenizer: Any, bos: bool | None = None) -> list[Batch]:
    """Calibration data in any accepted form as batches that hold no padding: `{"input_ids": [B, T]}` and what else of
    theirs the model's forward takes by token (`position_ids`, `token_type_ids`) or, with images, at all.

    Texts are joined by blank lines, tokenised and cut into whole windows of 512 tokens, or of as many as the model has
    positions for, what the tokenizer puts before a text (`bos` as in `lm.windows.tokenise`) before each. Each
    conversation is a text of its own in the tokenizer's chat template. Of ids, padded tokens are left out.

    Raises `ValueError` or `TypeError` when there is nothing, for data of another kind, for ids outside the vocabulary
    and for more tokens in a row than the model has positions; warns of a handful of tokens.
    """
    entries = data.read(calibration, "calibration")
    if not data.is_ids(entries[0]):
        windows = windows_of(model, tokenizer, entries, "calibration", bos=bos)
        entries = [{data.IDS: window} for window in windows]
    found = _stacked(
        _taken(model, batch, f"entry {index} of calibration")
        for index, entry in enumerate(entries)
        for batch in data.unpadded(entry, f"entry {index} of calibration")
        if batch["input_ids"].numel()
    )
    if not found:
        raise ValueError("calibration holds no token; give at least one window of text")
    _check(model, found)
    return found


def first_tokens(batches: list[Batch], tokens: int) -> list[Batch]:
    """The first rows of the batches, one row each, that together hold at least `tokens` tokens (or all there are)."""
    rows: list[Batch] = []
    seen = 0
    for batch in batches:
        for index in range(len(batch["input_ids"])):
            if seen >= tokens:
                return rows
            rows.append({name: tensor[index : index + 1] for name, tensor in batch.items()})
            seen += rows[-1]["input_ids"].numel()
    return rows


def predicted(batch: Batch) -> Tensor:
    """Which positions of `input_ids [B, T]` but the last are followed by a token of the same document, bool
    `[B, T - 1]`.
    """
    ids, positions = batch["input_ids"], batch.get("position_ids")
    if positions is None or positions.ndim != 2:
        return torch.ones_like(ids[:, 1:], dtype=torch.bool)
    return positions.diff() == 1


def fingerprint(batches: Iterable[Batch]) -> str:
    """A hash of the calibration data, for refusing to resume with other data."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode() + str(tuple(batch[name].shape)).encode())
            digest.update(batch[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _stacked(given: Iterable[Batch]) -> list[Batch]:
    """The same rows, those of one length that follow each other in batches of about `TOKENS_AT_ONCE`, so that results
    do not depend on how the rows came. Batches with images stay as they are.
    """
    found: list[list[Batch]] = []
    shapes: dict[str, Any] = {}
    for batch in given:
        if "pixel_values" in batch:
            found.append([batch])
            shapes = {}
            continue
        for index in range(len(batch["input_ids"])):
            row = {name: tensor[index : index + 1] for name, tensor in batch.items()}
            own = {name: tensor.shape for name, tensor in row.items()}
            if own == shapes and (len(found[-1]) + 1) * row["input_ids"].shape[1] <= TOKENS_AT_ONCE:
                found[-1].append(row)
            else:
                found.append([row])
            shapes = own
    return [{name: torch.cat([row[name] for row in rows]) for name in rows[0]} for rows in found]


def _taken(model: Any, batch: Batch, what: str) -> Batch:
    """What of a batch the model's forward takes. Raises `ValueError` for what it would take and calibration cannot."""
    names = signature(model.forward).parameters
    shape = batch["input_ids"].shape
    found = {}
    for name, tensor in batch.items():
        if name not in names:
            continue
        if "pixel_values" not in batch and tensor.shape[:2] != shape:
            raise ValueError(f"{what} has {name} {list(tensor.shape)}, which is not passed on; give input_ids [B, T]")
        found[name] = tensor
    if "inputs_embeds" in found:
        raise ValueError(f"{what} has inputs_embeds, which is not passed on; give input_ids alone")
    return found


def _check(model: Any, found: list[Batch]) -> None:
    vocabulary = len(embedding(model))
    low = min(int(batch["input_ids"].min()) for batch in found)
    high = max(int(batch["input_ids"].max()) for batch in found)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration ids run from {low} to {high} but the model's vocabulary is 0 to {vocabulary - 1}; "
            f"tokenise with the model's own tokenizer"
        )
    longest = max(batch["input_ids"].shape[1] for batch in found)
    require_positions(model, longest, "the longest row of calibration")
    for batch in found:
        given = batch.get("position_ids")
        if given is not None and given.ndim == 2:
            if int(given.min()) < 0:
                raise ValueError(f"calibration has the position {int(given.min())}; position_ids are at least 0")
            require_positions(model, int(given.max()) + 1, "position_ids of calibration")
    tokens = sum(batch["input_ids"].numel() for batch in found)
    if tokens < FEW_TOKENS:
        data.warn(f"calibration holds {tokens} tokens, which say little of a model; 16 to 512 windows of 512 serve")
    padding = model.config.get_text_config(decoder=True).pad_token_id
    others = {model.config.get_text_config(decoder=True).bos_token_id}
    ends = model.config.get_text_config(decoder=True).eos_token_id
    others |= set(ends) if isinstance(ends, list) else {ends}
    if padding is not None and padding not in others and any(_looks_padded(b["input_ids"], padding) for b in found):
        data.warn(
            f"rows of calibration begin or end in the model's padding token {padding}, which counts as text; give an "
            f"attention_mask with zeros there"
        )


def _looks_padded(ids: Tensor, padding: int) -> bool:
    """Whether a row begins or ends in two padding tokens or more."""
    at = ids == padding
    return ids.shape[1] > 2 and bool((at[:, :2].all(1) | at[:, -2:].all(1)).any())
