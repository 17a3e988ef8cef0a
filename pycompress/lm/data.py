"""Data in any form a user has it in, told apart and read: texts, conversations, token ids; without padding.

Models are not known here. `what` names the data in messages: "calibration", "the dataset", "the text".
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pycompress._brief import brief, listed

Batch = dict[str, Tensor]

# Of data without a length no more is drawn than this: 512 windows of 512 tokens, of four letters each.
STREAM_TOKENS = 1 << 18
STREAM_LETTERS = 1 << 20
STREAM_ENTRIES = 1 << 16
# What a column, or the field of a row, may be called.
IDS, CONVERSATIONS, TEXTS = "input_ids", ("messages", "conversations"), ("text", "content")
FORMS = (
    "texts, conversations, token ids [B, T], batches with input_ids (a dict, BatchEncoding or DataLoader), or a "
    "dataset or DataFrame with a column text, messages or input_ids"
)
# Tensors of a batch that say where a packed document begins, which only some kernels read.
PACKING = ("cu_seq_lens", "seq_idx", "max_length_")
# A path, or a name with a sign or a number in it: of a file, a dataset, a model, a tensor.
NAME = re.compile(r"(?=.*[\d_.\-/\\:~+@])[\w.\-/\\:~+@]{2,}", re.ASCII)
KEYS = ("text", "content", "messages", "conversations", "labels", "train", "validation", "test", "wikitext", "pile")


def read(data: Any, what: str) -> list[Any]:
    """`data` as a list of entries of one kind: str, conversations (lists of messages) or mappings with `input_ids`.

    Data without a length is drawn up to `STREAM_TOKENS` tokens, with a warning where there is more. Raises `TypeError`
    or `ValueError` for anything else, for a path or a name in place of a text, and where there is nothing.
    """
    found: list[Any] = []
    stream = _iterated(data, what)
    endless = not hasattr(data, "__len__") and not isinstance(data, str)
    tokens = letters = 0
    for index, item in enumerate(stream):
        entry = _entry(item, f"entry {index} of {what}" if item is not data else what)
        if found and _kind(entry) != _kind(found[0]):
            raise TypeError(f"{what} mixes {_kind(found[0])} and {_kind(entry)} (entry {index}); give one of them")
        found.append(entry)
        if not endless:
            continue
        letters += len(entry) if isinstance(entry, str) else 0
        tokens += _size(entry[IDS]) if isinstance(entry, Mapping) else 0
        if letters >= STREAM_LETTERS or tokens >= STREAM_TOKENS or len(found) >= STREAM_ENTRIES:
            if next(stream, None) is not None:
                used = f"its first {len(found)} entries are used; give a list to use others"
                warn(f"{what} has no length: {used}")
            break
    if not found:
        raise ValueError(f"{what} is empty; give {FORMS}")
    if all(isinstance(entry, str) for entry in found):
        _check_texts(found, what)
    return found


def joined(data: Any, what: str, tokenizer: Any) -> str:
    """Texts or conversations, in any form, as one text, a blank line between them.

    Raises `TypeError` or `ValueError` as `read` does, and for token ids.
    """
    entries = read(data, what)
    if isinstance(entries[0], Mapping):
        raise TypeError(f"{what} must be a text or texts, got token ids")
    return "\n\n".join(texts_of(entries, tokenizer, what))


def texts_of(entries: list[Any], tokenizer: Any, what: str) -> list[str]:
    """Entries that are texts, or conversations in the tokenizer's chat template, as texts."""
    if isinstance(entries[0], str):
        return entries
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{what} holds conversations, but the tokenizer has no chat template; give texts")
    return [tokenizer.apply_chat_template(entry, tokenize=False) for entry in entries]


def is_ids(entry: Any) -> bool:
    """Whether an entry that `read` gave holds token ids."""
    return isinstance(entry, Mapping)


def unpadded(entry: Mapping[str, Any], what: str) -> list[Batch]:
    """The rows of a batch without their padding: as they are where there is none, else one by one.

    `input_ids [B, T]` or `[T]`, and `attention_mask` of the same shape, ones where a row's text is. Other tensors go
    along: those `[B, T]` token by token, those with B entries row by row. `labels` are left out. Positions that count
    from 0 are left out too. Raises `ValueError` or `TypeError` for tensors that do not fit, for masks of other kinds or
    with gaps, and for what says where packed documents begin in a way that only some kernels read.
    """
    ids = _ids(entry[IDS], what)
    if isinstance(ids, list):
        return [batch for row in _rows(entry, len(ids), what) for batch in unpadded(row, what)]
    packing = [name for name in entry if str(name).startswith(PACKING)]
    if packing:
        raise ValueError(f"{what} has {packing[0]}, which is not passed on; give position_ids, or a row a document")
    tensors = {IDS: ids} | {
        name: _other(name, value, ids, what)
        for name, value in entry.items()
        if name not in (IDS, "attention_mask", "labels") and value is not None and is_array(value)
    }
    mask = _mask(entry.get("attention_mask"), ids, what)
    if mask is None:
        return [_without_plain_positions(tensors)]
    return [_without_plain_positions(_row(tensors, index, span, what)) for index, span in _spans(mask, what)]


def rows_with_labels(entry: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """The rows of a batch as mappings of `input_ids` and, where it has them, `labels` and `attention_mask`."""
    ids = _ids(entry[IDS], what)
    named = {name: entry[name] for name in ("labels", "attention_mask", "position_ids") if entry.get(name) is not None}
    if isinstance(ids, list):
        return list(_rows({IDS: ids} | named, len(ids), what))
    for name, value in named.items():
        named[name] = found = _tensor(value, f"{name} of {what}")
        if found.numel() != ids.numel():
            raise ValueError(f"{name} of {what} must be {list(ids.shape)}, got {list(found.shape)}")
        named[name] = found.reshape(ids.shape)
    return list(_rows({IDS: ids} | named, len(ids), what))


def warn(message: str) -> None:
    """Warn where the caller of this package is."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "pycompress":
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _iterated(data: Any, what: str) -> Iterator[Any]:
    """The entries of `data` in the form they have there."""
    if isinstance(data, PurePath):
        raise TypeError(f"{what} is the path {data}; give what is in it: Path({str(data)!r}).read_text()")
    if isinstance(data, bytes):
        raise TypeError(f"{what} is bytes; decode them: data.decode()")
    if isinstance(data, str | Tensor):
        return iter([data])
    if isinstance(data, np.ndarray):
        return iter(data.tolist() if data.dtype.kind in "OU" else [data])
    if isinstance(data, Mapping):
        return _of_mapping(data, what)
    columns = getattr(data, "columns", None)
    if columns is not None and hasattr(data, "__getitem__"):  # a DataFrame
        column = _column(list(columns), what)
        names = [IDS, *(name for name in ("attention_mask", "position_ids") if name in columns)]
        if column == IDS:
            return iter([dict(zip(names, row, strict=True)) for row in zip(*(data[n] for n in names), strict=True)])
        return iter(list(data[column]))
    if getattr(data, "column_names", None):  # a dataset
        _column(list(data.column_names), what)
    if _is_conversation(data) or _is_row(data):
        return iter([data])
    if hasattr(data, "tolist") and hasattr(data, "dtype"):  # a column of a DataFrame
        return iter(data.tolist())
    try:
        return iter(data)
    except TypeError:
        raise TypeError(f"{what} is {_a(data)}; give {FORMS}") from None


def _of_mapping(data: Mapping[str, Any], what: str) -> Iterator[Any]:
    if IDS in data:
        return iter([data])
    column = _column(list(data), what)
    values = data[column]
    return iter([values] if isinstance(values, str) or _is_conversation(values) else list(values))


def _column(names: list[Any], what: str) -> str:
    for name in (IDS, *CONVERSATIONS, *TEXTS):
        if name in names:
            return name
    raise TypeError(
        f"{what} has {listed(names) or 'nothing'} and no input_ids, messages or text; of a set of splits give one "
        f"(data['train']), of another column its values (data['{names[0] if names else 'column'}'])"
    )


def _entry(item: Any, what: str) -> Any:
    """One entry: a str, a conversation, or a mapping with `input_ids`."""
    if isinstance(item, str):
        return item
    if isinstance(item, Mapping):
        if IDS in item:
            return item
        value = item[_column(list(item), what)]
        if not isinstance(value, str) and not _is_conversation(value):
            raise TypeError(f"{what} has {_a(value)} where a text or a conversation belongs")
        return value
    if _is_conversation(item):
        return list(item)
    if isinstance(item, Tensor | np.ndarray) or _is_row(item):
        return {IDS: item}
    if (
        isinstance(item, tuple | list) and len(item) == 1 and isinstance(item[0], Tensor | np.ndarray)
    ):  # a TensorDataset
        return {IDS: item[0]}
    raise TypeError(f"{what} is {_a(item)}; an entry is a text, a conversation, ids [B, T] or a dict with input_ids")


def _kind(entry: Any) -> str:
    return "texts" if isinstance(entry, str) else "token ids" if isinstance(entry, Mapping) else "conversations"


def _check_texts(texts: list[str], what: str) -> None:
    """Refuse what is a path, a key or a dataset's name and no text."""
    if not any(text.strip() for text in texts):
        raise ValueError(f"{what} holds no text but blanks; give at least a window of text")
    named = all(NAME.fullmatch(text) or text in KEYS for text in texts)
    if named or (len(texts) == 1 and _exists(texts[0])):
        raise ValueError(
            f"{what} is {brief(texts[0])}, which reads as a path, a key or a dataset's name and not as a text; "
            f"give the text itself: Path(...).read_text(), or a column of the loaded dataset"
        )


def _exists(text: str) -> bool:
    try:
        return "\n" not in text and len(text) < 1024 and Path(text).exists()
    except (OSError, ValueError):
        return False


def _is_conversation(value: Any) -> bool:
    """A list of messages, each with its role."""
    return (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(m, Mapping) and "role" in m for m in value)
    )


def _is_row(value: Any) -> bool:
    """A list of two ids or more, or of rows of ids."""
    if not isinstance(value, list) or not value:
        return False
    nested = isinstance(value[0], list)
    first = value[0][0] if nested and value[0] else value[0]
    return isinstance(first, int | np.integer) and not isinstance(first, bool) and (nested or len(value) > 1)


def is_array(value: Any) -> bool:
    """Whether a value may be ids: a tensor, an array, or lists of integers."""
    return isinstance(value, Tensor | np.ndarray) or _is_row(value)


def _size(ids: Any) -> int:
    return ids.numel() if isinstance(ids, Tensor) else int(np.size(ids)) if isinstance(ids, np.ndarray) else len(ids)


def _ids(value: Any, what: str) -> Tensor | list[Any]:
    """Ids `[B, T]`, or a list of rows of different lengths."""
    rows = isinstance(value, list | tuple) and bool(value) and not isinstance(value[0], int | np.integer)
    if rows and len({len(row) for row in value if hasattr(row, "__len__")}) != 1:
        return list(value)
    ids = _tensor(value, f"input_ids of {what}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"input_ids of {what} must be integers [B, T], got {ids.dtype}")
    if ids.ndim not in (1, 2):
        raise ValueError(f"input_ids of {what} must be [B, T] or [T], got {list(ids.shape)}")
    return ids.long() if ids.ndim == 2 else ids.long()[None]


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, list) and value and isinstance(value[0], Tensor):
        value = torch.stack(value)
    try:
        found = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{what} must be an integer tensor [B, T] or [T], got {_a(value)}") from None
    if found.is_meta:
        raise ValueError(f"{what} is on the meta device and holds no values")
    return found


def _rows(entry: Mapping[str, Any], count: int, what: str) -> Iterator[dict[str, Any]]:
    for name, value in entry.items():
        if not hasattr(value, "__len__") or len(value) != count:
            raise ValueError(f"{what} has {count} rows of input_ids and no {count} of {name}")
    for index in range(count):
        yield {name: value[index] for name, value in entry.items()}


def _mask(value: Any, ids: Tensor, what: str) -> Tensor | None:
    """Where the text is, bool `[B, T]`; None where it is everywhere."""
    if value is None:
        return None
    mask = _tensor(value, f"attention_mask of {what}")
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask of {what} must be {list(ids.shape)} as input_ids is, with ones where the text is, got "
            f"{list(mask.shape)}; masks of other kinds are not passed on"
        )
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"attention_mask of {what} must be of 0 and 1, got from {mask.min()} to {mask.max()}")
    mask = mask.bool().to(ids.device)
    return None if bool(mask.all()) else mask


def _spans(mask: Tensor, what: str) -> Iterator[tuple[int, slice]]:
    """For each row that has text, where it is."""
    for index, row in enumerate(mask.cpu()):
        at = row.nonzero().flatten()
        if not len(at):
            continue
        first, last = int(at[0]), int(at[-1]) + 1
        if last - first != len(at):
            raise ValueError(
                f"attention_mask of {what} has zeros between ones in row {index}; padding is before or after the text"
            )
        yield index, slice(first, last)


def _other(name: str, value: Any, ids: Tensor, what: str) -> Tensor:
    found = _tensor(value, f"{name} of {what}")
    if name == "position_ids" and found.ndim < 3:
        found = found[None] if found.ndim == 1 else found
        if found.shape[1] != ids.shape[1] or len(found) not in (1, len(ids)) or found.is_floating_point():
            raise ValueError(f"position_ids of {what} must be integers {list(ids.shape)}, got {list(found.shape)}")
        return found.long().expand(ids.shape)
    return found


def _row(tensors: Batch, index: int, span: slice, what: str) -> Batch:
    rows, length = tensors[IDS].shape
    found = {}
    for name, tensor in tensors.items():
        if tuple(tensor.shape[:2]) == (rows, length):
            found[name] = tensor[index : index + 1, span]
        elif len(tensor) == rows:
            found[name] = tensor[index : index + 1]
        else:
            raise ValueError(
                f"{what} is padded, and {name} {list(tensor.shape)} cannot be told apart by its {rows} rows; give the "
                f"rows one by one"
            )
    return found


def _without_plain_positions(batch: Batch) -> Batch:
    positions = batch.get("position_ids")
    if positions is None or positions.ndim != 2:
        return batch
    plain = torch.arange(positions.shape[1], device=positions.device)
    return {n: t for n, t in batch.items() if n != "position_ids"} if bool((positions == plain).all()) else batch


def _a(value: Any) -> str:
    if isinstance(value, list | tuple | dict | set) and not value:
        return f"an empty {type(value).__name__}"
    shape = f" {list(value.shape)}" if isinstance(value, Tensor | np.ndarray) else ""
    return f"{type(value).__module__}.{type(value).__name__}{shape}".removeprefix("builtins.")
