"""Layers over 2:4 and bitmap weights against the dense product in float64, at every instruction-set level."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress import _ext
from pycompress.formats.zeros import pack24, pack_bitmap
from pycompress.ops import bitmap_linear, sparse24_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = (1, 2, 3, 4, 5, 16, 17, 33, 100, 150)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def exactly_two_of_four(n: int, k: int, dtype: torch.dtype) -> Tensor:
    ranks = torch.rand(n, k // 4, 4, generator=torch.Generator().manual_seed(n + k)).argsort(-1)
    return draw(n, k, dtype=dtype) * (ranks < 2).view(n, k)


def two_of_four(n: int, k: int, dtype: torch.dtype) -> Tensor:
    """At most two of every four: some groups have fewer non-zeros."""
    return exactly_two_of_four(n, k, dtype).where(draw(n, k, seed=1) < 1, 0)


def any_zeros(n: int, k: int, dtype: torch.dtype, density: float = 0.25) -> Tensor:
    """Random zeros, an empty row and a full one among the rows."""
    kept = torch.rand(n, k, generator=torch.Generator().manual_seed(n + k)) < density
    kept[n // 2], kept[n // 3] = False, True
    return draw(n, k, dtype=dtype) * kept


@dataclass(frozen=True)
class Form:
    """One of the two layers: weights with its zeros, how they are packed, the layer, and sizes that try its borders."""

    weight: Callable[[int, int, torch.dtype], Tensor]
    pack: Callable[[Tensor], tuple[Tensor, ...]]
    layer: Callable[..., Tensor]
    op: str
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        return self.op


FORMS = [
    Form(
        two_of_four,
        pack24,
        sparse24_linear,
        "sparse24_linear",
        ((64, 128), (63, 1000), (5, 8), (33, 72), (17, 1096), (1040, 72), (523, 72)),
    ),
    Form(
        any_zeros,
        pack_bitmap,
        bitmap_linear,
        "bitmap_linear",
        ((64, 128), (63, 1000), (5, 7), (33, 65), (17, 1100), (1040, 65), (523, 70)),
    ),
]
each_form = pytest.mark.parametrize("form", FORMS, ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@each_form
def test_error_is_at_most_twice_torchs(level: str, form: Form, dtype: torch.dtype) -> None:
    for n, k in form.sizes:
        dense, bias = form.weight(n, k, dtype) / k**0.5, draw(n, dtype=dtype)
        packed = form.pack(dense)
        for tokens in TOKENS:
            x, its_bias = draw(tokens, k, dtype=dtype), bias if tokens % 2 else None
            exact = F.linear(x.double(), dense.double(), None if its_bias is None else its_bias.double())
            y = form.layer(x, *packed, its_bias)
            assert y.dtype == dtype
            error, torchs = ((got.double() - exact).norm() for got in (y, F.linear(x, dense, its_bias)))
            assert error <= 2 * torchs + 1e-6 * exact.norm()


@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_a_bitmap_of_any_density(level: str, density: float) -> None:
    kept = torch.rand(40, 300, generator=torch.Generator().manual_seed(0)) < density
    for dtype in DTYPES:
        dense = draw(40, 300, dtype=dtype) * kept
        for tokens in (1, 3, 40):
            x = draw(tokens, 300, dtype=dtype)
            exact = x.double() @ dense.double().T
            error = (bitmap_linear(x, *pack_bitmap(dense)).double() - exact).norm()
            assert error <= 2 * (F.linear(x, dense).double() - exact).norm() + 1e-6 * exact.norm()


@each_form
def test_every_element_is_written_and_nothing_stale_is_read(
    level: str, form: Form, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in the outputs, around the inputs, behind the packed tensors, and in the buffers of an earlier call."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for n, k in form.sizes:
        dense, bias = form.weight(n, k, torch.float32), draw(n)
        values, *places = form.pack(dense)
        around = torch.full((values.numel() + 64,), torch.nan)
        around[: values.numel()] = values.flatten()
        filled = [torch.cat([t.flatten(), torch.full((64,), 255, dtype=t.dtype)]) for t in places]
        packed = [around[: values.numel()].view(values.shape)]
        packed += [whole[: t.numel()].view(t.shape) for whole, t in zip(filled, places, strict=True)]
        wide = torch.full((40, k + 90), torch.nan)
        for tokens in (1, 7, 40):
            form.layer(wide[:tokens, :k], *packed, bias)
            x = wide.clone()[:tokens, 30 : 30 + k]
            x.copy_(draw(tokens, k))
            y = form.layer(x, *packed, bias)
            torch.testing.assert_close(y.double(), x.double() @ dense.double().T + bias, rtol=0, atol=1e-4)


@each_form
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_past_the_end_of_memory(level: str, form: Form, dtype: torch.dtype) -> None:
    """Values that end where their last page does: reading on would be a fault."""
    n, k = form.sizes[1]
    dense = form.weight(n, k, dtype)
    values, *places = form.pack(dense)
    size = values.numel() * values.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    with mmap.mmap(-1, pages) as memory:
        at_end = torch.frombuffer(memory, dtype=dtype, count=values.numel(), offset=pages - size)
        at_end.copy_(values.flatten())
        for tokens in (1, 4, 40):
            x = draw(tokens, k, dtype=dtype)
            assert torch.equal(form.layer(x, at_end.view(values.shape), *places), form.layer(x, values, *places))
        del at_end


@each_form
@pytest.mark.parametrize("tokens", [1, 5, 40])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(level: str, form: Form, tokens: int) -> None:
    packed, x = form.pack(form.weight(707, 504, torch.bfloat16)), draw(tokens, 504, dtype=torch.bfloat16)
    threads, first = torch.get_num_threads(), form.layer(x, *packed)
    try:
        for count in (1, threads + 1, threads + 2):
            torch.set_num_threads(count)
            assert torch.equal(form.layer(x, *packed), first)
    finally:
        torch.set_num_threads(threads)


@each_form
@pytest.mark.parametrize("tokens", [1, 33])
def test_layout_and_leading_sizes_of_x_do_not_matter(form: Form, tokens: int) -> None:
    packed, bias = form.pack(form.weight(63, 104, torch.bfloat16)), draw(63, dtype=torch.bfloat16)
    wide = draw(2, tokens, 300, dtype=torch.bfloat16)
    expected = form.layer(wide[..., 50:154].reshape(-1, 104).clone(), *packed, bias)
    for x in (wide[..., 50:154], wide[..., 50:154].contiguous(), wide[..., 50:154].mT.contiguous().mT):
        y = form.layer(x, *packed, bias)
        assert y.shape == (2, tokens, 63)
        assert torch.equal(y.reshape(-1, 63), expected)
    assert torch.equal(form.layer(wide[0, 0, :104], *packed), form.layer(wide[0, :1, :104], *packed)[0])


@each_form
def test_empty_sizes_give_empty_results_or_the_bias(level: str, form: Form) -> None:
    packed, bias = form.pack(form.weight(6, 8, torch.float32)), draw(6)
    assert form.layer(torch.zeros(2, 0, 8), *packed, bias).shape == (2, 0, 6)
    assert form.layer(torch.zeros(2, 8), *form.pack(torch.zeros(0, 8))).shape == (2, 0)
    assert torch.equal(form.layer(torch.zeros(2, 0), *form.pack(torch.zeros(6, 0)), bias), bias.expand(2, 6))


@each_form
def test_gradients_are_those_of_finite_differences(form: Form) -> None:
    values, *places = form.pack(form.weight(5, 8, torch.float64))
    x, bias = (t.double().requires_grad_() for t in (draw(2, 1, 8), draw(5)))
    values.requires_grad_()

    def layer(x: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        return form.layer(x, values, *places, bias)

    assert torch.autograd.gradcheck(layer, (x, values, bias))
    assert torch.autograd.gradgradcheck(layer, (x, values, bias))


@each_form
def test_gradients_of_float32_are_those_of_the_dense_formula(level: str, form: Form) -> None:
    dense, bias = exactly_two_of_four(63, 104, torch.float32).requires_grad_(), draw(63).requires_grad_()
    x, exact_dense = draw(20, 104).requires_grad_(), dense.detach().double().requires_grad_()
    exact_y = F.linear(x.double(), exact_dense, bias.double())
    exact = torch.autograd.grad(exact_y.square().sum(), (x, exact_dense, bias))
    got = torch.autograd.grad(form.layer(x, *form.pack(dense), bias).square().sum(), (x, dense, bias))
    for ours, theirs in ((got[0], exact[0]), (got[1], exact[1] * (dense != 0)), (got[2], exact[2])):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@each_form
def test_opcheck(form: Form) -> None:
    values, *places = form.pack(form.weight(7, 16, torch.float32))
    op, bias = getattr(torch.ops.pycompress, form.op).default, draw(7).requires_grad_()
    torch.library.opcheck(op, (draw(2, 3, 16).requires_grad_(), values.requires_grad_(), *places, bias))
    torch.library.opcheck(op, (draw(3, 16), values.detach(), *places, None))


@each_form
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_it_does_for_a_dense_layer(
    under_autocast: Callable[..., tuple[tuple[Tensor, Tensor], ...]], form: Form, dtype: torch.dtype
) -> None:
    dense, bias = form.weight(63, 104, torch.float32), draw(63)
    packed = form.pack(dense)
    pairs = under_autocast(
        lambda x: form.layer(x, *packed, bias), lambda x: F.linear(x, dense, bias), draw(9, 104, dtype=dtype)
    )
    assert pairs[0][0].dtype == pairs[0][1].dtype == torch.bfloat16
    assert pairs[1][0].dtype == dtype
    for got, want in pairs:
        assert (got - want).norm() <= 0.02 * want.norm()


def test_wrong_2_to_4_input_is_named() -> None:
    x, (values, positions) = torch.zeros(2, 16), pack24(torch.zeros(7, 16))
    with pytest.raises(TypeError, match=r"share one dtype, got torch\.float32, torch\.bfloat16: convert x first"):
        sparse24_linear(x, values.bfloat16(), positions)
    with pytest.raises(TypeError, match=r"positions must be uint8, got torch\.int32"):
        sparse24_linear(x, values, positions.int())
    with pytest.raises(ValueError, match=r"values must be \[N, K / 2\].*got \[7, 8\] and \[7, 1\]"):
        sparse24_linear(x, values, positions[:, :1])
    with pytest.raises(ValueError, match=r"x must have 16 features in its last dimension, got \[2, 15\]"):
        sparse24_linear(x[:, :15], values, positions)
    with pytest.raises(ValueError, match=r"bias must be \[7\], one for each row, got \[3\]"):
        sparse24_linear(x, values, positions, torch.zeros(3))


def test_wrong_bitmap_input_is_named() -> None:
    x, (values, bitmap, offsets) = torch.zeros(2, 70), pack_bitmap(torch.ones(7, 70))
    with pytest.raises(TypeError, match=r"offsets must be int32, got torch\.int64"):
        bitmap_linear(x, values, bitmap, offsets.long())
    with pytest.raises(ValueError, match=r"offsets \[ceil\(N / 16\) \+ 1\], got \[490\], \[7, 16\] and \[1\]"):
        bitmap_linear(x, values, bitmap, offsets[:1])
    with pytest.raises(ValueError, match=r"x of 64 features needs a bitmap of 8 bytes a row, got 16"):
        bitmap_linear(x[:, :64], values, bitmap, offsets)
    with pytest.raises(ValueError, match=r"bias must be \[7\]"):
        bitmap_linear(x, values, bitmap, offsets, torch.zeros(3))


@pytest.mark.skipif(_ext.C is None, reason=f"no native module: {_ext.why}")
def test_offsets_that_leave_the_values_are_refused() -> None:
    x, (values, bitmap, offsets) = torch.zeros(2, 70), pack_bitmap(torch.ones(50, 70))
    for tile, wrong in ((0, 1), (2, -1), (2, 3000), (4, 3501)):
        changed = offsets.clone()
        changed[tile] = wrong
        with pytest.raises(IndexError, match="to the number of values, 3500, by at most 1120 for 16 rows"):
            bitmap_linear(x, values, bitmap, changed)


DTYPES_OF_BOTH = [torch.float32, torch.float64]  # the kernel's, the reference's


@pytest.mark.parametrize("dtype", DTYPES_OF_BOTH)
@pytest.mark.parametrize("tokens", [1, 30])
def test_a_bitmap_of_more_bits_than_values_is_refused(tokens: int, dtype: torch.dtype) -> None:
    values, bitmap, offsets = pack_bitmap(torch.ones(40, 100, dtype=dtype))
    x = torch.ones(tokens, 100, dtype=dtype)
    for call in (bitmap_linear, torch.ops.pycompress.bitmap_linear):
        for fewer, moved in ((values[:-7], offsets), (values[:-7], offsets.clamp(max=len(values) - 7))):
            with pytest.raises(ValueError, match="bitmap must have a bit for each of the 3993 values, got 4000 bits"):
                call(x, fewer, bitmap, moved, None)


@pytest.mark.parametrize("dtype", DTYPES_OF_BOTH)
def test_bits_beyond_the_columns_are_refused(dtype: torch.dtype) -> None:
    values, bitmap, offsets = pack_bitmap(torch.ones(3, 100, dtype=dtype))
    wider, *_ = pack_bitmap(torch.ones(3, 101, dtype=dtype))
    _, beyond, ends = pack_bitmap(torch.ones(3, 101, dtype=dtype))
    with pytest.raises(ValueError, match="bitmap must be zero beyond bit 100 of a row"):
        bitmap_linear(torch.ones(2, 100, dtype=dtype), wider, beyond, ends)
    torch.testing.assert_close(
        bitmap_linear(torch.ones(2, 100, dtype=dtype), values, bitmap, offsets), torch.full((2, 3), 100.0, dtype=dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES_OF_BOTH)
def test_bits_and_positions_are_checked_again_when_they_are_written_to(dtype: torch.dtype) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    values, bitmap, offsets = pack_bitmap(torch.ones(3, 64, dtype=dtype))
    bitmap_linear(x, values, bitmap, offsets)
    bitmap[1, 3] = 0
    with pytest.raises(ValueError, match="bitmap must have a bit for each of the 192 values, got 184 bits"):
        bitmap_linear(x, values, bitmap, offsets)
    values, positions = pack24(torch.tensor([1.0, 0, 0, 1]).repeat(3, 16).to(dtype))
    sparse24_linear(x, values, positions)
    positions[2, 1] = 0
    with pytest.raises(ValueError, match="positions must be pairs of two columns of four, the lower one first"):
        sparse24_linear(x, values, positions)


def test_sizes_that_do_not_fit_are_refused_by_the_registered_ops() -> None:
    x, op24, op = torch.ones(2, 64), torch.ops.pycompress.sparse24_linear, torch.ops.pycompress.bitmap_linear
    values, positions = pack24(torch.tensor([1.0, 0, 0, 1]).repeat(3, 16))
    kept, bitmap, offsets = pack_bitmap(torch.ones(3, 64))
    for error, call in (
        (ValueError, lambda: op24(x[:, :32], values, positions, None)),
        (ValueError, lambda: op24(torch.tensor(1.0), values, positions, None)),
        (ValueError, lambda: op24(x, values[:2], positions, None)),
        (ValueError, lambda: op24(x, values, positions, torch.ones(4))),
        (ValueError, lambda: op24(x, values, positions.to("meta"), None)),
        (TypeError, lambda: op24(x, values.half(), positions, None)),
        (TypeError, lambda: op24(x.long(), values.long(), positions, None)),
        (TypeError, lambda: op24(x, values, positions.int(), None)),
        (ValueError, lambda: op(x[:, :1], kept, bitmap, offsets, None)),
        (ValueError, lambda: op(x, kept[None], bitmap, offsets, None)),
        (ValueError, lambda: op(x, kept, bitmap[0], offsets, None)),
        (ValueError, lambda: op(x, kept, bitmap, offsets[:1], None)),
        (TypeError, lambda: op(x, kept, bitmap, offsets.long(), None)),
        (TypeError, lambda: op(x, kept, bitmap.int(), offsets, None)),
        (TypeError, lambda: bitmap_linear(None, kept, bitmap, offsets)),
    ):
        with pytest.raises(error):
            call()
