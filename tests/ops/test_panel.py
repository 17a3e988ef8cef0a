"""Rounding and pruning of a panel against GPTQ's and SparseGPT's recursions in float64, written out here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pycompress.ops import prune_panel, round_panel

pytestmark = pytest.mark.usefixtures("level")

INT4 = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
# p, R: a whole panel, one column, fewer columns than a group, rows of less than a register and of several.
SIZES = [(128, 50), (1, 3), (40, 16), (96, 7), (256, 33)]


def drawn(columns: int, rows: int) -> tuple[Tensor, Tensor]:
    """A panel and an upper factor whose diagonal is far from zero; what is below it must not be read."""
    generator = torch.Generator().manual_seed(columns + rows)
    values = torch.randn(columns, rows, generator=generator)
    factor = torch.randn(columns, columns, generator=generator).triu() / (4 * columns**0.5)
    factor += torch.diag(1 + torch.rand(columns, generator=generator))
    return values, factor + torch.full((columns, columns), torch.nan).tril(-1).nan_to_num(1e30)


def rounded(values: Tensor, factor: Tensor, codes: Tensor, scales: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The recursion, by these codes: what is to be rounded in each turn, and what is lost, over the diagonal."""
    rest, upper = values.double().numpy().copy(), factor.double().numpy()
    wanted, lost = np.empty_like(rest), np.empty_like(rest)
    for j in range(len(rest)):
        wanted[j] = rest[j]
        lost[j] = (rest[j] - codes[j].double().numpy() * scales[j].double().numpy()) / upper[j, j]
        for t in range(j + 1, len(rest)):
            rest[t] -= upper[j, t] * lost[j]
    return wanted, lost


def relative_error(got: Tensor, exact: np.ndarray) -> float:
    return float(np.linalg.norm(got.double().numpy() - exact) / max(np.linalg.norm(exact), 1e-30))


@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-127, 127), (-4, 3), (-2, 1)])
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_given_scales_round_each_value_to_the_nearest_code_of_what_is_left(
    columns: int, rows: int, low: int, high: int
) -> None:
    values, factor = drawn(columns, rows)
    scales = (0.2 + torch.rand(columns, rows)) * 4 / high * torch.where(torch.rand(columns, rows) < 0.5, -1.0, 1.0)
    codes, lost, chosen = round_panel(values, factor, scales, low=low, high=high)
    assert not chosen.numel()
    assert codes.dtype == torch.int8
    wanted, exact = rounded(values, factor, codes, scales)
    assert relative_error(lost, exact) < 1e-4
    nearest = np.clip(np.round(wanted / scales.double().numpy()), low, high)
    # Float32 may round what lies between two codes to either.
    assert np.mean(nearest != codes.numpy()) < 2e-3
    assert np.abs(nearest - codes.numpy()).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("low", "high"), [(-8, 7), (-7, 7)])
@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_chosen_scales_lose_least_of_those_that_are_tried(
    columns: int, rows: int, low: int, high: int, dtype: torch.dtype
) -> None:
    values, factor = drawn(columns, rows)
    values[:, 0] = 0  # a group of zeros has a scale too
    codes, lost, scales = round_panel(values, factor, low=low, high=high, group=64, reductions=INT4, dtype=dtype)
    assert scales.shape == (-(-columns // 64), rows)
    assert torch.equal(scales, scales.to(dtype).float())
    stretched = scales.repeat_interleave(64, 0)[:columns]
    _, exact = rounded(values, factor, codes, stretched)
    assert np.abs(lost.double().numpy() - exact).max() < 1e-4
    for group in range(len(scales)):
        # A group's values when its turn comes: what is rounded first in it, with nothing of it compensated for yet.
        start = group * 64
        before = values.double().numpy()[start : start + 64].copy()
        before -= factor.double().numpy()[:start, start : start + 64].T @ exact[:start]
        ends = [np.abs(before).max(0) / high]
        if low != -high:
            largest = np.abs(before).argmax(0)
            ends.append(before[largest, np.arange(rows)] / low)
        tried = [torch.tensor(share * end).float().to(dtype).double().numpy() for end in ends for share in INT4]
        errors = [_error(before, np.where(scale == 0, 1.0, scale), low, high) for scale in tried]
        got = _error(before, scales[group].double().numpy(), low, high)
        assert (got <= np.min(errors, axis=0) * (1 + 1e-4) + 1e-12).all()
    assert (codes[:, 0] == 0).all()
    assert (scales != 0).all()


def _error(values: np.ndarray, scales: np.ndarray, low: int, high: int) -> np.ndarray:
    """Of plain rounding, a row's."""
    return ((values - np.clip(np.round(values / scales), low, high) * scales) ** 2).sum(0)


def pruned(values: Tensor, factor: Tensor, gone: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The recursion with these zeros: what is left of each column in its turn, kept and lost."""
    rest, upper = values.double().numpy().copy(), factor.double().numpy()
    lost = np.empty_like(rest)
    before = np.empty((len(rest), *rest.shape))
    for j in range(len(rest)):
        before[j] = rest
        lost[j] = rest[j] * gone[j] / upper[j, j]
        for t in range(j + 1, len(rest)):
            rest[t] -= upper[j, t] * lost[j]
        rest[j] *= ~gone[j]
    return before, rest, lost


@pytest.mark.parametrize(("columns", "rows"), SIZES)
def test_given_zeros_are_compensated_for(columns: int, rows: int) -> None:
    values, factor = drawn(columns, rows)
    gone = torch.rand(columns, rows, generator=torch.Generator().manual_seed(1)) < 0.5
    kept, lost = prune_panel(values, factor, gone)
    _, exact, errors = pruned(values, factor, gone.numpy())
    assert relative_error(kept, exact) < 1e-4
    assert relative_error(lost, errors) < 1e-4
    assert (kept[gone] == 0).all()


@pytest.mark.parametrize(("keep", "size"), [(2, 4), (1, 4), (4, 8), (3, 16), (0, 4), (4, 4)])
def test_of_every_group_the_cheapest_become_zero(keep: int, size: int) -> None:
    values, factor = drawn(128, 37)
    values[:size, 0] = 1.0
    factor[:size, :size] = torch.eye(size)  # of equal costs the first
    kept, lost = prune_panel(values, factor, keep=keep, size=size)
    gone = (kept == 0).numpy()
    assert (gone.reshape(-1, size, 37).sum(1) == size - keep).all()
    before, exact, errors = pruned(values, factor, gone)
    assert relative_error(kept, exact) < 1e-4
    assert relative_error(lost, errors) < 1e-4 or keep == size
    prices = np.diagonal(factor.double().numpy())[:, None] ** 2
    for start in range(0, 128, size):
        costs = before[start][start : start + size] ** 2 / prices[start : start + size]
        zero = gone[start : start + size]
        if 0 < keep < size:
            assert (np.where(zero, costs, 0).max(0) <= np.where(zero, np.inf, costs).min(0) * (1 + 1e-4)).all()
    assert gone[: size - keep, 0].all()
    assert not gone[size - keep : size, 0].any()


def test_float64_stays_and_16_bits_become_float32() -> None:
    values, factor = drawn(40, 5)
    assert round_panel(values.double(), factor.double())[1].dtype == torch.float64
    assert prune_panel(values.double(), factor.double())[0].dtype == torch.float64
    assert round_panel(values.bfloat16(), factor.bfloat16())[1].dtype == torch.float32


def test_a_part_of_a_larger_factor_and_no_rows_are_taken() -> None:
    values, factor = drawn(96, 20)
    part = factor[16:64, 16:64]
    for got, expected in zip(
        round_panel(values[16:64], part), round_panel(values[16:64], part.contiguous()), strict=True
    ):
        assert torch.equal(got, expected)
    codes, _, scales = round_panel(values[:, :0], factor)
    assert codes.shape == (96, 0)
    assert scales.shape == (2, 0)


def test_what_does_not_fit_is_said() -> None:
    values, factor = drawn(8, 5)
    with pytest.raises(ValueError, match=r"factor must be \[8, 8\].* got \[7, 7\]"):
        round_panel(values, factor[:7, :7])
    with pytest.raises(ValueError, match="at most 256, got"):
        round_panel(torch.ones(257, 1), torch.eye(257))
    with pytest.raises(ValueError, match="one for each value"):
        round_panel(values, factor, torch.ones(8, 1))
    with pytest.raises(ValueError, match="codes must reach"):
        round_panel(values, factor, low=-8, high=200)
    with pytest.raises(ValueError, match="whole groups"):
        prune_panel(values, factor, keep=2, size=3)
    with pytest.raises(ValueError, match="gone must be bool"):
        prune_panel(values, factor, torch.ones(8, 5))
    with pytest.raises(TypeError):
        round_panel(values.int(), factor)


def test_the_ops_pass_opcheck() -> None:
    values, factor = drawn(32, 9)
    torch.library.opcheck(
        torch.ops.pycompress.round_panel.default, (values, factor, None, -8, 7, 16, [1.0], torch.bfloat16)
    )
    torch.library.opcheck(torch.ops.pycompress.prune_panel.default, (values, factor, None, 2, 4))
