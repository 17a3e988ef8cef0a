"""Hidden states of the calibration batches, one block at a time, and statistics of what linears read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils._pytree import tree_map

from pycompress.lm.data import Batch
from pycompress.lm.precision import in_float32
from pycompress.lm.state import forwards, hooked
from pycompress.methods.registry import Statistics
from pycompress.ops.gram import gram

Arguments = list[tuple[tuple[Any, ...], dict[str, Any]]]  # of each block


class _ReachedError(Exception):
    """What was wanted of the forward pass is there: the rest is not needed."""


class _Front:
    """A model up to its first block: what it hands to the blocks for a batch."""

    def __init__(self, model: nn.Module, blocks: list[nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        self.device = next(model.parameters()).device
        self.known: list[Tensor] = []

    def __call__(self, batch: Batch) -> tuple[Tensor, Arguments]:
        """The first block's input `[B, T, d]` and every block's arguments, without running any."""
        seen: Arguments = []
        entry: list[Tensor] = []

        def note(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Tensor]:
            def take(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                if not entry:
                    entry.append(hidden)
                seen.append((args, kwargs))
                if block is self.blocks[-1]:
                    raise _ReachedError
                return hidden

            return take

        inputs = {name: tensor.to(self.device) for name, tensor in batch.items()}
        with forwards(self.blocks, note), suppress(_ReachedError):
            self.model(**inputs, use_cache=False, return_dict=True)
        if not entry:
            raise _ReachedError  # a hook has ended it
        known: dict[int, Any] = {}

        def shared(value: Any) -> Any:
            if id(value) not in known:  # blocks of a kind get one mask
                known[id(value)] = self._shared(value)
            return known[id(value)]

        return entry[0], tree_map(shared, seen)

    def _shared(self, value: Any) -> Any:
        """In place of a tensor the equal part of one that is there: masks and cosines of shorter rows are corners of
        those of longer ones, so that they take the memory of the longest row, not of all rows.
        """
        if not isinstance(value, Tensor):
            return value
        for known in self.known:
            if known.ndim == value.ndim and known.dtype == value.dtype:
                corner = known[tuple(slice(size) for size in value.shape)]
                if corner.shape == value.shape and torch.equal(corner, value):
                    return corner
        self.known.append(value)
        return value


def contiguous(value: Any) -> Any:
    """A tensor in rows without gaps; anything else as it is."""
    return value.contiguous() if isinstance(value, Tensor) else value


@dataclass
class Stream:
    """The calibration batches' hidden states at the entry of the next block, and the arguments each block gets.

    `hidden`: one `[B, T, d]` tensor a batch. Only these and one block's statistics are held at a time.
    Whatever runs raises `ValueError` for activations that are not finite, and names where they come from.
    """

    blocks: list[nn.Module]
    hidden: list[Tensor]
    arguments: list[Arguments]
    position: int = 0

    @classmethod
    @torch.no_grad()
    def open(cls, model: nn.Module, blocks: list[nn.Module], batches: list[Batch]) -> Stream:
        """Run the model up to its first block, and note what it hands to every block, without running any."""
        front = _Front(model, blocks)
        found: list[tuple[Tensor, Arguments]] = [None] * len(batches)  # type: ignore[list-item]
        # The longest first: masks of the others are parts of theirs.
        for index in sorted(range(len(batches)), key=lambda i: -batches[i]["input_ids"].shape[1]):
            found[index] = front(batches[index])
            if not _finite(found[index][0]):
                outside = {m: name for name, m in model.named_modules()}
                for block in blocks:
                    for module in block.modules():
                        outside.pop(module, None)
                where = first_unfit([(name, m) for m, name in outside.items()], partial(front, batches[index]))
                raise ValueError(_unfit("what comes before block 0", index, where or "the model"))
        return cls(blocks, [hidden for hidden, _ in found], [arguments for _, arguments in found])

    def split(self, share: float) -> tuple[Stream, Stream]:
        """The batches that begin in the first `share` of the tokens, and the others: two streams, each on its own."""
        counts = [hidden[..., 0].numel() for hidden in self.hidden]
        first = sum(sum(counts[:index]) < share * sum(counts) for index in range(len(counts)))
        begin, end = (
            Stream(self.blocks, self.hidden[part], self.arguments[part], self.position)
            for part in (slice(first), slice(first, None))
        )
        return begin, end

    @property
    def block(self) -> nn.Module:
        return self.blocks[self.position]

    @property
    def tokens(self) -> int:
        return sum(hidden[..., 0].numel() for hidden in self.hidden)

    @torch.no_grad()
    def run(self) -> Iterator[Tensor | None]:
        """The current block's output for each batch; None for a batch that a hook ended early."""
        block = in_float32(self.block)
        device = next(self.block.parameters()).device
        for index, hidden in enumerate(self.hidden):
            args, kwargs = tree_map(contiguous, self.arguments[index][self.position])
            try:
                output = block(hidden.to(device), *args, **kwargs)
            except _ReachedError:
                yield None
                continue
            if not _finite(output):
                raise ValueError(self._blame(index))
            yield output

    def statistics(self, linears: dict[str, nn.Module], advance: bool = False) -> dict[str, Statistics]:
        """Statistics of the inputs of `linears`, in order of execution, one of each group that shares an input.

        `advance`: go on to the next block, as `advance()` does, in the same pass.
        """
        sums = {name: _InputGram(module, last=False) for name, module in linears.items()}
        if sums and not advance:
            next(reversed(sums.values())).last = True
        with hooked(gram_sum.register for gram_sum in sums.values()):
            outputs = [output if advance else None for output in self.run()]
        unfit = next((name for name, found in sums.items() if not found.finite), None)
        if unfit is not None:
            for index in range(len(self.hidden)):
                if self._culprit(index) is not None:
                    raise ValueError(self._blame(index))
            raise ValueError(
                f"block {self.position}: what {unfit} reads is so large that its squares are infinite in float32; "
                f"check the weights and the calibration data"
            )
        if advance:
            self.enter_next(outputs)
        return {name: found.statistics() for name, found in sums.items()}

    def captured(self, path: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and outputs of the linear or norm at `path` of the current block, a batch at a time.

        `[T, K]` and `[T, N]`, float32. The block runs no further than that module.
        """
        found: list[tuple[Tensor, Tensor]] = []

        def take(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found.append((args[0], output))
            raise _ReachedError

        module = self.block.get_submodule(path)
        with hooked([lambda: module.register_forward_hook(take)]):
            for index, _ in enumerate(self.run()):
                x, y = (tensor.float().flatten(0, -2) for tensor in found.pop())
                if not (_finite(x) and _finite(y)):
                    raise ValueError(self._blame(index))
                yield x, y

    def advance(self) -> None:
        """Replace the hidden states by the current block's outputs and go to the next block."""
        self.enter_next(list(self.run()))

    def enter_next(self, outputs: Sequence[Tensor | None]) -> None:
        """Go to the next block, which gets these outputs of the current one."""
        self.hidden = [output for output in outputs if output is not None]
        self.position += 1

    def _blame(self, index: int) -> str:
        """What to say of activations of a batch that are not finite in the current block."""
        return _unfit(f"block {self.position}", index, self._culprit(index) or "its input")

    @torch.no_grad()
    def _culprit(self, index: int) -> str | None:
        """The path of the first module of the current block whose output is not finite for a batch."""
        args, kwargs = tree_map(contiguous, self.arguments[index][self.position])
        hidden = self.hidden[index].to(next(self.block.parameters()).device)
        modules = list(self.block.named_modules())
        return first_unfit(modules, lambda: in_float32(self.block)(hidden, *args, **kwargs))


def first_unfit(modules: Sequence[tuple[str, nn.Module]], call: Callable[[], Any]) -> str | None:
    """The name of the first of these modules that gives NaN or infinite numbers in `call()`."""
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and not _finite(output):
                found.append(name or type(module).__name__)
                raise _ReachedError

        return hook

    register = [partial(module.register_forward_hook, look(name)) for name, module in modules]
    with hooked(register), suppress(_ReachedError):
        call()
    return found[0] if found else None


def _unfit(where: str, batch: int, module: str) -> str:
    return (
        f"{where} gives NaN or infinite activations for calibration batch {batch}, first in {module}; check its "
        f"weights and the batch, or run the model in bfloat16 or float32"
    )


def statistics_before(
    model: nn.Module, blocks: list[nn.Module], batches: list[Batch], linears: dict[str, nn.Module]
) -> dict[str, Statistics]:
    """Statistics of the inputs of `linears`, which run before the decoder blocks, as those of a vision tower do.

    Raises `ValueError` for one that the batches do not reach.
    """
    sums = {name: _InputGram(module, last=False) for name, module in linears.items()}
    with hooked(gram_sum.register for gram_sum in sums.values()):
        Stream.open(model, blocks, batches)
    unfit = [name for name, found in sums.items() if not found.finite]
    if unfit:
        raise ValueError(f"{unfit[0]} gets NaN or infinite inputs from the calibration data; check it and the weights")
    unseen = [name for name, found in sums.items() if not found.tokens]
    if unseen:
        raise ValueError(
            f"the calibration data does not reach {unseen[0]}; give batches with the images it reads "
            f"(pixel_values), or compress it without calibration"
        )
    return {name: found.statistics() for name, found in sums.items()}


def block_influence(stream: Stream) -> Tensor:
    """How much each block changes its input, `[blocks]` float64: one minus the mean cosine of input and output.

    Takes the stream from its first block past its last. Reference: arXiv:2403.03853.
    """
    found = []
    for _ in stream.blocks:
        entered = stream.hidden
        stream.advance()
        cosines = [
            cosine_similarity(before.double(), after.double(), dim=-1).flatten()
            for before, after in zip(entered, stream.hidden, strict=True)
        ]
        found.append(1 - torch.cat(cosines).mean())
    return torch.stack(found)


class _InputGram:
    """Adds up the Gram matrix of a module's inputs; ends the forward pass after the last one."""

    def __init__(self, module: nn.Module, last: bool) -> None:
        self.module, self.last = module, last
        self.tokens = 0
        self.total: Tensor = torch.zeros(())
        self.sum: Tensor = torch.zeros(())

    def register(self) -> Any:
        return self.module.register_forward_pre_hook(self.add)

    def add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].reshape(-1, args[0].shape[-1])
        product, row = gram(x.float().T), x.sum(0, dtype=torch.float32)
        self.total = product if not self.tokens else self.total.add_(product)
        self.sum = row if not self.tokens else self.sum.add_(row)
        self.tokens += len(x)
        if self.last:
            raise _ReachedError

    @property
    def finite(self) -> bool:
        return _finite(self.total) and _finite(self.sum)

    def statistics(self) -> Statistics:
        return Statistics(self.total / self.tokens, self.tokens, mean=self.sum / self.tokens)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
