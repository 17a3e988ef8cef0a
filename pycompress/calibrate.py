"""Calibration: prepared batches, and their hidden states as they pass through one block at a time."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils._pytree import tree_map

from pycompress.measure.model import embedding
from pycompress.measure.windows import token_windows
from pycompress.methods.registry import Statistics
from pycompress.ops.gram import gram

Batch = dict[str, Tensor]
WINDOW = 512  # tokens


def prepare(model: Any, calibration: Any, tokenizer: Any) -> list[Batch]:
    """Calibration data in any accepted form as a list of `{"input_ids": [B, T], "attention_mask": [B, T]}`.

    Batches with `pixel_values`, of one image a row, keep the other tensors that their processor gave, labels apart.

    `calibration`: a list of str (joined, tokenised and cut into windows of 512 tokens, BOS before each where the
    model has one), a tensor of ids `[B, T]`, or an iterable of id tensors or dict batches such as a DataLoader.
    Raises `ValueError` or `TypeError` when it is empty, of another kind, or has ids outside the vocabulary.
    """
    if isinstance(calibration, str):
        calibration = [calibration]
    if isinstance(calibration, Tensor):
        calibration = calibration.split(8) if calibration.ndim == 2 else [calibration]
    entries = list(calibration)
    if not entries:
        raise ValueError("calibration is empty; give texts, id tensors [B, T], dict batches or a DataLoader")
    if isinstance(entries[0], str):
        if tokenizer is None:
            raise ValueError("calibration texts need a tokenizer; pass tokenizer=AutoTokenizer.from_pretrained(...)")
        entries = token_windows(model, tokenizer, "\n\n".join(entries), WINDOW, count=sys.maxsize)
    batches = [_batch(entry) for entry in entries]
    batches = [batch for batch in batches if batch["input_ids"].numel()]
    if not batches:
        raise ValueError("calibration holds no token; give at least one window of text")
    vocabulary = len(embedding(model))
    low = min(int(batch["input_ids"].min()) for batch in batches)
    high = max(int(batch["input_ids"].max()) for batch in batches)
    if low < 0 or high >= vocabulary:
        raise ValueError(
            f"calibration ids run from {low} to {high} but the model's vocabulary is 0 to {vocabulary - 1}; "
            f"tokenise with the model's own tokenizer"
        )
    return batches


def first_tokens(batches: list[Batch], tokens: int) -> list[Batch]:
    """The first rows of the batches, one row each, that together hold at least `tokens` tokens (or all there are)."""
    rows: list[Batch] = []
    for batch in batches:
        for index in range(len(batch["input_ids"])):
            if sum(row["input_ids"].numel() for row in rows) >= tokens:
                return rows
            rows.append({name: tensor[index : index + 1] for name, tensor in batch.items()})
    return rows


def fingerprint(batches: Iterable[Batch]) -> str:
    """A hash of the calibration data, for refusing to resume with other data."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(name.encode() + str(tuple(batch[name].shape)).encode())
            digest.update(batch[name].cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _batch(entry: Any) -> Batch:
    if isinstance(entry, Tensor):
        entry = {"input_ids": entry}
    if not hasattr(entry, "keys") or "input_ids" not in entry:
        raise TypeError(
            f"a calibration entry is a str, ids [B, T] or a dict with input_ids, got {type(entry).__name__}"
        )
    ids = entry["input_ids"]
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise TypeError("calibration input_ids must be an integer tensor [B, T]")
    ids = ids.long() if ids.ndim == 2 else ids.long()[None]
    batch = {"input_ids": ids}
    if "pixel_values" in entry:
        batch |= {k: v for k, v in entry.items() if isinstance(v, Tensor) and k not in ("input_ids", "labels")}
        batch.pop("attention_mask", None)
    if "attention_mask" in entry and not bool(entry["attention_mask"].all()):
        batch["attention_mask"] = entry["attention_mask"].view_as(ids)
    return batch


class _ReachedError(Exception):
    """What was wanted of the forward pass is there: the rest is not needed."""


def float32(value: Any) -> Any:
    """A floating-point tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value


def in_float32(module: nn.Module) -> Callable[..., Any]:
    """`module` computing in float32 from its weights as they are, on a CPU, where 16-bit arithmetic is slow and gains
    nothing; the module itself elsewhere. Arguments are cast along; hooks run.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    narrow = {name: t for name, t in tensors.items() if t.is_floating_point() and t.dtype != torch.float32}
    if not narrow or any(t.device.type != "cpu" for t in narrow.values()):
        return module
    wide = {name: tensor.detach().float() for name, tensor in narrow.items()}

    def call(*args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(module, wide, tree_map(float32, args), tree_map(float32, kwargs))

    return call


@dataclass
class Stream:
    """The calibration batches' hidden states at the entry of the next block, and the arguments each block gets.

    `hidden`: one `[B, T, d]` tensor a batch. Only these and one block's statistics are held at a time.
    """

    blocks: list[nn.Module]
    hidden: list[Tensor]
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]]
    masks: list[Tensor | None]
    position: int = 0

    @classmethod
    @torch.no_grad()
    def open(cls, model: nn.Module, blocks: list[nn.Module], batches: list[Batch]) -> Stream:
        """Run the model up to its first block, and note what it hands to every block, without running any."""
        hidden, arguments, masks = [], [], []
        device = next(model.parameters()).device
        for batch in batches:
            seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            entry: list[Tensor] = []
            _skip(blocks, seen, entry)
            try:
                model(**{name: tensor.to(device) for name, tensor in batch.items()}, use_cache=False)
            except _ReachedError:
                pass
            finally:
                for block in blocks:
                    block.__dict__.pop("forward", None)
            hidden.append(entry[0])
            arguments.append(seen)
            masks.append(batch["attention_mask"].bool() if "attention_mask" in batch else None)
        return cls(blocks, hidden, arguments, masks)

    def split(self, share: float) -> tuple[Stream, Stream]:
        """The batches that begin in the first `share` of the tokens, and the others: two streams, each on its own."""
        counts = [
            hidden[..., 0].numel() if mask is None else int(mask.sum())
            for hidden, mask in zip(self.hidden, self.masks, strict=True)
        ]
        first = sum(sum(counts[:index]) < share * sum(counts) for index in range(len(counts)))
        begin, end = (
            Stream(self.blocks, self.hidden[part], self.arguments[part], self.masks[part], self.position)
            for part in (slice(first), slice(first, None))
        )
        return begin, end

    @property
    def block(self) -> nn.Module:
        return self.blocks[self.position]

    @torch.no_grad()
    def run(self) -> Iterator[Tensor | None]:
        """The current block's output for each batch; None for a batch that a hook ended early."""
        block = in_float32(self.block)
        device = next(self.block.parameters()).device
        for index, hidden in enumerate(self.hidden):
            args, kwargs = self.arguments[index][self.position]
            try:
                yield block(hidden.to(device), *args, **kwargs)
            except _ReachedError:
                yield None

    def statistics(self, linears: dict[str, nn.Module], advance: bool = False) -> dict[str, Statistics]:
        """Statistics of the inputs of `linears`, in order of execution, one of each group that shares an input.

        Padding does not count. `advance`: go on to the next block, as `advance()` does, in the same pass.
        """
        sums = {name: _InputGram(module, last=False) for name, module in linears.items()}
        if sums and not advance:
            next(reversed(sums.values())).last = True
        outputs: list[Tensor | None] = []
        batches = self.run()
        try:
            for mask in self.masks:
                for gram_sum in sums.values():
                    gram_sum.mask = mask
                output = next(batches)
                outputs.append(output if advance else None)
        finally:
            for gram_sum in sums.values():
                gram_sum.handle.remove()
        if advance:
            self.enter_next(outputs)
        return {name: found.statistics() for name, found in sums.items()}

    def captured(self, path: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and outputs of the linear or norm at `path` of the current block, without padded tokens, a batch
        at a time.

        `[T, K]` and `[T, N]`, float32. The block runs no further than that module.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.append((args[0], output))
            raise _ReachedError

        handle = self.block.get_submodule(path).register_forward_hook(take)
        try:
            for mask, _ in zip(self.masks, self.run(), strict=True):
                pair = (tensor.float().flatten(0, -2) for tensor in found.pop())
                x, y = (t if mask is None else t[mask.to(t.device).flatten()] for t in pair)
                yield x, y
        finally:
            handle.remove()

    def advance(self) -> None:
        """Replace the hidden states by the current block's outputs and go to the next block."""
        self.enter_next(list(self.run()))

    def enter_next(self, outputs: Sequence[Tensor | None]) -> None:
        """Go to the next block, which gets these outputs of the current one."""
        self.hidden = [output for output in outputs if output is not None]
        self.position += 1


def statistics_before(
    model: nn.Module, blocks: list[nn.Module], batches: list[Batch], linears: dict[str, nn.Module]
) -> dict[str, Statistics]:
    """Statistics of the inputs of `linears`, which run before the decoder blocks, as those of a vision tower do.

    Raises `ValueError` for one that the batches do not reach.
    """
    sums = {name: _InputGram(module, last=False) for name, module in linears.items()}
    try:
        Stream.open(model, blocks, batches)
    finally:
        for gram_sum in sums.values():
            gram_sum.handle.remove()
    unseen = [name for name, found in sums.items() if not found.tokens]
    if unseen:
        raise ValueError(
            f"the calibration data does not reach {unseen[0]}; give batches with the images it reads "
            f"(pixel_values), or compress it without calibration"
        )
    return {name: found.statistics() for name, found in sums.items()}


def block_influence(stream: Stream) -> Tensor:
    """How much each block changes its input, `[blocks]` float64: one minus the mean cosine of input and output.

    Takes the stream from its first block past its last. Padding does not count. Reference: arXiv:2403.03853.
    """
    found = []
    for _ in stream.blocks:
        entered = stream.hidden
        stream.advance()
        cosines = []
        for before, after, mask in zip(entered, stream.hidden, stream.masks, strict=True):
            values = cosine_similarity(before.double(), after.double(), dim=-1)
            cosines.append(values.flatten() if mask is None else values[mask])
        found.append(1 - torch.cat(cosines).mean())
    return torch.stack(found)


class _InputGram:
    """Adds up the Gram matrix of a module's inputs, without padded tokens; ends the forward pass after the last one."""

    def __init__(self, module: nn.Module, last: bool) -> None:
        self.mask: Tensor | None = None
        self.last = last
        self.tokens = 0
        self.total: Tensor = torch.zeros(())
        self.sum: Tensor = torch.zeros(())
        self.handle = module.register_forward_pre_hook(self.add)

    def add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        x = x if self.mask is None else x[self.mask.to(x.device).flatten()]
        product, row = gram(x.float().T), x.sum(0, dtype=torch.float32)
        self.total = product if not self.tokens else self.total.add_(product)
        self.sum = row if not self.tokens else self.sum.add_(row)
        self.tokens += len(x)
        if self.last:
            raise _ReachedError

    def statistics(self) -> Statistics:
        return Statistics(self.total / self.tokens, self.tokens, mean=self.sum / self.tokens)


def _skip(blocks: list[nn.Module], seen: list[tuple[tuple[Any, ...], dict[str, Any]]], entry: list[Tensor]) -> None:
    """Make every block note its arguments and hand its input on; the last one ends the forward pass."""
    for index, block in enumerate(blocks):

        def note(hidden: Tensor, *args: Any, _last: bool = index == len(blocks) - 1, **kwargs: Any) -> Tensor:
            if not entry:
                entry.append(hidden)
            seen.append((args, kwargs))
            if _last:
                raise _ReachedError
            return hidden

        block.forward = note  # type: ignore[method-assign]
