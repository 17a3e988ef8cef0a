"""Packed zeros against loops over single entries."""

import numpy as np
import pytest
import torch

from pycompress.formats.zeros import pack24, pack_bitmap, unpack24, unpack_bitmap

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def two_of_four(rows, columns, dtype, seed=0):
    """A matrix with at most two non-zeros in every four columns, groups with one and with none among them."""
    rng = np.random.default_rng(seed)
    dense = np.zeros((rows, columns))
    for row in range(rows):
        for start in range(0, columns, 4):
            kept = rng.choice(4, size=rng.choice([0, 1, 2, 2, 2]), replace=False)
            dense[row, start + kept] = rng.normal(size=len(kept))
    return torch.from_numpy(dense).to(dtype)


def any_zeros(rows, columns, dtype, density=0.3, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < density)).to(dtype)


def tiles_of(matrix):
    """First row, number of rows and the numbers of each 16 rows, which are stored one tile behind the other."""
    flat = matrix.flatten()
    for first in range(0, len(matrix), 16):
        rows = min(16, len(matrix) - first)
        yield first, rows, flat[first * matrix.shape[1] : (first + rows) * matrix.shape[1]].tolist()


def read24(values, positions):
    """Entry by entry, as the format is defined."""
    dense = np.zeros((len(values), 2 * values.shape[1]))
    for (first, rows, numbers), (_, _, codes) in zip(tiles_of(values.double()), tiles_of(positions), strict=True):
        for row in range(rows):
            for group in range(values.shape[1] // 2):
                nibble = codes[group // 2 * rows + row] >> 4 * (group % 2) & 15
                assert nibble & 3 < nibble >> 2
                for which, column in enumerate((nibble & 3, nibble >> 2)):
                    dense[first + row, 4 * group + column] = numbers[2 * (group * rows + row) + which]
    return dense


def read_bitmap(values, bitmap, offsets, columns):
    dense = np.zeros((len(bitmap), 8 * bitmap.shape[1]))
    numbers = iter(values.tolist())
    for tile, (first, rows, stored) in enumerate(tiles_of(bitmap)):
        assert sum(byte.bit_count() for byte in stored) == int(offsets[tile + 1] - offsets[tile])
        for place, byte in enumerate(stored):
            word, row = divmod(place // 8, rows)
            for bit in range(8):
                if byte >> bit & 1:
                    dense[first + row, 64 * word + 8 * (place % 8) + bit] = next(numbers)
    assert next(numbers, None) is None
    assert not dense[:, columns:].any()
    return dense[:, :columns]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (16, 8), (35, 64), (0, 16), (2, 0)])
def test_pack24_stores_the_entries_its_format_names(dtype, shape):
    dense = two_of_four(*shape, dtype)
    values, positions = pack24(dense)
    assert (values.shape, positions.shape) == ((shape[0], shape[1] // 2), (shape[0], shape[1] // 8))
    assert (values.dtype, positions.dtype) == (dtype, torch.uint8)
    np.testing.assert_array_equal(read24(values, positions), dense.double())
    assert torch.equal(unpack24(values, positions), dense)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 40), (1, 1), (32, 64), (35, 130), (0, 16), (2, 0)])
def test_pack_bitmap_stores_the_entries_its_format_names(dtype, shape):
    dense = any_zeros(*shape, dtype)
    values, bitmap, offsets = pack_bitmap(dense)
    assert bitmap.shape == (shape[0], 8 * -(-shape[1] // 64))
    assert (values.dtype, bitmap.dtype, offsets.dtype) == (dtype, torch.uint8, torch.int32)
    assert values.shape == (int((dense != 0).sum()),)
    np.testing.assert_array_equal(read_bitmap(values, bitmap, offsets, shape[1]), dense.double())
    assert torch.equal(unpack_bitmap(values, bitmap, offsets, shape[1]), dense)


def test_bitmap_of_full_and_empty_tiles():
    dense = torch.zeros(50, 70)
    dense[16:32] = 1
    values, bitmap, offsets = pack_bitmap(dense)
    assert offsets.tolist() == [0, 0, 1120, 1120, 1120]
    assert torch.equal(unpack_bitmap(values, bitmap, offsets, 70), dense)


def test_2_to_4_takes_9_sixteenths_of_the_bytes_of_16_bit_floats():
    dense = two_of_four(16, 256, torch.bfloat16)
    assert sum(t.numel() * t.element_size() for t in pack24(dense)) == 0.5625 * dense.numel() * 2


def test_values_pass_gradients_both_ways():
    dense = two_of_four(4, 16, torch.float64).requires_grad_()
    values, positions = pack24(dense)
    (unpack24(values, positions) * torch.arange(16)).sum().backward()
    expected = torch.arange(16).expand(4, 16).double()
    kept = dense != 0
    assert torch.equal(dense.grad[kept], expected[kept])
    values, bitmap, offsets = pack_bitmap(dense.detach())
    values.requires_grad_()
    (unpack_bitmap(values, bitmap, offsets, 16) * torch.arange(16)).sum().backward()
    assert torch.equal(values.grad, expected[kept])  # up to 64 columns, a tile is as its rows are


def test_three_of_four_are_refused():
    dense = two_of_four(3, 16, torch.float32)
    dense[1, 8:12] = torch.tensor([1.0, 2.0, 0.0, 3.0])
    with pytest.raises(ValueError, match="row 1 has 3 non-zeros in columns 8 to 11"):
        pack24(dense)


@pytest.mark.parametrize("dense", [torch.zeros(3), torch.zeros(2, 8, dtype=torch.int32)])
def test_only_matrices_of_floats(dense):
    for pack in (pack24, pack_bitmap):
        with pytest.raises(ValueError, match=r"expected a matrix of floats \[N, K\]"):
            pack(dense)


def test_columns_come_in_eights():
    with pytest.raises(ValueError, match="multiple of 8 columns, got 12"):
        pack24(torch.zeros(2, 12))
