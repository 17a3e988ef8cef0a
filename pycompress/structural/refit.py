"""Refits linears of a shrunk block, so that they give what they gave in the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from pycompress.calibration.stream import Stream
from pycompress.checkpoint import StageCheckpoint
from pycompress.nn.weights import assign, dense_weight
from pycompress.structural.least_squares import held_out_dampings, reform, reform_admm

# The share of the calibration tokens on which the damping is chosen.
HELD_OUT = 0.25
# Where there are too few tokens to hold some out.
DAMPING = 1e-2


@dataclass
class Sums:
    """Of inputs x and the aims y of each linear that reads them, over tokens: `gram` x xᵀ `[K', K']`, `cross` y xᵀ
    `[N, K']`, float64; `energy` of y.
    """

    gram: Tensor
    cross: list[Tensor]
    energy: list[float]
    tokens: int

    @classmethod
    def empty(cls, outputs: Sequence[int], inputs: int) -> Sums:
        gram, *cross = (torch.zeros(rows, inputs, dtype=torch.float64) for rows in (inputs, *outputs))
        return cls(gram, cross, [0.0] * len(cross), 0)

    def add(self, x: Tensor, aims: Sequence[Tensor]) -> None:
        """`x [T, K']`, of each linear `y [T, N]`."""
        self.gram += (x.T @ x).double().cpu()
        for index, y in enumerate(aims):
            self.cross[index] += (y.T @ x).double().cpu()
            self.energy[index] += float(y.double().square().sum())
        self.tokens += len(x)

    def __add__(self, other: Sums) -> Sums:
        cross = [mine + theirs for mine, theirs in zip(self.cross, other.cross, strict=True)]
        energy = [mine + theirs for mine, theirs in zip(self.energy, other.energy, strict=True)]
        return Sums(self.gram + other.gram, cross, energy, self.tokens + other.tokens)


@torch.no_grad()
def refit_linears(
    modules: Sequence[nn.Module], pairs: Iterable[tuple[Tensor, Sequence[Tensor]]], tokens: int
) -> list[float]:
    """Refit linears of a shrunk block that read one input; gives the relative output error `‖Ŵ x - y‖ / ‖y‖` of each,
    on all tokens.

    `pairs`: inputs `[T, K']` and for each linear what it should give for these tokens `[T, N]`, `tokens` in all. Each
    weight is pulled towards what it was, as strongly as serves tokens that are not fitted.
    """
    starts = [dense_weight(module).double().cpu() for module in modules]
    biases = [None if module.bias is None else module.get_parameter("bias").detach().float() for module in modules]
    outputs, inputs = [len(start) for start in starts], starts[0].shape[1]
    fitted, held_out = Sums.empty(outputs, inputs), Sums.empty(outputs, inputs)
    seen = 0
    for x, aims in pairs:
        sums = fitted if seen < (1 - HELD_OUT) * tokens else held_out
        sums.add(x, [y if bias is None else y - bias.to(y.device) for y, bias in zip(aims, biases, strict=True)])
        seen += len(x)
    dampings = [DAMPING] * len(starts)
    if held_out.tokens:
        dampings = held_out_dampings(fitted.gram, fitted.cross, held_out.gram, held_out.cross, starts)
    both = fitted + held_out
    errors = []
    for module, start, cross, energy, damping in zip(modules, starts, both.cross, both.energy, dampings, strict=True):
        value = reform(start, both.gram, torch.arange(len(both.gram)), cross, damping)
        stored = assign(module, value).double().cpu()
        left = energy - 2 * float((stored * cross).sum()) + float((stored @ both.gram * stored).sum())
        errors.append((max(left, 0.0) / energy) ** 0.5 if energy else 0.0)
    return errors


@dataclass(frozen=True)
class Moments:
    """Sums of x xᵀ `[K, K]` float32 over what a dense linear reads, of the tokens to fit and of those held out; None
    where there were too few to hold some out.
    """

    fitted: Tensor
    held_out: Tensor | None

    @property
    def total(self) -> Tensor:
        return self.fitted if self.held_out is None else self.fitted + self.held_out


class Readers:
    """Moments of what readers of a block read in the dense model, block after block.

    `dense` stands before the first block; `paths`: of the readers, by role. What `saved` has is not measured again.
    """

    def __init__(self, dense: Stream, paths: dict[str, str], saved: StageCheckpoint) -> None:
        self.parts = [part for part in dense.split(1 - HELD_OUT) if part.hidden]
        self.paths = paths
        self.saved = saved

    def at(self, block: int) -> dict[str, Moments]:
        """By role; blocks are asked for in order."""
        found = self.saved.load_moments(block, list(self.paths))
        if found is None:
            found = {role: [] for role in self.paths}
            for part in self.parts:
                while part.position < block:
                    part.advance()
                modules = {role: part.block.get_submodule(path) for role, path in self.paths.items()}
                measured = part.statistics(modules, advance=block < len(part.blocks) - 1)
                for role, statistics in measured.items():
                    found[role].append(statistics.gram * statistics.tokens)
            self.saved.save_moments(block, found)
        return {role: Moments(sums[0], sums[1] if len(sums) > 1 else None) for role, sums in found.items()}


@torch.no_grad()
def refit_reader(module: nn.Module, whole: Tensor, moments: Moments, columns: Tensor, admm: bool = False) -> float:
    """Refit a linear that keeps `columns [K']` of the dense weight `whole [N, K]`; gives the relative output error.

    `moments`: of the dense inputs. `admm` takes the published iteration; else the weight is pulled towards what it was
    as strongly as serves tokens that are not fitted.
    """
    whole, total, columns = whole.double().cpu(), moments.total.double().cpu(), columns.cpu()
    if admm:
        value = reform_admm(whole, total, columns)
    else:
        damping = DAMPING
        if moments.held_out is not None:
            fitted, held_out = (gram.double().cpu()[:, columns] for gram in (moments.fitted, moments.held_out))
            fits = (fitted[columns], [whole @ fitted], held_out[columns], [whole @ held_out])
            (damping,) = held_out_dampings(*fits, [whole[:, columns]])
        value = reform(whole, total, columns, damping=damping)
    left = whole.clone()
    left[:, columns] -= assign(module, value).double().cpu()
    energy = float((whole @ total * whole).sum())
    return (max(float((left @ total * left).sum()), 0.0) / energy) ** 0.5 if energy else 0.0


def reader_aims(dense: Stream, pruned: Stream, path: str) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """What the linear at `path` of the pruned block reads, and what the dense one gives for the same tokens."""
    for (_, y), (x, _) in zip(dense.captured(path), pruned.captured(path), strict=True):
        yield x, (y.to(x.device),)


def writer_aims(
    dense: Stream, pruned: Stream, path: str, modules: Sequence[nn.Module]
) -> Iterator[tuple[Tensor, Sequence[Tensor]]]:
    """What the linears that share the input of the one at `path` read in the pruned block, and what they give, as they
    are, for the dense block's inputs: the dense linears' outputs at the rows that stay.
    """
    weights = [dense_weight(module).float() for module in modules]
    biases = [None if module.bias is None else module.get_parameter("bias").detach().float() for module in modules]
    for (whole, _), (x, _) in zip(dense.captured(path), pruned.captured(path), strict=True):
        yield x, [linear(whole.to(x.device), w, bias) for w, bias in zip(weights, biases, strict=True)]
