"""Matrices with zeros stored without them: two of every four columns, or a bit for every column.

Rows are stored 16 at a time, in the order in which a product reads them: a tile is what its rows have in some columns,
then what they have in the next ones. The last tile may have fewer rows.

`sparse24`: of columns `4g .. 4g + 3` of a row two are kept. `values [N, K / 2]` holds for each tile a pair for each of
its rows, for the first group of columns, then for the next. `positions [N, K / 8]` uint8 likewise, a byte for two
groups: a nibble each, the even group's in the low half, with the first column's offset within its group in bits 0 and 1
and the second's in bits 2 and 3, the first below the second. 56.25% of the bytes of a matrix of 16-bit floats.

`bitmap`: any columns are kept. `bitmap [N, 8 * ceil(K / 64)]` uint8 holds for each tile 8 bytes for each row, for the
first 64 columns, then for the next; bit `c % 8` of byte `c // 8` of the 8 is set where column c of the 64 is kept.
`values [count]` are in the order of the bits; `offsets [ceil(N / 16) + 1]` int32 where those of each tile start.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 16
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
    positions = tiled(codes[:, 0::2] | codes[:, 1::2] << 4, 1)
    return gather24(dense, positions), positions


def unpack24(values: Tensor, positions: Tensor) -> Tensor:
    """The matrix `[N, K]`, in the dtype of `values [N, K / 2]`, that `pack24` packed. Differentiable in `values`."""
    kept = _pairs(positions)
    pairs = untiled(values, 2).reshape(kept.shape)
    return values.new_zeros(*kept.shape[:2], GROUP).scatter(-1, kept, pairs).flatten(1)


def gather24(dense: Tensor, positions: Tensor) -> Tensor:
    """The values `[N, K / 2]` of `dense [N, K]` at the positions `[N, K / 8]`. Differentiable in `dense`."""
    kept = _pairs(positions)
    return tiled(dense.reshape(*kept.shape[:2], GROUP).gather(-1, kept).flatten(1), 2)


def _pairs(positions: Tensor) -> Tensor:
    """The two offsets within each group of each row, `[N, K / 4, 2]` int64."""
    positions = untiled(positions, 1)
    offsets = torch.stack([positions >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1)
    return offsets.reshape(len(positions), 2 * positions.shape[1], 2).long()


def pack_bitmap(dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values `[count]`, bitmap `[N, 8 * ceil(K / 64)]` uint8 and offsets `[ceil(N / 16) + 1]` int32 of `dense [N, K]`.

    Fewer than 2^31 non-zeros, or `ValueError`. Differentiable in `dense`.
    """
    _check_matrix(dense)
    dense = tiled(F.pad(dense, (0, -dense.shape[1] % WORD)), WORD)
    kept = dense.detach() != 0
    offsets = tile_offsets(kept)
    if int(offsets[-1]) > MOST_VALUES:
        raise ValueError(
            f"{int(offsets[-1])} non-zeros are too many for one bitmap matrix (at most {MOST_VALUES}); split its rows"
        )
    bits = kept.to(torch.uint8).reshape(len(dense), dense.shape[1] // 8, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=dense.device)
    bitmap = (bits << shifts).sum(-1).to(torch.uint8)
    return dense[kept], bitmap, offsets.to(torch.int32)


def unpack_bitmap(values: Tensor, bitmap: Tensor, offsets: Tensor, columns: int) -> Tensor:
    """The matrix `[N, columns]`, in the dtype of `values [count]`, that `pack_bitmap` packed.

    Differentiable in `values`. `offsets` is not read: the bits say as much.
    """
    kept = kept_entries(bitmap)
    dense = torch.zeros_like(kept, dtype=values.dtype).masked_scatter(kept, values)
    return untiled(dense, WORD)[:, :columns].contiguous()


def gather_bitmap(dense: Tensor, bitmap: Tensor, count: int) -> Tensor:
    """The values `[count]` of `dense [N, K]` where the bits are set. Differentiable in `dense`."""
    # How many entries a boolean index takes is not known to a compiler; `count` says it.
    places = kept_entries(bitmap).flatten().nonzero_static(size=count).squeeze(1)
    return tiled(F.pad(dense, (0, -dense.shape[1] % WORD)), WORD).flatten().index_select(0, places)


def bitmap_bytes(columns: int) -> int:
    """Bytes of a row of a bitmap."""
    return 8 * -(-columns // WORD)


def kept_entries(bitmap: Tensor) -> Tensor:
    """Which entries are kept, `[N, 64 * ceil(K / 64)]` bool, in the order of the bits."""
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return (bitmap[..., None] >> shifts & 1).flatten(1).bool()


def tiled(rows: Tensor, unit: int) -> Tensor:
    """The entries of `rows [N, C]` in the order of the tiles, `[N, C]`; `unit` neighbours of a row stay together."""
    return _order_tiles(rows, lambda part: part.unflatten(2, (part.shape[2] // unit, unit)))


def untiled(entries: Tensor, unit: int) -> Tensor:
    """The rows `[N, C]` whose entries `tiled` put in order."""
    return _order_tiles(entries, lambda part: part.reshape(len(part), part.shape[2] // unit, part.shape[1], unit))


def _order_tiles(matrix: Tensor, units: Callable[[Tensor], Tensor]) -> Tensor:
    """The whole tiles `[tiles, TILE, C]` and the rows of the last one, each with two axes of `units` exchanged."""
    whole = len(matrix) // TILE
    parts = matrix[: whole * TILE].unflatten(0, (whole, TILE)), matrix[whole * TILE :][None]
    return torch.cat([units(part).transpose(1, 2).reshape(part.shape).flatten(0, 1) for part in parts])


def tile_offsets(kept: Tensor) -> Tensor:
    """How many entries are kept before each tile and in all, `[ceil(N / 16) + 1]` int64, of `kept_entries`."""
    counts = F.pad(kept.sum(1), (0, -len(kept) % TILE)).unflatten(0, (tiles(len(kept)), TILE)).sum(1)
    return F.pad(counts.cumsum(0), (1, 0))


def are_pairs(positions: Tensor) -> bool:
    """Whether each nibble is two offsets within a group, the first below the second."""
    return all(bool(((pair & 3) < (pair >> 2 & 3)).all()) for pair in (positions, positions >> 4))


def bit_offsets(bitmap: Tensor) -> Tensor:
    """`tile_offsets` of a bitmap's entries, by the bits of each byte."""
    counts = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.uint8, device=bitmap.device)
    rows = untiled(bitmap, 8)
    return tile_offsets(counts.index_select(0, rows.flatten().int()).view(rows.shape))


def has_bits_beyond(bitmap: Tensor, columns: int) -> bool:
    """Whether a bit is set past the columns of a row, in its last word."""
    used = (columns - 1) % WORD + 1
    shifts = [min(max(used - 8 * byte, 0), 8) for byte in range(8)]
    last = untiled(bitmap, 8)[:, -8:]
    return used < WORD and bool((last >> torch.tensor(shifts, dtype=torch.uint8, device=bitmap.device)).any())


def tiles(rows: int) -> int:
    """In how many tiles so many rows are stored."""
    return -(-rows // TILE)


def _check_matrix(dense: Tensor) -> None:
    if dense.dim() != 2 or not dense.is_floating_point():
        raise ValueError(f"expected a matrix of floats [N, K], got {dense.dtype} {list(dense.shape)}")
