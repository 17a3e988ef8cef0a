"""Training data in any accepted form as rows of token ids, drawn by a seed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from pycompress.lm import data
from pycompress.lm.model import embedding, require_positions
from pycompress.lm.windows import windows_of


class Sample(NamedTuple):
    """Token ids `[T]`, and for each the id that follows and is predicted, or -100; both int64."""

    input_ids: Tensor
    labels: Tensor


def source(
    model: PreTrainedModel, dataset: Any, tokenizer: Any, window: int | None, bos: bool | None = None
) -> Sequence[Any]:
    """`dataset` as something with a length and items: windows of texts `[1, T]`, rows with `input_ids`, or itself.

    Data is read as `lm.data.read` reads it, but a dataset that gives rows with `input_ids` by their index stays as it
    is, and its rows are read when they are drawn. Raises `ValueError` or `TypeError` for data of another kind, none at
    all, or texts without a tokenizer.
    """
    if isinstance(dataset, Tensor) and (dataset.ndim != 2 or dataset.dtype != torch.int64):
        raise ValueError(f"token windows must be int64 [N, T], got {dataset.dtype} {list(dataset.shape)}")
    if not isinstance(dataset, Sized):
        raise TypeError(
            f"dataset must be texts, token windows [N, T], a batch or a dataset with a length and items, got "
            f"{type(dataset).__name__}; of a stream, take as many rows as are needed into a list first"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty; give at least one text, window or row")
    if isinstance(dataset, Tensor) or _is_map_style(dataset):
        return dataset  # type: ignore[return-value]
    first = dataset[0] if isinstance(dataset, list | tuple) else None
    if isinstance(first, Tensor | tuple) or (isinstance(first, Mapping) and "input_ids" in first):
        items: Sequence[Any] = dataset  # type: ignore[assignment]
        return [row for index, item in enumerate(items) for row in _rows(item, index)]
    entries = data.read(dataset, "the dataset")
    if data.is_ids(entries[0]):
        return [row for index, item in enumerate(entries) for row in _rows(item, index)]
    return windows_of(model, tokenizer, entries, "the dataset", window, bos)


def _rows(item: Any, index: int) -> list[Any]:
    """The rows of an item that is a batch of several; a row as it is."""
    ids = item["input_ids"] if isinstance(item, Mapping) and "input_ids" in item else item
    several = (
        len(ids) > 1 and (getattr(ids, "ndim", 1) == 2 or isinstance(ids[0], list)) if data.is_array(ids) else False
    )
    if not several:
        return [item]
    return data.rows_with_labels(item if isinstance(item, Mapping) else {"input_ids": item}, f"item {index}")


def _is_map_style(dataset: Any) -> bool:
    """Whether the dataset gives rows of ids by their index, and is no plain list of them."""
    if isinstance(dataset, list | tuple | str | Mapping) or hasattr(dataset, "columns"):
        return False
    first = dataset[0] if hasattr(dataset, "__getitem__") else None
    return isinstance(first, Tensor) or (isinstance(first, Mapping) and "input_ids" in first)


def draw(model: PreTrainedModel, entries: Sequence[Any], tokens: int, multiple: int, seed: int) -> list[Sample]:
    """Rows that hold at least `tokens` ids together, and are a multiple of `multiple` rows.

    Every entry is drawn once before one is drawn again, which is warned of. Raises `ValueError` for a row of fewer than
    two ids, of more than the model's positions, or with ids outside its vocabulary.
    """
    generator = torch.Generator().manual_seed(seed)
    rows: list[Sample] = []
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


def collate(rows: Sequence[Sample]) -> dict[str, Tensor]:
    """A batch `[B, T]` of rows; shorter ones are padded on the right, and only then there is an attention mask."""
    batch = {
        "input_ids": pad_sequence([row.input_ids for row in rows], batch_first=True),
        "labels": pad_sequence([row.labels for row in rows], batch_first=True, padding_value=-100),
    }
    lengths = torch.tensor([len(row.input_ids) for row in rows])
    if int(lengths.min()) < int(lengths.max()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch


def _row(entry: Any, index: int) -> Sample:
    """A window of ids `[T]` or `[1, T]`, or an item with `input_ids`; what its `attention_mask` masks is dropped."""
    item = {"input_ids": entry} if isinstance(entry, Tensor) else entry
    try:
        ids = torch.as_tensor(item["input_ids"])
    except (KeyError, TypeError, IndexError, ValueError):
        raise TypeError(
            f"item {index} of the dataset has no ids in ['input_ids'], got {type(entry).__name__}"
        ) from None
    if ids.ndim > 2 or (ids.ndim == 2 and len(ids) != 1):
        raise ValueError(
            f"item {index} of the dataset is {list(ids.shape)}, and a row is [T]; give its rows one by one"
        )
    ids = ids.flatten()
    positions = item.get("position_ids") if hasattr(item, "get") else None
    if positions is not None and bool((torch.as_tensor(positions).flatten().diff() != 1).any()):
        raise ValueError(
            f"item {index} of the dataset has position_ids, which are not passed on; give a row a document"
        )
    labels = torch.as_tensor(item["labels"]).flatten() if item.get("labels") is not None else ids
    if item.get("attention_mask") is not None:
        attended = torch.as_tensor(item["attention_mask"]).flatten().bool()
        ids, labels = ids[attended], labels[attended]
    if len(ids) < 2 or len(labels) != len(ids):
        raise ValueError(
            f"row {index} of the dataset has {len(ids)} ids and {len(labels)} labels; give 2 or more of both"
        )
    return Sample(ids.long(), torch.cat([labels[1:], labels.new_full((1,), -100)]).long())
