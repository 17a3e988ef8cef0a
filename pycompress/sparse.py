"""Matrices with zeros stored without them: two of every four columns, or a bit for every column.

`sparse24`: of columns `4g .. 4g + 3` of a row two are kept. `values [N, K / 2]`; `positions [N, K / 8]` uint8 holds a
nibble for each group, the even group's in the low half: the first column's offset within its group in bits 0 and 1, the
second's in bits 2 and 3, the first below the second. 56.25% of the bytes of a matrix of 16-bit floats.

`bitmap`: any columns are kept. `values [count]` row by row; `bitmap [N, 8 * ceil(K / 64)]` uint8 where bit `c % 8` of
byte `c // 8` is set where column c is kept; `offsets [N + 1]` int32 where the values of each row start.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 4
WORD = 64
MOST_VALUES = torch.iinfo(torch.int32).max
TOO_MANY = 255


def _position_codes() -> list[int]:
    """The nibble for each of the 16 sets of non-zeros in a group; zeros at the lowest columns fill a pair up."""
    codes = []
    for kept in range(1 << GROUP):
        columns = [column for column in range(GROUP) if kept >> column & 1]
        spare = [column for column in range(GROUP) if column not in columns]
        first, second, *more = sorted(columns + spare[: max(0, 2 - len(columns))])
        codes.append(TOO_MANY if more else first | second << 2)
    return codes


POSITION_CODES = _position_codes()


def pack24(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Values `[N, K / 2]` and positions `[N, K / 8]` uint8 of `dense [N, K]`, with K a multiple of 8.

    Every group of four columns holds at most two non-zeros, or `ValueError`. Differentiable in `dense`.
    """
    _check_matrix(dense)
    rows, columns = dense.shape
    if columns % (2 * GROUP):
        raise ValueError(
            f"a 2:4 matrix has a multiple of 8 columns, got {columns}; pad it with columns of zeros, or keep it dense"
        )
    groups = dense.reshape(rows, columns // GROUP, GROUP)
    kept = groups.detach() != 0
    sets = (kept.to(torch.uint8) << torch.arange(GROUP, dtype=torch.uint8, device=dense.device)).sum(-1)
    codes = torch.tensor(POSITION_CODES, dtype=torch.uint8, device=dense.device)[sets]
    if bool((codes == TOO_MANY).any()):
        row, group = (codes == TOO_MANY).nonzero()[0].tolist()
        raise ValueError(
            f"row {row} has {int(kept[row, group].sum())} non-zeros in columns {GROUP * group} to "
            f"{GROUP * group + GROUP - 1}; a 2:4 matrix has at most two of every four: set the others to zero first"
        )
    positions = codes[:, 0::2] | codes[:, 1::2] << 4
    return gather24(dense, positions), positions


def unpack24(values: Tensor, positions: Tensor) -> Tensor:
    """The matrix `[N, K]`, in the dtype of `values [N, K / 2]`, that `pack24` packed. Differentiable in `values`."""
    kept = _pairs(positions)
    return values.new_zeros(*kept.shape[:2], GROUP).scatter(-1, kept, values.reshape(kept.shape)).flatten(1)


def gather24(dense: Tensor, positions: Tensor) -> Tensor:
    """The entries `[N, K / 2]` of `dense [N, K]` at the positions `[N, K / 8]`. Differentiable in `dense`."""
    kept = _pairs(positions)
    return dense.reshape(*kept.shape[:2], GROUP).gather(-1, kept).flatten(1)


def _pairs(positions: Tensor) -> Tensor:
    """The two offsets within each group, `[N, K / 4, 2]` int64."""
    offsets = torch.stack([positions >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return offsets.reshape(len(positions), 2 * positions.shape[1], 2).long()


def pack_bitmap(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[count]`, bitmap `[N, 8 * ceil(K / 64)]` uint8 and offsets `[N + 1]` int32 of `dense [N, K]`.

    Fewer than 2^31 non-zeros, or `ValueError`. Differentiable in `dense`.
    """
    _check_matrix(dense)
    kept = dense.detach() != 0
    offsets = F.pad(kept.sum(1).cumsum(0), (1, 0))
    if int(offsets[-1]) > MOST_VALUES:
        raise ValueError(
            f"{int(offsets[-1])} non-zeros are too many for one bitmap matrix (at most {MOST_VALUES}); split its rows"
        )
    bits = F.pad(kept.to(torch.uint8), (0, -dense.shape[1] % WORD)).unflatten(1, (-1, 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=dense.device)
    bitmap = (bits << shifts).sum(-1).to(torch.uint8)
    return dense[kept], bitmap, offsets.to(torch.int32)


def unpack_bitmap(values: Tensor, bitmap: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """The matrix `[N, columns]`, in the dtype of `values [count]`, that `pack_bitmap` packed.

    Differentiable in `values`. `offsets` is not read: the bits say as much.
    """
    kept = kept_columns(bitmap, columns)
    return torch.zeros_like(kept, dtype=values.dtype).masked_scatter(kept, values)


def bitmap_bytes(columns: int) -> int:
    """Bytes of a row of a bitmap."""
    return 8 * -(-columns // WORD)


def kept_columns(bitmap: Tensor, columns: int) -> Tensor:
    """Which of the columns are kept, `[N, columns]` bool."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    bits = (bitmap[..., None] >> shifts & 1).flatten(1)
    return bits[:, :columns].bool()


def _check_matrix(dense: Tensor) -> None:
    if dense.dim() != 2 or not dense.is_floating_point():
        raise ValueError(f"expected a matrix of floats [N, K], got {dense.dtype} {list(dense.shape)}")
