"""The channels of one block, and which rows and columns of its linears they are."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pycompress.architectures.description import Fused
from pycompress.architectures.subnet import Kept


@dataclass(frozen=True)
class Geometry:
    """The channels of one block, and which rows and columns of its linears they are.

    `heads` query heads read `kv_heads` key-value heads, each `width` channels wide; the first `rotary` channels of a
    head rotate in pairs `(j, j + rotary / 2)`. `mlp` channels, `hidden` inputs. Roles are q, k, v, o, gate, up, down in
    every architecture: where one linear holds several (`holder`), rows are rows of that linear.
    """

    heads: int
    kv_heads: int
    width: int
    rotary: int
    mlp: int
    hidden: int
    roles: tuple[str, ...]
    fused: tuple[Fused, ...] = ()

    def holder(self, role: str) -> str:
        """The linear of the architecture that holds `role`: "qkv" for "q" where the three are fused."""
        holders = [fused.role for fused in self.fused if role in fused.parts]
        if not holders and role not in self.roles:
            raise ValueError(f"the block has no {role!r}; it has {', '.join(self.part_roles)}")
        return holders[0] if holders else role

    def channel_rows(self, role: str) -> Tensor:
        """The row of each channel in the linear that holds `role`.

        `[heads, width]` for q, `[kv_heads, width]` for k and v, `[mlp]` for gate and up.
        """
        fused = next((fused for fused in self.fused if role in fused.parts), None)
        shape = self._channels(role)
        if fused is None:
            self.holder(role)
            return torch.arange(math.prod(shape)).view(shape)
        before = fused.parts[: fused.parts.index(role)]
        if fused.layout == "per_head":
            head = torch.arange(self.heads * len(fused.parts) * self.width).view(self.heads, -1, self.width)
            return head[:, len(before)]
        start = sum(math.prod(self._channels(part)) for part in before)
        return torch.arange(start, start + math.prod(shape)).view(shape)

    def channel_columns(self, role: str) -> Tensor:
        """The column of each channel: `[heads, width]` for o, `[mlp]` for down."""
        shape = self._channels(role)
        return torch.arange(math.prod(shape)).view(shape)

    @property
    def inner(self) -> int:
        """Channels that o reads: of all heads together."""
        return self.heads * self.width

    @property
    def qk_units(self) -> Tensor:
        """Channels of a query or key head that are kept or removed together.

        Pairs `[rotary / 2, 2]`, or single channels `[width, 1]` without rotary embeddings. Channels from `rotary` on
        do not rotate and are single ones too (`passed`).
        """
        if not self.rotary:
            return torch.arange(self.width)[:, None]
        half = self.rotary // 2
        return torch.stack([torch.arange(half), torch.arange(half, self.rotary)], 1)

    @property
    def passed(self) -> Tensor:
        """Channels of a query or key head that a rotary embedding passes through unrotated, `[width - rotary]`."""
        return torch.arange(self.rotary or self.width, self.width)

    def rows(self, role: str, kept: Kept) -> Tensor:
        """Rows of the linear `role` that stay, in their new order; of a fused linear's part, or of all of it."""
        fused = next((fused for fused in self.fused if role == fused.role), None)
        if fused is None:
            return self._select(role, self.channel_rows(role), kept).flatten()
        parts = [self._select(part, self.channel_rows(part), kept) for part in fused.parts]
        if fused.layout == "per_head":
            return torch.cat(parts, dim=-1).flatten()
        return torch.cat([part.flatten() for part in parts])

    def columns(self, role: str, kept: Kept) -> Tensor:
        """Columns of o or down that stay, in their new order."""
        return self._select(role, self.channel_columns(role), kept).flatten()

    def shapes(self, kept: Kept) -> dict[str, tuple[int, int]]:
        """`(N, K)` of each linear of the block once it is shrunk, by the architecture's own roles."""
        found = {}
        for role in self.roles:
            reads = role in ("o", "down")
            size = len(self.columns(role, kept) if reads else self.rows(role, kept))
            found[role] = (self.hidden, size) if reads else (size, self.hidden)
        return found

    def parameters(self, kept: Kept) -> int:
        """Weights of the block's linears that stay, biases apart."""
        return sum(rows * columns for rows, columns in self.shapes(kept).values())

    def mlp_width(self, fraction: float, round_to: int | None = None) -> int:
        """MLP channels to keep for about `fraction` of them: a multiple of `round_to`, or all.

        By default 64, 8 or 1: the largest of which there are at least four.
        """
        return _rounded(self.mlp, fraction, round_to or _step(self.mlp, (64, 8, 1)))

    def head_width(self, fraction: float, round_to: int | None = None) -> int:
        """Channels of a head to keep for about `fraction` of them: a multiple of `round_to`, or all.

        By default 8 or 2: the largest of which there are at least four. Raises `ValueError` for an odd `round_to`.
        """
        step = round_to or _step(self.width, (8, 2))
        if step % 2:
            raise ValueError(f"the width of heads is rounded to an even number, got round_to={step}")
        return _rounded(self.width, fraction, step)

    def kv_head_count(self, fraction: float) -> int:
        """Key-value heads to keep for about `fraction` of them."""
        return _rounded(self.kv_heads, fraction, 1)

    def rotated(self, width: int) -> int:
        """How many of `width` kept channels of a head should rotate: as large a part as of all; pairs, at least one."""
        if not self.rotary:
            return 0
        pairs = min(max(1, round(width / self.width * self.rotary / 2)), width // 2)
        fewest = width - (self.width - self.rotary)
        return max(2 * pairs, fewest + fewest % 2)

    def kept(self, kept: Kept) -> Geometry:
        """The geometry of the block that is left."""
        qk = None if kept.qk is None else kept.qk[0]
        return replace(
            self,
            heads=len(self._heads("q", kept)),
            kv_heads=len(self._heads("k", kept)),
            width=self.width if qk is None else len(qk),
            rotary=self.rotary if qk is None else int((qk < self.rotary).sum()),
            mlp=self.mlp if kept.mlp is None else len(kept.mlp),
        )

    def check(self, kept: Kept) -> None:
        """Raise `ValueError` for indices that this block does not have, or that cannot be kept without others."""
        for name, size in (("mlp", self.mlp), ("qk", self.width), ("vo", self.width), ("kv_heads", self.kv_heads)):
            index = getattr(kept, name)
            if index is not None and int(index.max()) >= size:
                raise ValueError(f"{name} keeps index {int(index.max())}, the block has {size}")
        heads = self.kv_heads if kept.kv_heads is None else len(kept.kv_heads)
        if kept.vo is not None and len(kept.vo) != heads:
            raise ValueError(f"vo has {len(kept.vo)} rows; give one a kept key-value head, {heads}")
        if kept.qk is not None and len(kept.qk) not in ({1} if self.rotary else {1, heads}):
            why = "1, since the rotary embedding is one for all heads" if self.rotary else f"1 or {heads}"
            raise ValueError(f"qk has {len(kept.qk)} rows; give {why}")
        if (kept.qk is None) != (kept.vo is None):
            given, other = ("qk", "vo") if kept.vo is None else ("vo", "qk")
            index = kept.qk if kept.vo is None else kept.vo
            if index is not None and index.shape[1] != self.width:
                raise ValueError(
                    f"{given} keeps {index.shape[1]} of {self.width} channels and {other} all of them; the heads of a "
                    f"block have one width, so keep as many of each"
                )
        if kept.qk is not None and self.rotary:
            rotated = kept.qk[0][kept.qk[0] < self.rotary]
            low, high = rotated[rotated < self.rotary // 2], rotated[rotated >= self.rotary // 2]
            if not torch.equal(low + self.rotary // 2, high):
                raise ValueError(
                    f"qk keeps channel j of a rotary pair (j, j + {self.rotary // 2}) without the other, got "
                    f"{rotated.tolist()}; keep or remove both"
                )
            if len(low) == 0:
                raise ValueError("qk keeps no channel that rotates; keep at least one pair")

    @property
    def part_roles(self) -> list[str]:
        """Roles of the block, those that a fused linear holds in its place."""
        fused = {fused.role: fused.parts for fused in self.fused}
        return [part for role in self.roles for part in fused.get(role, (role,))]

    def _channels(self, role: str) -> tuple[int, ...]:
        if role in ("gate", "up", "down"):
            return (self.mlp,)
        return (self.heads if role in ("q", "o") else self.kv_heads, self.width)

    def _heads(self, role: str, kept: Kept) -> Tensor:
        """The heads of `role` that stay: with a key-value head go the query heads that read it."""
        group = self.heads // self.kv_heads if role in ("q", "o") else 1
        kv_heads = torch.arange(self.kv_heads) if kept.kv_heads is None else kept.kv_heads
        return (kv_heads[:, None] * group + torch.arange(group)).flatten()

    def _select(self, role: str, index: Tensor, kept: Kept) -> Tensor:
        """Of `index`, one entry a channel, the entries of the channels that stay."""
        if role in ("gate", "up", "down"):
            return index if kept.mlp is None else index[kept.mlp]
        index = index[self._heads(role, kept)]
        channels = kept.qk if role in ("q", "k") else kept.vo
        if channels is None:
            return index
        rows = channels.repeat_interleave(len(index) // len(channels), 0)
        return index.gather(1, rows)


def _step(size: int, steps: tuple[int, ...]) -> int:
    return next((step for step in steps if size >= 4 * step), steps[-1])


def _rounded(size: int, fraction: float, step: int) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of channels to keep must be in (0, 1], got {fraction}")
    nearest = max(1, round(size * fraction / step)) * step
    return size if fraction == 1 else min(nearest, size)
