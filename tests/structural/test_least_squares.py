"""Refitting the readers of pruned channels, against scipy's least squares in float64."""

import numpy as np
import pytest
import scipy.linalg
import torch

from pycompress.structural.least_squares import compensation, held_out_dampings, reform, reform_admm

TOKENS, N, K = 600, 12, 32
KEPT = torch.tensor([0, 1, 3, 4, 7, 8, 9, 12, 13, 15, 18, 20, 21, 25, 26, 28, 29, 30, 31])


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(K, K, generator=generator, dtype=torch.float64)
    return torch.randn(TOKENS, K, generator=generator, dtype=torch.float64) @ mixing + 0.5


@pytest.fixture
def weight():
    return torch.randn(N, K, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gram(inputs):
    return inputs.T @ inputs / len(inputs)


def solved(inputs, outputs, ridge=0.0, prior=None):
    """Least squares of the stacked system in float64."""
    prior = np.zeros((outputs.shape[1], inputs.shape[1])) if prior is None else prior.numpy()
    root = np.sqrt(ridge * len(inputs))
    left = np.concatenate([inputs.numpy(), root * np.eye(inputs.shape[1])])
    right = np.concatenate([outputs.numpy(), root * prior.T])
    return torch.from_numpy(scipy.linalg.lstsq(left, right)[0].T)


def error(weight, refitted, inputs):
    """Mean squared output error of a matrix over the kept inputs."""
    return float((inputs[:, KEPT] @ refitted.T - inputs @ weight.T).square().sum() / len(inputs))


def test_reform_is_least_squares(inputs, weight):
    expected = solved(inputs[:, KEPT], inputs @ weight.T)
    torch.testing.assert_close(reform(weight, gram(inputs), KEPT, damping=0), expected, rtol=1e-5, atol=1e-5)


def test_reform_takes_float32(inputs, weight):
    refitted = reform(weight.float(), gram(inputs).float(), KEPT, damping=0)
    assert refitted.dtype == torch.float64
    torch.testing.assert_close(refitted, solved(inputs[:, KEPT], inputs @ weight.T), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damping", [1e-2, 1.0])
def test_reform_shrinks_towards_the_kept_columns(inputs, weight, damping):
    ridge = damping * float(inputs[:, KEPT].square().mean())
    expected = solved(inputs[:, KEPT], inputs @ weight.T, ridge, weight[:, KEPT])
    torch.testing.assert_close(reform(weight, gram(inputs), KEPT, damping=damping), expected, rtol=1e-5, atol=1e-5)


def test_reform_shrinks_towards_what_is_given(inputs, weight):
    ridge = 0.1 * float(inputs[:, KEPT].square().mean())
    refitted = reform(weight, gram(inputs), KEPT, damping=0.1, towards=torch.zeros(N, len(KEPT)))
    expected = solved(inputs[:, KEPT], inputs @ weight.T, ridge)
    torch.testing.assert_close(refitted, expected, rtol=1e-5, atol=1e-5)


def test_reform_aims_at_other_outputs(inputs, weight):
    """The inputs have changed since the dense model gave its outputs."""
    generator = torch.Generator().manual_seed(2)
    changed = inputs + 0.3 * torch.randn(inputs.shape, generator=generator, dtype=torch.float64)
    outputs = inputs @ weight.T
    cross = outputs.T @ changed / len(inputs)
    refitted = reform(weight, gram(changed), KEPT, cross=cross, damping=0)
    torch.testing.assert_close(refitted, solved(changed[:, KEPT], outputs), rtol=1e-5, atol=1e-5)


def test_a_singular_system_says_so(weight):
    with pytest.raises(ValueError, match="raise damping"):
        reform(weight, torch.zeros(K, K), KEPT, damping=0)


def test_held_out_damping_is_the_best_of_them(inputs, weight):
    few, many = inputs[:24], inputs[24:]
    dampings = (1e-4, 1e-2, 1e-1, 1.0, 1e2)
    errors = []
    for damping in dampings:
        ridge = damping * float(few[:, KEPT].square().mean())
        errors.append(error(weight, solved(few[:, KEPT], few @ weight.T, ridge, weight[:, KEPT]), many))
    # The other matrix keeps its weight whatever the damping: what it aims at is what it gives.
    fitted, held_out = (
        (x[:, KEPT].T @ x[:, KEPT], [(x @ weight.T).T @ x[:, KEPT], weight[:, KEPT] @ x[:, KEPT].T @ x[:, KEPT]])
        for x in (few, many)
    )
    chosen, _ = held_out_dampings(*fitted, *held_out, [weight[:, KEPT]] * 2, dampings)
    assert chosen == dampings[int(np.argmin(errors))]
    assert 1e-4 < chosen < 1e2


def test_compensation_restores_the_mean_output(inputs, weight):
    bias = compensation(weight, inputs.mean(0), KEPT)
    mean = (inputs[:, KEPT] @ weight[:, KEPT].T).mean(0) + bias
    torch.testing.assert_close(mean, (inputs @ weight.T).mean(0))


def test_admm_converges_to_least_squares(inputs, weight):
    expected = solved(inputs[:, KEPT], inputs @ weight.T)
    close = reform_admm(weight, gram(inputs), KEPT, rho=0.1, iterations=4000)
    torch.testing.assert_close(close, expected, rtol=1e-4, atol=1e-4)


def test_admm_improves_with_iterations(inputs, weight):
    few, more = (reform_admm(weight, gram(inputs), KEPT, rho=1.0, iterations=count) for count in (3, 30))
    masked, best = weight[:, KEPT], solved(inputs[:, KEPT], inputs @ weight.T)
    assert error(weight, best, inputs) < error(weight, more, inputs) < error(weight, few, inputs)
    assert error(weight, more, inputs) < error(weight, masked, inputs)


def test_admm_does_not_depend_on_the_scale_of_the_inputs(inputs, weight):
    one, other = (reform_admm(weight, scale * gram(inputs), KEPT) for scale in (1.0, 1e4))
    torch.testing.assert_close(one, other)


def test_the_z_step_as_printed_is_rejected(inputs, weight):
    """With `Z = (W + U) ⊙ M`, as the paper prints it, M marking the removed columns, the result lives on those."""
    removed = torch.ones(K, dtype=torch.float64)
    removed[KEPT] = 0
    scaled = gram(inputs) / gram(inputs).diagonal().mean()
    z, u = weight * (1 - removed), torch.zeros_like(weight)
    for _ in range(30):
        fitted = torch.linalg.solve(scaled + torch.eye(K), (weight @ scaled + z - u).T).T
        z = (fitted + u) * removed
        u = u + fitted - z
    assert float(z[:, KEPT].abs().max()) == 0
    assert float(z.abs().max()) > 0
    masked = error(weight, weight[:, KEPT], inputs)
    corrected = error(weight, reform_admm(weight, gram(inputs), KEPT), inputs)
    assert error(weight, fitted[:, KEPT], inputs) > masked > corrected
