"""Products of one or a few tokens with a stored matrix, which is read once.

M tokens, K inputs, S rows of the matrix. Columns are split over programs where rows are too few to fill the device; the
partial sums lie in a float32 workspace, and whoever reads them adds them in a fixed order.

The matrix does not depend on the kernel before: where kernels may start early, its first tile is asked for before that
kernel is waited for, unless the matrix was written to since the last call.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from pycompress.kernels.codes import columns_of, halves_of, load_codes, storage_of, values_of
from pycompress.kernels.derived import derived
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class RowTile(NamedTuple):
    """Of the kernel for one token: rows and columns of a tile, programs that fill a multiprocessor, warps of each."""

    rows: int
    columns: int
    programs: int
    warps: int


class FewTile(NamedTuple):
    """Of the kernel for a few tokens; `stages` are tiles in flight."""

    rows: int
    columns: int
    programs: int
    warps: int
    stages: int


MOST_SPLITS = 16


@triton.jit
def _load_words(ptr, rows, first, stop, stride, PER_WORD: tl.constexpr, BLOCK_K: tl.constexpr):
    """Codes of the columns `first` to `first + BLOCK_K`, as 32-bit words of PER_WORD; zero from `stop` on."""
    offs = tl.multiple_of(first // PER_WORD, 4) + tl.arange(0, BLOCK_K // PER_WORD)[None, :]
    words = ptr.to(tl.pointer_type(tl.int32)) + rows[:, None].to(tl.int64) * (4 * stride) + offs
    return tl.load(words, mask=offs < tl.multiple_of(stop // PER_WORD, 4), other=0)


@triton.jit
def _four_of(x_ptr, offs, stop):
    """Four neighbours of `x` at 4 * `offs`, in the bits of an int64; zero from column `stop` on."""
    return tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + offs, mask=offs * 4 < stop, other=0)


@triton.jit
def _pair_at(words, BIT: tl.constexpr, MASK: tl.constexpr):
    """1024 plus the codes at BIT and 16 bits above it: the bits of float16 whose last ones are the code's."""
    pair = ((words >> BIT) & MASK) | 0x64006400
    low = (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True)
    high = (pair >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _value_at(four, j: tl.constexpr, dtype: tl.constexpr):
    """The j-th of four 16-bit floats."""
    return ((four >> (16 * j)) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True).to(tl.float32)


@triton.jit
def _of_four(words):
    """The sum of each four neighbours in a row, which one thread holds."""
    return tl.sum(tl.reshape(words, (words.shape[0], words.shape[1] // 4, 4)), axis=2)


@triton.jit
def _words_times_x(words, x_ptr, first, stop, PER_WORD: tl.constexpr, BLOCK_K: tl.constexpr):
    """For each four words the sum of their codes times the columns of `x`."""
    offs = tl.multiple_of(first // PER_WORD, 4) + tl.arange(0, BLOCK_K // PER_WORD)
    total = tl.zeros(words.shape, tl.float32)
    of_x = tl.zeros(words.shape, tl.float32)  # the same in all rows
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    MASK: tl.constexpr = 0x000F000F if PER_WORD == 8 else 0x00FF00FF
    ZERO: tl.constexpr = 1032.0 if PER_WORD == 8 else 1152.0
    if PER_WORD == 4:
        words = words ^ -2139062144  # 0x80808080: codes become positive
    for half in tl.static_range(PER_WORD // 4):
        # One byte of int4 holds the codes of two columns that are 16 apart, and a word those of four bytes.
        where = offs if PER_WORD == 4 else offs // 4 * 8 + offs % 4 + 4 * half
        four = tl.broadcast_to(_four_of(x_ptr, where, stop)[None, :], words.shape)
        for j in tl.static_range(2):
            low, high = _pair_at(words, 8 * j + 4 * half, MASK)
            x_low, x_high = _value_at(four, j, dtype), _value_at(four, j + 2, dtype)
            total += low * x_low
            total += high * x_high
            of_x += x_low + x_high
    return _of_four(total - ZERO * of_x)


@triton.jit
def _block_scales(scales_ptr, rows, first, stop, K, BLOCK_K: tl.constexpr):
    """The scale of each 32 columns of int4, whose group has 64."""
    blocks = first // 32 + tl.arange(0, BLOCK_K // 32)[None, :]
    scales = scales_ptr + rows[:, None].to(tl.int64) * tl.cdiv(K, 64) + blocks // 2
    return tl.load(scales, mask=blocks * 32 < stop, other=0.0).to(tl.float32)


@triton.jit
def _row_tile(weight_ptr, rows, first, stop, stride, STORAGE: tl.constexpr, WORDS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of the matrix as it is stored: floats, words of codes, or codes."""
    if WORDS:
        tile = _load_words(weight_ptr, rows, first, stop, stride, 8 if STORAGE == "int4" else 4, BLOCK_K)
    else:
        WIDTH: tl.constexpr = BLOCK_K // 2 if STORAGE == "int4" else BLOCK_K
        per_byte = 2 if STORAGE == "int4" else 1
        offs = first // per_byte + tl.arange(0, WIDTH)[None, :]
        mask = offs < stop // per_byte
        tile = tl.load(weight_ptr + rows[:, None].to(tl.int64) * stride + offs, mask=mask, other=0)
    return tile


@triton.jit
def _row_products(
    acc,
    tile,
    scales_ptr,
    x_ptr,
    rows,
    first,
    stop,
    K,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`acc` plus a tile's products, by its elements, bytes or four words; of int8 still without the row's scale."""
    if WORDS:
        total = _words_times_x(tile, x_ptr, first, stop, 8 if STORAGE == "int4" else 4, BLOCK_K)
        if STORAGE == "int4":
            total *= _block_scales(scales_ptr, rows, first, stop, K, BLOCK_K)
        acc += total
    else:
        for half in tl.static_range(HALVES):
            columns = columns_of(first, half, STORAGE, BLOCK_K)
            x = tl.load(x_ptr + columns, mask=columns < stop, other=0.0).to(tl.float32)
            if STORAGE == "int4":
                numbers = ((tile >> (4 * half)) & 15).to(tl.float32) - 8
                scales = scales_ptr + rows[:, None].to(tl.int64) * tl.cdiv(K, 64) + columns[None, :] // 64
                numbers *= tl.load(scales, mask=(columns < stop)[None, :], other=0.0).to(tl.float32)
            else:
                numbers = tile.to(tl.float32)
            acc += numbers * x[None, :]
    return acc


@triton.jit
def _row_kernel(
    x_ptr,  # [K]
    weight_ptr,  # [S, K]
    scales_ptr,
    channels_ptr,  # [S]
    bias_ptr,  # [S]
    out_ptr,  # [splits, S] in float32; FINAL: [S]
    S,
    K,
    K_SPLIT,
    stride,  # of a row, in floats, in codes, or in 16 bytes of words of codes
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    WORDS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FINAL: tl.constexpr,
    SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token: products are kept per column and added up once at the end.

    FINAL: y itself, with the bias, row s at channel `channels[s]` with SCATTER.
    """
    if PDL:
        gdc_launch_dependents()
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = tl.minimum(offs_s, S - 1)
    start = tl.program_id(1) * K_SPLIT
    stop = tl.minimum(start + K_SPLIT, K)
    if ALIGNED:
        start, stop = tl.multiple_of(start, 16), tl.multiple_of(stop, 16)
    if PDL and not EARLY:
        gdc_wait()
    tile = _row_tile(weight_ptr, rows, start, stop, stride, STORAGE, WORDS, BLOCK_K)
    if PDL and EARLY:
        gdc_wait()
    acc = tl.zeros((BLOCK_S, BLOCK_K // (16 if STORAGE == "int8" else 32) if WORDS else BLOCK_K // HALVES), tl.float32)
    for first in range(start, stop, BLOCK_K):
        ahead = _row_tile(weight_ptr, rows, first + BLOCK_K, stop, stride, STORAGE, WORDS, BLOCK_K)
        acc = _row_products(acc, tile, scales_ptr, x_ptr, rows, first, stop, K, STORAGE, HALVES, WORDS, BLOCK_K)
        tile = ahead
    total = tl.sum(acc, axis=1)
    if STORAGE == "int8":
        total *= tl.load(scales_ptr + rows).to(tl.float32)
    if FINAL:
        channels = tl.load(channels_ptr + rows).to(tl.int32) if SCATTER else rows
        if HAS_BIAS:
            total += tl.load(bias_ptr + channels).to(tl.float32)
        tl.store(out_ptr + channels, total.to(out_ptr.dtype.element_ty), mask=offs_s < S)
    else:
        tl.store(out_ptr + tl.program_id(1) * S + offs_s, total, mask=offs_s < S)


@triton.jit
def _gather_kernel(
    x_ptr,  # [M, K]
    index_ptr,  # [n]
    out_ptr,  # [M, n]
    n,
    stride_xm,
    PDL: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    if PDL:
        gdc_launch_dependents()
    if PDL and not EARLY:
        gdc_wait()
    offs = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = offs < n
    index = tl.load(index_ptr + offs, mask=mask, other=0).to(tl.int32)
    if PDL and EARLY:
        gdc_wait()
    m = tl.program_id(1).to(tl.int64)
    tl.store(out_ptr + m * n + offs, tl.load(x_ptr + m * stride_xm + index, mask=mask, other=0.0), mask=mask)


def gather(x: Tensor, index: Tensor) -> Tensor:
    """`x[:, index]` of `x [M, K]` with contiguous rows, `index [n]` int16 or int32."""
    out = torch.empty((len(x), len(index)), dtype=x.dtype, device=x.device)
    early = dependent(x.device)
    if out.numel():
        _gather_kernel[(triton.cdiv(len(index), 1024), len(x))](
            x,
            index,
            out,
            len(index),
            x.stride(0),
            PDL=early,
            EARLY=early and settled(index),
            BLOCK_N=1024,
            num_warps=4,
            launch_pdl=early,
        )
    return out


@triton.jit
def _few_kernel(
    x_ptr,  # [M, K]
    weight_ptr,  # [S, K]
    scales_ptr,
    out_ptr,  # [splits, S, BLOCK_M], float32
    M,
    S,
    K,
    K_SPLIT,
    stride_xm,
    STORAGE: tl.constexpr,
    HALVES: tl.constexpr,
    EVEN: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A few tokens: the weight is the tall operand, so that the tile of tokens may be narrow.

    EVEN: K is a multiple of BLOCK_K, and loads have no masks. Tokens from M on are the last one again.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    rows = tl.minimum(offs_s, S - 1)
    offs_m = tl.arange(0, BLOCK_M)
    x_rows = x_ptr + tl.minimum(offs_m, M - 1)[:, None].to(tl.int64) * stride_xm
    start = tl.program_id(1) * K_SPLIT
    acc = tl.full((BLOCK_S, BLOCK_M), 0, tl.float32)
    for first in tl.range(start, tl.minimum(start + K_SPLIT, K), BLOCK_K, num_stages=STAGES):
        if EVEN and STORAGE == "float":
            first = tl.multiple_of(first, BLOCK_K)
            offs_k = first + tl.arange(0, BLOCK_K)
            w = tl.load(weight_ptr + rows[:, None].to(tl.int64) * K + offs_k[None, :])
            x = tl.load(x_rows + offs_k[None, :])
            acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
        else:
            codes, scales = load_codes(weight_ptr, scales_ptr, rows, offs_s < S, first, K, STORAGE, BLOCK_K)
            for half in tl.static_range(HALVES):
                offs_k = columns_of(first, half, STORAGE, BLOCK_K)
                x = tl.load(x_rows + offs_k[None, :], mask=(offs_k < K)[None, :], other=0.0)
                w = values_of(codes, scales, half, STORAGE).to(x.dtype)
                acc = tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    out = out_ptr + (tl.program_id(1) * S + offs_s[:, None]) * BLOCK_M + offs_m[None, :]
    tl.store(out, acc, mask=(offs_s < S)[:, None])


@functools.lru_cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


@functools.lru_cache
def dependent(device: torch.device) -> bool:
    """Whether kernels may start while the one before them ends, and wait for it themselves (compute capability 9)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


class _Calls:
    """How often a tensor was read since it was last written to."""

    count = 0

    def __init__(self, tensor: Tensor) -> None:
        pass


def settled(*tensors: Tensor | None) -> bool:
    """Whether all tensors were read before and not written to since: no kernel at work may be writing to them."""
    found = [derived(tensor, _Calls) for tensor in tensors if tensor is not None]
    for calls in found:
        calls.count += 1
    return all(calls.count > 1 for calls in found)


def splits_of(tiles: int, K: int, columns: int, wanted: int, most: int = MOST_SPLITS) -> tuple[int, int]:
    """How many programs share the columns of a tile of rows, and the columns of each, whole tiles: `wanted` in all."""
    splits = max(1, min(wanted // tiles, triton.cdiv(K, columns), most))
    each = triton.cdiv(triton.cdiv(K, splits), columns) * columns
    return triton.cdiv(K, each), each


def row_tile(storage: str) -> RowTile:
    """The tile of one token's product."""
    return {"float": RowTile(4, 1024, 10, 4), "int8": RowTile(8, 2048, 8, 4), "int4": RowTile(8, 2048, 8, 4)}[storage]


def row_product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    out: Tensor | None = None,
    channels: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`x [1, K]` times `weight [S, K]` transposed, as parts `[splits, S, 1]` in float32; with `out [1, S]`, y itself.

    Into `out` the bias is added, and row s goes to `channels[s]` where there are channels. The tensors are contiguous.
    """
    (S, K), storage = (weight.shape[0], x.shape[1]), storage_of(weight)
    if not S * K:
        if out is None:
            return torch.zeros((1, S, 1), dtype=torch.float32, device=x.device)
        return out.zero_() if bias is None else out.copy_(bias)
    tile = row_tile(storage)
    columns = min(tile.columns, max(64, triton.next_power_of_2(K)))
    tiles = triton.cdiv(S, tile.rows)
    splits, k_split = splits_of(tiles, K, columns, tile.programs * processors(x.device)) if out is None else (1, K)
    parts = torch.empty((splits, S, 1), dtype=torch.float32, device=x.device) if out is None else out
    aligned = K % 16 == 0
    on_words = storage != "float" and x.element_size() == 2 and aligned
    on_words = on_words and all(t.data_ptr() % 16 == 0 for t in (x, weight))
    _row_kernel[(tiles, splits)](
        x,
        weight,
        *(x if t is None else t for t in (scales, channels, bias)),
        parts,
        S,
        K,
        k_split,
        weight.shape[1] // 16 if on_words else weight.shape[1],
        STORAGE=storage,
        HALVES=halves_of(storage),
        WORDS=on_words,
        ALIGNED=aligned,
        FINAL=out is not None,
        SCATTER=channels is not None,
        HAS_BIAS=bias is not None,
        PDL=dependent(x.device),
        EARLY=dependent(x.device) and settled(weight),
        BLOCK_S=tile.rows,
        BLOCK_K=columns,
        num_warps=tile.warps,
        launch_pdl=dependent(x.device),
    )
    return parts


def few_tile(M: int, itemsize: int, storage: str) -> FewTile:
    """The tile of a few tokens' product: two operands must leave registers for the sums."""
    if itemsize == 2:
        if M > 16:
            return FewTile(64, 64, 2, 8, 3)
        tiles = {
            "float": FewTile(64, 128, 1, 4, 4),
            "int8": FewTile(64, 256, 2, 4, 3),
            "int4": FewTile(64, 128, 2, 4, 3),
        }
        return tiles[storage]
    return FewTile(64, 64 if storage == "int4" else 32, 2, 4 if M <= 16 else 8, 2)


def few_product(x: Tensor, weight: Tensor, scales: Tensor | None = None) -> Tensor:
    """`x [M, K]` times `weight [S, K]` transposed, as parts `[splits, S, at least M]` in float32, for a few tokens."""
    (M, K), S, storage = x.shape, weight.shape[0], storage_of(weight)
    block_m = max(16, triton.next_power_of_2(M))
    if not S * K:
        return torch.zeros((1, S, block_m), dtype=torch.float32, device=x.device)
    tile = few_tile(M, x.element_size(), storage)
    tiles = triton.cdiv(S, tile.rows)
    splits, k_split = splits_of(
        tiles, K, tile.columns, tile.programs * processors(x.device), MOST_SPLITS * 16 // block_m
    )
    parts = torch.empty((splits, S, block_m), dtype=torch.float32, device=x.device)
    _few_kernel[(tiles, splits)](
        x,
        weight,
        x if scales is None else scales,
        parts,
        M,
        S,
        K,
        k_split,
        x.stride(0),
        STORAGE=storage,
        HALVES=halves_of(storage),
        EVEN=K % tile.columns == 0,
        PDL=dependent(x.device),
        BLOCK_M=block_m,
        BLOCK_S=tile.rows,
        BLOCK_K=tile.columns,
        STAGES=tile.stages,
        PRECISION=precision(x.dtype),
        num_warps=tile.warps,
        launch_pdl=dependent(x.device),
    )
    return parts


def precision(dtype: torch.dtype) -> str:
    return "tf32x3" if dtype == torch.float32 else "ieee"
