"""Training data in any accepted form as rows of token ids, drawn by a seed."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pycompress.measure.model import embedding, require_positions
from pycompress.measure.windows import token_windows


class Row(NamedTuple):
    """Token ids `[T]`, and for each the id that follows and is predicted, or -100; both int64."""

    input_ids: Tensor
    labels: Tensor


def source(model: PreTrainedModel, dataset: Any, tokenizer: Any, window: int) -> Sequence[Any]:
    """`dataset` as something with a length and items: windows of texts `[1, T]`, of a tensor `[T]`, or itself.

    Raises `ValueError` or `TypeError` for data of another kind, none at all, or texts without a tokenizer.
    """
    texts = [dataset] if isinstance(dataset, str) else dataset
    if isinstance(texts, (list, tuple)) and texts and all(isinstance(text, str) for text in texts):
        if tokenizer is None:
            raise ValueError("texts need a tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)")
        return token_windows(model, tokenizer, "\n\n".join(texts), window, count=sys.maxsize)
    if isinstance(dataset, Tensor) and (dataset.ndim != 2 or dataset.dtype != torch.int64):
        raise ValueError(f"token windows must be int64 [N, T], got {dataset.dtype} {list(dataset.shape)}")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be a text, a list of texts, token windows [N, T] or a dataset with a length and items, got "
            f"{type(dataset).__name__}; of a stream, take as many rows as are needed into a list first"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty; give at least one text, window or row")
    return dataset


def draw(model: PreTrainedModel, entries: Sequence[Any], tokens: int, multiple: int, seed: int) -> list[Row]:
    """Rows that hold at least `tokens` ids together, and are a multiple of `multiple` rows.

    Every entry is drawn once before one is drawn again, which is warned of. Raises `ValueError` for a row of fewer than
    two ids, of more than the model's positions, or with ids outside its vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Row] = []
    seen = 0
    while seen < tokens or len(rows) % multiple:
        for index in torch.randperm(len(entries), generator=generator).tolist():
            rows.append(_row(entries[index], index))
            seen += len(rows[-1].input_ids)
            if seen >= tokens and len(rows) % multiple == 0:
                break
    if len(rows) > len(entries):
        warnings.warn(f"the dataset holds {len(entries)} rows and {len(rows)} are needed; rows repeat")
    require_positions(model, max(len(row.input_ids) for row in rows), "the longest row")
    vocabulary = len(embedding(model))
    low = min(int(row.input_ids.min()) for row in rows)
    high = max(int(row.input_ids.max()) for row in rows)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"ids of the dataset run from {low} to {high} but the model's vocabulary is 0 to {vocabulary - 1}; "
            f"tokenise with the model's own tokenizer"
        )
    return rows


def collate(rows: Sequence[Row]) -> dict[str, Tensor]:
    """A batch `[B, T]` of rows; shorter ones are padded on the right, and only then there is an attention mask."""
    batch = {
        "input_ids": pad_sequence([row.input_ids for row in rows], batch_first=True),
        "labels": pad_sequence([row.labels for row in rows], batch_first=True, padding_value=-100),
    }
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    if int(lengths.min()) < int(lengths.max()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def _row(entry: Any, index: int) -> Row:
    """A window of ids `[T]` or `[1, T]`, or an item with `input_ids`; what its `attention_mask` masks is dropped."""
    item = {"input_ids": entry} if isinstance(entry, Tensor) else entry
    try:
        ids = torch.as_tensor(item["input_ids"]).flatten()
    except (KeyError, TypeError, IndexError, ValueError):
        raise TypeError(
            f"item {index} of the dataset has no ids in ['input_ids'], got {type(entry).__name__}"
        ) from None
    labels = torch.as_tensor(item["labels"]).flatten() if "labels" in item else ids
    if "attention_mask" in item:
        attended = torch.as_tensor(item["attention_mask"]).flatten().bool()
        ids, labels = ids[attended], labels[attended]
    if len(ids) < 2 or len(labels) != len(ids):
        raise ValueError(
            f"row {index} of the dataset has {len(ids)} ids and {len(labels)} labels; give 2 or more of both"
        )
    return Row(ids.long(), torch.cat([labels[1:], labels.new_full((1,), -100)]).long())
