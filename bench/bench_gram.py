"""Gram matrices against torch's and NumPy's full matrix product."""

import numpy as np
import pytest
import torch

from pycompress.ops import gram

SHAPES = [(640, 8192), (2048, 640), (2048, 2048), (4096, 4096)]


@pytest.mark.parametrize("who", ["pycompress", "torch matmul", "numpy matmul"])
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_gram(race, n, d, who):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    runs = {
        "pycompress": lambda: gram(x),
        "torch matmul": lambda: x @ x.T,
        "numpy matmul": lambda: x.numpy() @ x.numpy().T,
    }
    expected = x.double() @ x.double().T
    got = torch.as_tensor(np.asarray(runs[who]())).double()
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    half = n * (n + 1) * d
    flops = half if who == "pycompress" else 2 * n * n * d
    race(f"X Xᵀ, X {n}x{d}", who, runs[who], flops=flops, bytes=4 * (n * d + n * n))


@pytest.mark.parametrize("who", ["pycompress", "torch matmul"])
@pytest.mark.parametrize(("n", "d"), [(2048, 640), (640, 2048)])
def test_gram_in_a_metric(race, n, d, who):
    generator = torch.Generator().manual_seed(0)
    w, inputs = torch.randn(n, d, generator=generator), torch.randn(d, 2 * d, generator=generator)
    h = inputs @ inputs.T / d
    runs = {"pycompress": lambda: gram(w, h), "torch matmul": lambda: w @ h @ w.T}
    expected = w.double() @ h.double() @ w.double().T
    assert (runs[who]().double() - expected).norm() <= 1e-5 * expected.norm()
    second = n * (n + 1) * d if who == "pycompress" else 2 * n * n * d
    race(f"W H Wᵀ, W {n}x{d}", who, runs[who], flops=2 * n * d * d + second, bytes=4 * (n * d + d * d + n * n))
