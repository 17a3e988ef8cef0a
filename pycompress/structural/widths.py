"""How wide a pruned model's blocks become: one budget of parameters, by share, by score or by error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pycompress.architectures.geometry import Geometry
from pycompress.architectures.subnet import Kept
from pycompress.methods.allocate import allocate
from pycompress.methods.registry import Curve

MLP_ROLES = ("gate", "up", "down")
# A share is a multiple of one in so many.
SHARES = 4096


@dataclass(frozen=True)
class Ranked:
    """How much each unit of one part of a block matters.

    `order [U]` int64: the units, the first to remove first, or `[S, U]` where S sets lose a unit each at a time;
    `scores [U]`: of the units in that order, rising; `error [U + 1]`: the loss's rise when the first 0, 1, … are
    removed, None where the method does not know it.
    """

    order: Tensor
    scores: Tensor
    error: Tensor | None = None

    def kept(self, count: int) -> Tensor:
        """The `count` units that stay longest, ascending."""
        return self.order[..., self.order.shape[-1] - count :].sort(-1).values


# A block's parts by name: "mlp"; of the heads "kv_heads", or "attention", or "rotated" and "passed" channels. Where
# these are of queries and keys alone, those of values and o are "values".
Parts = dict[str, Ranked]


@dataclass(frozen=True)
class Budget:
    """At most `keep` of the parameters of the blocks' linears, biases apart.

    `sizes`: of the dense blocks. `parts`, `round_to`: as in `StructuralConfig`. Each method gives the sizes that are
    left, block by block, and raises `ValueError` where the smallest do not fit.
    """

    sizes: list[Geometry]
    keep: float
    parts: tuple[str, ...]
    round_to: int | None = None

    def by_share(self) -> list[Geometry]:
        """The same share of every part of every block, the largest that fits."""
        return self._spent(lambda step: [self._share(size, (step + 1) / SHARES) for size in self.sizes], SHARES - 1)

    def by_score(self, ranked: list[Parts]) -> list[Geometry]:
        """What is left when every unit stays whose score is at least a threshold, the lowest that fits."""
        values = torch.cat([part.scores for found in ranked for part in found.values()]).sort().values
        return self._spent(lambda step: self._above(ranked, float(values[-1 - step])), len(values) - 1)

    def by_error(self, ranked: list[Parts]) -> list[Geometry]:
        """Each unit's parameters spent where they save most of the loss."""
        curves: dict[str, Curve] = {}
        counts: dict[str, dict[int, int]] = {}
        for block, (size, parts) in enumerate(zip(self.sizes, ranked, strict=True)):
            for kind in self._kinds:
                mine, full = _of_kind(parts, kind), _count(size, kind)
                choices = sorted({self._rounded(size, kind, c / full) for c in range(1, full + 1)}) if mine else [full]
                costs = [_parameters_of(size, kind, count) for count in choices]
                errors = [sum(_error_at(part, count / full) for part in mine) for count in choices]
                name = f"{block} {kind}"
                counts[name] = dict(zip(costs, choices, strict=True))
                nbytes, error = torch.tensor(costs), torch.tensor(errors, dtype=torch.float64)
                curves[name] = Curve(nbytes, error, 1.0, torch.arange(len(choices)))
        least = sum(int(curve.nbytes.min()) for curve in curves.values())
        if least > self._most:
            raise self._too_small(least)
        given = allocate(curves, dict.fromkeys(curves, 1.0), int(self._most))
        found = []
        for block, size in enumerate(self.sizes):
            for kind in self._kinds:
                size = _narrowed(size, kind, counts[f"{block} {kind}"][given[f"{block} {kind}"]])
            found.append(size)
        return found

    @property
    def steps(self) -> tuple[int, int] | None:
        """What widths of heads and of MLPs are multiples of, None for what fits each block."""
        step = self.round_to
        return None if step is None else (min(step + step % 2, 8), step)

    @property
    def _kinds(self) -> tuple[str, str]:
        return "mlp", "kv_heads" if "kv_heads" in self.parts else "attention"

    @property
    def _most(self) -> float:
        return self.keep * _parameters(self.sizes)

    def _spent(self, left_at: Callable[[int], list[Geometry]], steps: int) -> list[Geometry]:
        found = self._largest(left_at, steps)
        if set(self._kinds) - set(self.parts) or "kv_heads" not in self.parts:
            return found
        # Key-value heads are few and large: what they leave of the budget goes to the MLPs.
        return self._largest(
            lambda step: [replace(head, mlp=mlp.mlp) for head, mlp in zip(found, left_at(step), strict=True)], steps
        )

    def _largest(self, left_at: Callable[[int], list[Geometry]], steps: int) -> list[Geometry]:
        """The sizes of the last step that fits the budget; sizes grow with the step."""
        low, high = -1, steps
        while low < high:
            middle = (low + high + 1) // 2
            if _parameters(left_at(middle)) <= self._most:
                low = middle
            else:
                high = middle - 1
        if low < 0:
            raise self._too_small(_parameters(left_at(0)))
        return left_at(low)

    def _too_small(self, least: int) -> ValueError:
        return ValueError(
            f"parts={self.parts} keeps at least {least / _parameters(self.sizes):.3f} of the blocks' "
            f"parameters, got keep={self.keep}; raise keep, prune more parts, or lower round_to"
        )

    def _share(self, size: Geometry, fraction: float) -> Geometry:
        return self._with_shares(size, {kind: fraction for kind in self._kinds if kind in self.parts})

    def _above(self, ranked: list[Parts], threshold: float) -> list[Geometry]:
        """What is left when every unit whose score is at least the threshold stays, and at least one."""
        found = []
        for size, parts in zip(self.sizes, ranked, strict=True):
            shares = {}
            for kind in self._kinds:
                scores = [part.scores for part in _of_kind(parts, kind)]
                if scores:
                    shares[kind] = max(float((torch.cat(scores) >= threshold).double().mean()), 1e-6)
            found.append(self._with_shares(size, shares))
        return found

    def _with_shares(self, size: Geometry, shares: dict[str, float]) -> Geometry:
        left = size
        for kind, share in shares.items():
            left = _narrowed(left, kind, self._rounded(size, kind, share))
        return left

    def _rounded(self, size: Geometry, kind: str, fraction: float) -> int:
        head, mlp = self.steps or (None, None)
        if kind == "mlp":
            return size.mlp_width(fraction, mlp)
        return size.head_width(fraction, head) if kind == "attention" else size.kv_head_count(fraction)


def _count(size: Geometry, kind: str) -> int:
    return {"mlp": size.mlp, "attention": size.width, "kv_heads": size.kv_heads}[kind]


def _narrowed(size: Geometry, kind: str, count: int) -> Geometry:
    """The block with so many MLP channels, channels a head or key-value heads."""
    if kind == "mlp":
        return replace(size, mlp=count)
    if kind == "attention":
        return replace(size, width=count, rotary=size.rotated(count))
    return replace(size, heads=size.heads // size.kv_heads * count, kv_heads=count)


def _parameters(sizes: list[Geometry]) -> int:
    return sum(size.parameters(Kept()) for size in sizes)


def _parameters_of(size: Geometry, kind: str, count: int) -> int:
    shapes = _narrowed(size, kind, count).shapes(Kept())
    mlp = {size.holder(role) for role in MLP_ROLES if role in size.part_roles}
    return sum(n * k for role, (n, k) in shapes.items() if (role in mlp) == (kind == "mlp"))


def _of_kind(parts: Parts, kind: str) -> list[Ranked]:
    """The block's parts that are MLP channels, key-value heads, or ("attention") channels of heads."""
    heads = ("attention", "rotated", "passed", "values")
    named = {"mlp": ("mlp",), "kv_heads": ("kv_heads",), "attention": heads}[kind]
    return [part for name, part in parts.items() if name in named]


def _error_at(part: Ranked, fraction: float) -> float:
    assert part.error is not None
    count = part.order.shape[-1]
    return float(part.error[count - max(1, round(count * fraction))])
