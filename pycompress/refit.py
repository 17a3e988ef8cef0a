"""Refits a linear of a shrunk block, so that it gives what it gave in the dense model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pycompress.calibrate import Stream
from pycompress.reform import held_out_damping, reform, reform_admm
from pycompress.replace import dense_weight

# The share of the calibration tokens on which the damping is chosen.
HELD_OUT = 0.25
# Where there are too few tokens to hold some out.
DAMPING = 1e-2


@dataclass
class Sums:
    """Of inputs x and aims y over tokens: `gram` x xᵀ `[K', K']`, `cross` y xᵀ `[N, K']`, float64; `energy` of y."""

    gram: Tensor
    cross: Tensor
    energy: float
    tokens: int

    @classmethod
    def empty(cls, outputs: int, inputs: int) -> Sums:
        return cls(
            torch.zeros(inputs, inputs, dtype=torch.float64), torch.zeros(outputs, inputs, dtype=torch.float64), 0.0, 0
        )

    def add(self, x: Tensor, y: Tensor) -> None:
        """`x [T, K']`, `y [T, N]`."""
        self.gram += (x.T @ x).double().cpu()
        self.cross += (y.T @ x).double().cpu()
        self.energy += float(y.double().square().sum())
        self.tokens += len(x)

    def __add__(self, other: Sums) -> Sums:
        gram, cross = self.gram + other.gram, self.cross + other.cross
        return Sums(gram, cross, self.energy + other.energy, self.tokens + other.tokens)


@torch.no_grad()
def refit_linear(module: nn.Module, pairs: Iterable[tuple[Tensor, Tensor]], tokens: int) -> float:
    """Refit a linear of a shrunk block; gives its relative output error `‖Ŵ x - y‖ / ‖y‖` on all tokens.

    `pairs`: inputs `[T, K']` and what the dense linear gave for these tokens `[T, N]`, `tokens` in all. The weight is
    pulled towards what it was, as strongly as serves tokens that are not fitted.
    """
    weight = module.get_parameter("weight")
    turned = not isinstance(module, nn.Linear)
    start = (weight.T if turned else weight).detach().double().cpu()
    bias = None if module.bias is None else module.get_parameter("bias").detach().float()
    fitted, held_out = Sums.empty(*start.shape), Sums.empty(*start.shape)
    seen = 0
    for x, y in pairs:
        sums = fitted if seen < (1 - HELD_OUT) * tokens else held_out
        sums.add(x, y if bias is None else y - bias.to(y.device))
        seen += len(x)
    damping = DAMPING
    if held_out.tokens:
        damping = held_out_damping(fitted.gram, fitted.cross, held_out.gram, held_out.cross, start)
    both = fitted + held_out
    value = reform(start, both.gram, torch.arange(len(both.gram)), both.cross, damping)
    stored = assign(module, value).double().cpu()
    left = both.energy - 2 * float((stored * both.cross).sum()) + float((stored @ both.gram * stored).sum())
    return (max(left, 0.0) / both.energy) ** 0.5 if both.energy else 0.0


@torch.no_grad()
def refit_by_admm(module: nn.Module, dense: Stream, path: str, columns: Tensor) -> float:
    """The same by the published iteration, on the dense inputs; `columns [K']` of the dense linear at `path` stay."""
    whole = dense_weight(dense.block.get_submodule(path)).double().cpu()
    gram = dense.statistics({path: dense.block.get_submodule(path)})[path].gram.double().cpu()
    value = reform_admm(whole, gram, columns)
    left = whole.clone()
    left[:, columns] -= assign(module, value).double().cpu()
    return float(((left @ gram * left).sum() / (whole @ gram * whole).sum()).clamp(min=0)) ** 0.5


def assign(module: nn.Module, value: Tensor) -> Tensor:
    """Give a linear the weight `value [N, K']`, as a parameter of its own: a shrunk model shares what stays whole.

    Gives the weight as it is stored, `[N, K']` in the module's dtype.
    """
    weight = module.get_parameter("weight")
    stored = (value if isinstance(module, nn.Linear) else value.T).to(weight).contiguous()
    module.register_parameter("weight", nn.Parameter(stored, requires_grad=weight.requires_grad))
    return stored if isinstance(module, nn.Linear) else stored.T


def inputs_and_aims(
    dense: Stream, pruned: Stream | None, path: str, columns: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """What the linear at `path` of the current blocks reads, and what the dense one gives for the same tokens.

    It reads what the pruned blocks before it give, or where there are none the dense inputs at `columns [K']`.
    """
    if pruned is None:
        for x, y in dense.captured(path):
            yield x[:, columns.to(x.device)], y
        return
    for (_, y), (x, _) in zip(dense.captured(path), pruned.captured(path), strict=True):
        yield x, y.to(x.device)
