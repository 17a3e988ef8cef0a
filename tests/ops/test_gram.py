from __future__ import annotations

import pytest
import torch

from pycompress.ops import gram

# Columns of one, two and three registers in the last block, depths of one, two and three slices.
SHAPES = [(1, 1), (63, 1000), (64, 64), (130, 257), (257, 5), (3, 40, 17), (113, 1030)]


def _points(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", SHAPES)
def test_gram_errs_at_most_twice_as_much_as_torch(level: str, shape: tuple[int, ...]) -> None:
    x = _points(shape)
    exact = x.double() @ x.double().mT
    ours, torchs = gram(x), x @ x.mT
    floor = 1e-6 * exact.abs().max()
    assert (ours - exact).abs().max() <= 2 * (torchs - exact).abs().max() + floor
    assert ours.dtype == torch.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_metric_enters_between_the_factors(level: str, shape: tuple[int, ...]) -> None:
    x = _points(shape)
    half = _points((shape[-1], shape[-1]))
    h = half @ half.T
    exact = x.double() @ h.double() @ x.double().mT
    torch.testing.assert_close(gram(x, h), exact.float(), rtol=1e-4, atol=float(2e-6 * exact.abs().max()))


def test_result_is_symmetric_to_the_last_bit(level: str) -> None:
    x, half = _points((131, 70)), _points((70, 70))
    for result in (gram(x), gram(x, half @ half.T)):
        assert torch.equal(result, result.T)


def test_two_runs_and_any_number_of_threads_give_the_same_bits(level: str) -> None:
    x = _points((500, 300))
    first = gram(x)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(gram(x), first)
    finally:
        torch.set_num_threads(threads)


def test_every_element_is_written(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))
    for shape in ((100, 513), (1, 1), (7, 0)):
        assert gram(torch.ones(shape)).eq(shape[1]).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_accumulates_in_float32(dtype: torch.dtype) -> None:
    x = _points((65, 1000)).to(dtype)
    exact = x.double() @ x.double().T
    assert gram(x).dtype == torch.float32
    assert (gram(x) - exact).abs().max() < 1e-5 * exact.abs().max()


def test_float64_stays_float64() -> None:
    x = _points((33, 20)).double()
    torch.testing.assert_close(gram(x), x @ x.T, rtol=1e-13, atol=1e-13)


def test_layout_of_the_input_does_not_matter() -> None:
    x = _points((90, 40))
    assert torch.equal(gram(x.T.contiguous().T), gram(x))


def test_wrong_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"\[\.\.\., n, d\], got a shape of \(3,\)"):
        gram(torch.zeros(3))
    with pytest.raises(TypeError, match=r"floating-point x, got torch\.int64"):
        gram(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"h of shape \(4, 4\).*got \(5, 5\)"):
        gram(torch.zeros(3, 4), torch.zeros(5, 5))


def test_opcheck() -> None:
    x, h = _points((2, 9, 5)), torch.eye(5)
    torch.library.opcheck(torch.ops.pycompress.gram.default, (x, None))
    torch.library.opcheck(torch.ops.pycompress.gram.default, (x, h))


def test_a_metric_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"h, a tensor of shape \(5, 5\) is on the meta device and holds no values"):
        gram(torch.ones(3, 5), torch.ones(5, 5, device="meta"))


@pytest.mark.parametrize(
    ("x", "h", "error"),
    [
        (torch.ones(5), None, ValueError),
        (torch.ones(3, 5), torch.ones(2, 5, 5), ValueError),
        (torch.ones(3, 5), torch.ones(5, 4), ValueError),
        (torch.ones(2, 3, 5), torch.ones(3, 5, 5), ValueError),
        (torch.ones(3, 5), torch.ones(5, 5, dtype=torch.int64), TypeError),
        (torch.ones(3, 5, dtype=torch.int32), None, TypeError),
        (torch.ones(3, 5).to_sparse(), None, TypeError),
    ],
)
def test_the_registered_op_checks_as_its_function_does(
    x: torch.Tensor, h: torch.Tensor | None, error: type[Exception]
) -> None:
    for call in (gram, torch.ops.pycompress.gram):
        with pytest.raises(error):
            call(x, h)
