from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress import _ext
from pycompress.nn.linear import KernelLinear
from pycompress.ops import subnet_linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(64, 128), (63, 1000), (301, 65), (1, 1), (10, 700)]
CHOICES = [(False, False), (True, False), (False, True), (True, True)]
LAYOUTS = ["rows", "columns", "prefix", "strided"]


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def _laid_out(weight: Tensor, layout: str) -> Tensor:
    """`weight` with contiguous rows or columns, as a part of a larger matrix of NaN, or with neither contiguous."""
    n, k = weight.shape
    if layout == "rows":
        return weight.contiguous()
    if layout == "columns":
        return weight.T.contiguous().T
    around = torch.full((n + 3, 2 * k + 5), torch.nan, dtype=weight.dtype)
    view = around[:n, :k] if layout == "prefix" else around[:n, : 2 * k : 2]
    return view.copy_(weight)


def _choice(count: int, seed: int) -> Tensor:
    """About half of the indices below `count`, unsorted, some of them twice."""
    return torch.randint(0, count, (count // 2 + 1,), generator=torch.Generator().manual_seed(seed))


def _cases(n: int, k: int) -> Iterator[tuple[Tensor | None, Tensor | None]]:
    for with_rows, with_columns in CHOICES:
        yield _choice(n, 1) if with_rows else None, _choice(k, 2) if with_columns else None


def _selected(weight: Tensor, bias: Tensor | None, rows: Tensor | None, columns: Tensor | None) -> tuple[Tensor, ...]:
    n, k = weight.shape
    rows = torch.arange(n) if rows is None else rows
    columns = torch.arange(k) if columns is None else columns
    return weight[rows][:, columns], torch.zeros(len(rows), dtype=weight.dtype) if bias is None else bias[rows]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("n", "k"), SIZES)
def test_error_is_at_most_twice_torchs(level: str, n: int, k: int, layout: str, dtype: torch.dtype) -> None:
    bias = _draw(n, dtype=dtype)
    dense = _draw(n, k, dtype=dtype) / k**0.5
    weight = _laid_out(dense, layout)
    for number, (rows, columns) in enumerate(_cases(n, k)):
        small, its_bias = _selected(dense, bias if number % 2 else None, rows, columns)
        for tokens in (1, 2, 3, 5, 16, 17, 63):
            x = _draw(tokens, small.shape[1], dtype=dtype)
            exact = x.double().numpy() @ small.double().numpy().T + its_bias.double().numpy()
            y = subnet_linear(x, weight, bias if number % 2 else None, rows, columns)
            assert y.dtype == dtype
            error, torchs = (np.linalg.norm(got.double().numpy() - exact) for got in (y, F.linear(x, small, its_bias)))
            assert error <= 2 * torchs + 1e-6 * np.linalg.norm(exact)


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_every_element_is_written_and_nothing_stale_is_read(
    level: str, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, bias = _draw(63, 100), _draw(63)
    weight, poisoned = _laid_out(dense, layout), torch.full((40, 200), torch.nan)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for rows, columns in _cases(63, 100):
        small, its_bias = _selected(dense, bias, rows, columns)
        features = small.shape[1]
        for tokens in (1, 7, 40):
            subnet_linear(poisoned[:tokens, :features], weight, bias, rows, columns)
            x = poisoned.clone()[:tokens, 90 : 90 + features]  # rows 200 apart, NaN on both sides
            x.copy_(_draw(tokens, features))
            y = subnet_linear(x, weight, bias, rows, columns)
            torch.testing.assert_close(y.double(), x.double() @ small.double().T + its_bias, rtol=0, atol=1e-4)


def test_part_of_a_weight_may_be_nan_when_it_is_not_in_use(level: str) -> None:
    """By rows wherever rows are contiguous, by columns wherever columns are."""
    rows, columns = torch.tensor([5, 2, 2, 8]), torch.tensor([9, 1, 4])
    for tokens in (1, 40):
        weight = torch.full((10, 12), torch.nan)
        weight[rows] = 1.0
        assert subnet_linear(torch.ones(tokens, 12), weight, rows=rows).eq(12).all()
        weight = torch.full((12, 10), torch.nan)
        weight[columns] = 1.0
        assert subnet_linear(torch.ones(tokens, 3), weight.T, columns=columns).eq(3).all()


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_two_runs_and_any_number_of_threads_give_the_same_bits(level: str, layout: str, tokens: int) -> None:
    weight = _laid_out(_draw(707, 500, dtype=torch.bfloat16), layout)
    threads = torch.get_num_threads()
    for rows, columns in _cases(707, 500):
        x = _draw(tokens, 500 if columns is None else len(columns), dtype=torch.bfloat16)
        first = subnet_linear(x, weight, None, rows, columns)
        try:
            for count in (1, threads + 1, threads + 2):
                torch.set_num_threads(count)
                assert torch.equal(subnet_linear(x, weight, None, rows, columns), first)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("tokens", [1, 33])
def test_layout_and_leading_sizes_of_x_do_not_matter(tokens: int) -> None:
    weight, bias = _draw(63, 100, dtype=torch.bfloat16), _draw(63, dtype=torch.bfloat16)
    wide = _draw(2, tokens, 300, dtype=torch.bfloat16)
    expected = subnet_linear(wide[..., 50:150].reshape(-1, 100).clone(), weight, bias)
    for x in (wide[..., 50:150], wide[..., 50:150].contiguous(), wide[..., 50:150].mT.contiguous().mT):
        y = subnet_linear(x, weight, bias)
        assert y.shape == (2, tokens, 63)
        assert torch.equal(y.reshape(-1, 63), expected)
    assert torch.equal(subnet_linear(wide[0, 0, :100], weight, bias), subnet_linear(wide[0, :1, :100], weight, bias)[0])


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_empty_sizes_give_empty_results_or_the_bias(level: str, layout: str) -> None:
    weight, bias, none = _laid_out(_draw(6, 5), layout), _draw(6), torch.empty(0, dtype=torch.int64)
    assert subnet_linear(torch.zeros(2, 0, 5), weight, bias).shape == (2, 0, 6)
    assert subnet_linear(torch.zeros(2, 5), weight, bias, rows=none).shape == (2, 0)
    for tokens in (2, 40):
        assert torch.equal(subnet_linear(torch.zeros(tokens, 0), weight, bias, columns=none), bias.expand(tokens, 6))


@pytest.mark.parametrize("layout", ["rows", "columns"])
def test_gradients_are_those_of_finite_differences(layout: str) -> None:
    weight, bias = _laid_out(_draw(5, 4).double(), layout).requires_grad_(), _draw(5).double().requires_grad_()
    for rows, columns in _cases(5, 4):
        x = _draw(2, 1, 4 if columns is None else len(columns)).double().requires_grad_()

        def layer(
            x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor | None = rows, columns: Tensor | None = columns
        ) -> Tensor:
            return subnet_linear(x, weight, bias, rows, columns)

        assert torch.autograd.gradcheck(layer, (x, weight, bias))
        assert torch.autograd.gradgradcheck(layer, (x, weight, bias))


def test_gradients_of_float32_are_those_of_the_dense_formula(level: str) -> None:
    weight, bias = (t.requires_grad_() for t in (_draw(63, 100), _draw(63)))
    for rows, columns in _cases(63, 100):
        x = _draw(20, 100 if columns is None else len(columns)).requires_grad_()
        small, its_bias = _selected(weight.double(), bias.double(), rows, columns)
        expected = torch.autograd.grad(F.linear(x.double(), small, its_bias).square().sum(), (x, weight, bias))
        got = torch.autograd.grad(subnet_linear(x, weight, bias, rows, columns).square().sum(), (x, weight, bias))
        for ours, exact in zip(got, expected, strict=True):
            assert (ours - exact).norm() <= 1e-5 * exact.norm()


def test_opcheck() -> None:
    op = torch.ops.pycompress.subnet_linear.default
    weight, bias = (t.requires_grad_() for t in (_draw(7, 5), _draw(7)))
    torch.library.opcheck(
        op, (_draw(2, 3, 4).requires_grad_(), weight, bias, _choice(7, 1), torch.tensor([4, 0, 1, 0]))
    )
    torch.library.opcheck(op, (_draw(3, 5), _laid_out(weight.detach(), "columns"), None, None, None))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_it_does_for_a_dense_layer(
    under_autocast: Callable[..., tuple[tuple[Tensor, Tensor], ...]], dtype: torch.dtype
) -> None:
    weight, bias, rows = _draw(63, 100), _draw(63), _choice(63, 1)
    pairs = under_autocast(
        lambda x: subnet_linear(x, weight, bias, rows),
        lambda x: F.linear(x, weight[rows], bias[rows]),
        _draw(9, 100, dtype=dtype),
    )
    assert pairs[0][0].dtype == pairs[0][1].dtype == torch.bfloat16
    assert pairs[1][0].dtype == dtype
    for got, want in pairs:
        assert (got - want).norm() <= 0.02 * want.norm()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert subnet_linear(_draw(9, 100).double(), weight.double()).dtype == torch.float64


def test_wrong_input_is_named() -> None:
    x, weight = torch.zeros(2, 5), torch.zeros(7, 5)
    with pytest.raises(TypeError, match=r"share one dtype, got torch\.float32, torch\.bfloat16: convert x first"):
        subnet_linear(x, weight.bfloat16())
    with pytest.raises(TypeError, match=r"rows must be int64 of one dimension, got torch\.int32 \(3,\)"):
        subnet_linear(x, weight, rows=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"weight must be \[N, K\], got \(7,\)"):
        subnet_linear(x, weight[:, 0])
    with pytest.raises(ValueError, match=r"bias must be \[7\], one for each row of weight, got \(3,\)"):
        subnet_linear(x, weight, torch.zeros(3), rows=torch.arange(3))
    with pytest.raises(ValueError, match=r"x must have 4 features in its last dimension, got \(2, 5\)"):
        subnet_linear(x, weight, columns=torch.arange(4))
    with pytest.raises(ValueError, match=r"x must have 5 features in its last dimension, got \(\)"):
        subnet_linear(torch.zeros(()), weight)


@pytest.mark.skipif(_ext.C is None, reason=f"no native module: {_ext.why}")
@pytest.mark.parametrize("index", [-1, 7])
def test_indices_outside_the_weight_are_refused(index: int) -> None:
    with pytest.raises(IndexError, match=rf"rows must be at least 0 and below 7, got {index}"):
        subnet_linear(torch.zeros(2, 5), torch.zeros(7, 5), rows=torch.tensor([0, index, 3]))


def test_the_registered_op_checks_as_its_function_does() -> None:
    x, weight = torch.ones(2, 5), torch.ones(7, 5)
    rows = torch.tensor([0, 6])
    for error, args in (
        (ValueError, (x, weight[None], None, None, None)),
        (ValueError, (x, weight, torch.ones(6), None, None)),
        (ValueError, (x[:, :4], weight, None, None, None)),
        (ValueError, (torch.tensor(1.0), weight, None, None, None)),
        (ValueError, (x, weight.to("meta"), None, None, None)),
        (TypeError, (x, weight.half(), None, None, None)),
        (TypeError, (x.long(), weight.long(), None, None, None)),
        (TypeError, (x, weight, None, rows.int(), None)),
        (TypeError, (x, weight, None, rows[None], None)),
        (IndexError, (x, weight, None, rows + 1, None)),
        (IndexError, (x, weight, None, None, torch.tensor([0, 1, 2, 3, 5]))),
        (IndexError, (x.double(), weight.double(), None, rows - 1, None)),
    ):
        for call in (subnet_linear, torch.ops.pycompress.subnet_linear):
            with pytest.raises(error):
                call(*args)


@pytest.mark.parametrize("tokens", [1, 5, 30])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_dense_layer_traced_at_some_tokens_serves_any(mode: Callable[[], torch.no_grad], tokens: int) -> None:
    layer = KernelLinear(16, 12)
    with mode():
        traced = torch.jit.trace(layer, (torch.randn(tokens, 16),))
        for others in (1, 5, 7, 30):
            x = torch.randn(others, 16)
            torch.testing.assert_close(traced(x), F.linear(x, layer.weight, layer.bias))
