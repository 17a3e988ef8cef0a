"""Slicing: bases of the residual stream, measured block by block, and the sliced blocks that come of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from pycompress.architectures.model import architecture_of, blocks, geometry
from pycompress.calibration import gradients as gradients_of_loss
from pycompress.calibration.batches import first_tokens
from pycompress.calibration.gradients import loss_covariance
from pycompress.calibration.stream import Stream
from pycompress.checkpoint import StageCheckpoint
from pycompress.lm.data import Batch
from pycompress.methods.slicegpt import SliceGPT, principal
from pycompress.nn.blocks import SlicedBlock
from pycompress.nn.resize import slice_block
from pycompress.nn.weights import dense_weight
from pycompress.pipeline import Outcome, Progress
from pycompress.report import Row
from pycompress.surgery.rotate import Basis, Points, check_sliceable, install, sliced_block
from pycompress.surgery.shrink import twin


@dataclass
class Slicing:
    """One `SliceGPT` at work on one model.

    Bases come block after block, each from what the sliced blocks before it give. The first block's attention reads the
    embedding and the last block's MLP writes the final norm's input as they are, so that both stay.
    """

    model: nn.Module
    config: SliceGPT
    batches: list[Batch] | None
    saved: StageCheckpoint
    progress: Progress

    def __post_init__(self) -> None:
        self.architecture = architecture_of(self.model)
        self.parallel = self.architecture.parallel(self.model.config)
        self.dense = blocks(self.model)
        self.undone: Callable[[], None] = lambda: None
        check_sliceable(self.model)

    def run(self) -> Outcome:
        widths = self._widths(self._width())
        if not any(widths):
            return Outcome(self._rows(self.dense))
        assert self.batches is not None
        gradients = self._gradients(self.batches)
        stream = Stream.open(self.model, list(self.dense), self.batches)
        made: list[nn.Module] = []
        entry: Basis | None = None
        for index in self.progress(range(len(self.dense)), "slicing"):
            points = self._points(stream, entry, widths[2 * index : 2 * index + 3], gradients)
            made.append(sliced_block(self.model, self.dense[index], points))
            entry = points[2]
        self.undone = install(self.model, made, widths)
        return Outcome(self._rows(made))

    def undo(self) -> None:
        self.undone()

    def _width(self) -> int | None:
        """The widest stream whose blocks keep at most `config.keep` of their parameters; None: the hidden size."""
        hidden = geometry(self.model, 0).hidden
        step = self.config.round_to or (64 if hidden >= 2048 else 8)
        budget = self.config.keep * self._parameters(None)
        if self._parameters(None) <= budget:
            return None
        low, high = 0, (hidden - 1) // step
        while low < high:
            middle = (low + high + 1) // 2
            if self._parameters(middle * step) <= budget:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            least = self._parameters(step) / self._parameters(None)
            raise ValueError(
                f"SliceGPT keeps at least {least:.3f} of the blocks' parameters, at {step} of {hidden} directions, got "
                f"keep={self.config.keep}; raise keep or lower round_to"
            )
        return low * step

    def _widths(self, width: int | None) -> list[int | None]:
        """Of the stream where each branch reads it, and where the last block leaves it; None: the hidden size."""
        first = None if self.parallel else width
        return [None, first, *[width] * (2 * len(self.dense) - 2), None]

    def _parameters(self, width: int | None) -> int:
        """Weights of the blocks' linears and products when the stream is `width` wide."""
        widths, total = self._widths(width), 0
        for index, block in enumerate(self.dense):
            own = widths[2 * index : 2 * index + 3]
            made = block
            if any(own):
                made = twin(block, self.model.config, self.model.config)
                slice_block(made, self.architecture, own, parallel=self.parallel)
            total += sum(module.get_parameter("weight").numel() for module in self._matrices(made).values())
        return total

    def _matrices(self, block: nn.Module) -> dict[str, nn.Module]:
        """The block's linears by path, with the products that slicing adds."""
        found = {path: block.get_submodule(path) for path in self.architecture.paths.values()}
        if isinstance(block, SlicedBlock):
            products = (("shortcuts", block.shortcuts), ("projections", block.projections))
            added = {f"{name}.{number}": m for name, modules in products for number, m in enumerate(modules)}
            found |= {path: module for path, module in added.items() if isinstance(module, nn.Linear)}
        return found

    def _gradients(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Mean of g gᵀ `[D, D]`, g the loss's gradient by what a branch of the dense model writes, by its path."""
        if self.config.weighting == "none":
            return {}
        found = self.saved.load_ranking("gradients of the residual stream")
        if found is None:
            names = [self._name(index, self._end(number)) for index in range(len(self.dense)) for number in (0, 1)]
            progress = partial(self.progress, what="loss gradients")
            sample = first_tokens(batches, gradients_of_loss.TOKENS)
            found = loss_covariance(self.model, self.dense, sample, names, progress)
            self.saved.save_ranking("gradients of the residual stream", found)
        return found

    def _end(self, number: int) -> str:
        """Path of what a branch writes to the residual stream."""
        branch = self.architecture.branches[number]
        return branch.norm_after or self.architecture.paths[branch.writer]

    @torch.no_grad()
    def _points(
        self, stream: Stream, entry: Basis | None, widths: list[int | None], gradients: dict[str, Tensor]
    ) -> Points:
        """The bases of the stream's current block; takes the stream to the next one, if there is one."""
        index, dense = stream.position, self.dense[stream.position]
        known = self.saved.load_bases(index)
        made: dict[str, Tensor] = {}

        def basis(name: str, number: int, vectors: Iterable[Tensor]) -> Basis:
            if known is not None:
                return Basis(known[f"{name}.decoder"], known[f"{name}.encoder"])
            found = self._basis(vectors, widths[number + 1], gradients.get(self._name(index, self._end(number))))
            made.update({f"{name}.decoder": found.decoder, f"{name}.encoder": found.encoder})
            return found

        middle, leave = entry, None
        if not self.parallel:
            stream.blocks[index] = sliced_block(self.model, dense, (entry, None, None))
            middle = basis("middle", 0, (x for x, _ in stream.captured(self.architecture.branches[1].norm)))
        stream.blocks[index] = sliced_block(self.model, dense, (entry, middle, None))
        if index < len(self.dense) - 1:
            outputs = [output for output in stream.run() if output is not None]
            leave = basis("leave", 1, (output.flatten(0, -2) for output in outputs))
            stream.enter_next([output @ leave.encoder.to(output) for output in outputs])
        if known is None:
            self.saved.save_bases(index, made)
        return entry, middle, leave

    def _basis(self, vectors: Iterable[Tensor], width: int | None, gradients: Tensor | None) -> Basis:
        """The basis of these vectors `[T, D]` of the residual stream."""
        assert width is not None
        covariance, tokens = torch.zeros((), dtype=torch.float64), 0
        for x in vectors:
            wide = x.double()
            covariance = covariance.to(wide) + wide.T @ wide
            tokens += len(x)
        mean_free = self.architecture.norm_kind == "layer"
        return Basis(*principal(covariance / tokens, width, gradients, mean_free=mean_free))

    def _name(self, block: int, path: str) -> str:
        return f"{self.architecture.blocks}.{block}.{path}"

    def _rows(self, made: list[nn.Module]) -> list[Row]:
        rows = []
        for index, block in enumerate(made):
            dense = self._matrices(self.dense[index])
            for path, module in self._matrices(block).items():
                weight = dense_weight(module)
                after = weight.numel() * weight.element_size()
                before = dense_weight(dense[path]).numel() * weight.element_size() if path in dense else 0
                kind = f"dense {weight.shape[0]}x{weight.shape[1]}"
                rows.append(Row(self._name(index, path), index, kind, before, after, after, float("nan"), 0.0))
        return rows
