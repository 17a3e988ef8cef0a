"""Scores and orders of units, against explicit refits by scipy and sums written out."""

import itertools

import numpy as np
import pytest
import scipy.linalg
import torch

from pycompress.methods._elimination import column_scores, damped, eliminate, eliminate_unread, inverse, phi, row_scores

TINY = 1e-12


@pytest.fixture
def problem():
    """Inputs [T, K], a weight [N, K]."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    inputs = torch.randn(400, 12, generator=generator, dtype=torch.float64) @ mixing
    return inputs, torch.randn(6, 12, generator=generator, dtype=torch.float64)


def gram(inputs):
    return inputs.T @ inputs / len(inputs)


def refit_error(inputs, weight, kept, cost=None):
    """Squared output error, averaged over tokens, of the best matrix over the kept inputs; `cost`: of output errors."""
    x, y = inputs.numpy(), (inputs @ weight.T).numpy()
    found = scipy.linalg.lstsq(x[:, kept], y)[0]
    residual = x[:, kept] @ found - y
    return float(np.sum((residual @ (np.eye(len(weight)) if cost is None else cost.numpy())) * residual) / len(x))


def test_inverse_is_damped_by_a_share_of_the_mean_diagonal(problem):
    inputs, _ = problem
    h = gram(inputs).numpy()
    expected = np.linalg.inv(h + 0.1 * np.trace(h) / 12 * np.eye(12))
    np.testing.assert_allclose(inverse(gram(inputs), 0.1).numpy(), expected, rtol=1e-9)


@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_a_gram_without_energy_is_refused(value):
    with pytest.raises(ValueError, match="calibration data"):
        damped(torch.full((3, 3), value), 0.01)


def test_phi_is_twice_the_error_of_removing_one_weight(problem):
    """A row's other weights compensate for it: the saliency of the optimal brain surgeon."""
    inputs, weight = problem
    found = phi(weight, gram(inputs), TINY)
    for i, j in ((0, 0), (3, 7), (5, 11)):
        kept = [k for k in range(12) if k != j]
        assert float(found[i, j]) == pytest.approx(2 * refit_error(inputs, weight[i : i + 1], kept), rel=1e-6)


def test_scores_add_up_over_the_rows_and_columns_of_a_unit():
    values = torch.arange(12.0).view(3, 4)
    assert row_scores(values, torch.tensor([[0, 2], [1, 1]])).tolist() == [6 + 38, 2 * 22]
    assert column_scores(values, torch.tensor([[0, 3]])).tolist() == [12 + 21]


def test_elimination_is_greedy_and_its_error_is_that_of_a_refit(problem):
    inputs, weight = problem
    found = eliminate(weight, gram(inputs), torch.arange(12).view(1, 12, 1), damping=TINY)
    left = list(range(12))
    for removed in range(1, 12):
        errors = {unit: refit_error(inputs, weight, [k for k in left if k != unit]) for unit in left}
        best = min(errors, key=errors.get)
        left.remove(best)
        assert int(found.order[0, removed - 1]) == best
        assert float(found.error[removed]) == pytest.approx(errors[best], rel=1e-6)
        assert found.kept(12 - removed)[0].tolist() == left


@pytest.mark.parametrize("full", [False, True])
def test_elimination_takes_weights_of_outputs(problem, full):
    inputs, weight = problem
    factor = torch.randn(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    cost = factor @ factor.T if full else torch.diag(factor[0].square())
    units = torch.arange(12).view(1, 12, 1)
    found = eliminate(weight, gram(inputs), units, cost if full else cost.diagonal(), damping=TINY)
    for count in (9, 4):
        expected = refit_error(inputs, weight, found.kept(count)[0].tolist(), cost)
        assert float(found.error[12 - count]) == pytest.approx(expected, rel=1e-6)
    assert found.order.tolist() != eliminate(weight, gram(inputs), units, damping=TINY).order.tolist()


def test_sets_lose_a_unit_each_and_units_may_hold_many_columns(problem):
    """Two sets of three units of two columns: as two key-value heads, each read by two query heads."""
    inputs, weight = problem
    units = torch.tensor([[[0, 3], [1, 4], [2, 5]], [[6, 9], [7, 10], [8, 11]]])
    found = eliminate(weight, gram(inputs), units, damping=TINY)
    assert found.order.shape == (2, 3)
    assert found.error.shape == (3,)
    for count in (2, 1):
        kept = [int(c) for s in range(2) for unit in found.kept(count)[s] for c in units[s, unit]]
        assert float(found.error[3 - count]) == pytest.approx(refit_error(inputs, weight, kept), rel=1e-6)


def test_steps_of_several_units_give_the_error_of_a_refit(problem):
    inputs, weight = problem
    found = eliminate(weight, gram(inputs), torch.arange(12).view(1, 12, 1), damping=TINY, step=3)
    for count in (8, 6):  # 12 lose 4, 8 lose 2
        expected = refit_error(inputs, weight, found.kept(count)[0].tolist())
        assert float(found.error[12 - count]) == pytest.approx(expected, rel=1e-6)
    assert bool((found.error.diff() >= 0).all())


def test_elimination_is_near_the_best_choice_of_all():
    """Against every choice of 5 of 10 inputs, of which half repeat the others with noise."""
    generator = torch.Generator().manual_seed(4)
    base = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    noisy = base + 0.1 * torch.randn(300, 5, generator=generator, dtype=torch.float64)
    inputs = torch.cat([base, noisy], 1)
    weight = torch.randn(4, 10, generator=generator, dtype=torch.float64)
    found = eliminate(weight, gram(inputs), torch.arange(10).view(1, 10, 1), damping=TINY)
    best = min(refit_error(inputs, weight, list(kept)) for kept in itertools.combinations(range(10), 5))
    assert refit_error(inputs, weight, found.kept(5)[0].tolist()) <= 1.5 * best


def test_unread_outputs_go_by_the_squared_change_of_the_loss_over_all_pairs_of_tokens():
    """Gradients of one token against outputs of another: as many pairs as it takes for the two to be independent."""
    generator = torch.Generator().manual_seed(5)
    outputs = (
        torch.randn(40, 8, generator=generator, dtype=torch.float64) @ torch.rand(8, 8, generator=generator).double()
    )
    gradients = torch.randn(30, 8, generator=generator, dtype=torch.float64)
    units = torch.tensor([[0, 4], [1, 5], [2, 6], [3, 7]])

    def cost(gone):
        rows = units[gone].flatten()
        return float((gradients[:, rows] @ outputs[:, rows].T).square().mean())

    found = eliminate_unread(gram(outputs), gram(gradients), units)
    gone = []
    for removed in range(1, 4):
        costs = {unit: cost([*gone, unit]) for unit in set(range(4)) - set(gone)}
        gone.append(min(costs, key=costs.get))
        assert found.order[0, :removed].tolist() == gone
        assert float(found.error[removed]) == pytest.approx(costs[gone[-1]], rel=1e-9)
    assert sorted(found.order[0].tolist()) == [0, 1, 2, 3]
