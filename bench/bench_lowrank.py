"""Leading singular vectors against torch.svd_lowrank and the full decompositions."""

from functools import cache

import pytest
import torch

from pycompress.ops import gram, lowrank

CASES = [(2048, 640, 64), (2048, 2048, 64), (640, 2048, 32)]


@cache
def svd_tail(side, rank):
    """Squared error of the best rank-`rank` approximation, by a full float64 SVD."""
    return float(torch.linalg.svdvals(side.double())[rank:].square().sum())


@pytest.mark.parametrize("who", ["pycompress", "torch svd_lowrank", "torch eigh"])
@pytest.mark.parametrize(("n", "d", "rank"), CASES)
def test_lowrank(race, trained, n, d, rank, who):
    """Each from W to the left vectors: ours and eigh form the Gram matrix on the way."""
    w = trained(n, d)
    # The smaller side, as the methods do.
    side = w if n <= d else w.T.contiguous()
    runs = {
        "pycompress": lambda: lowrank(gram(side), rank)[0],
        "torch svd_lowrank": lambda: torch.svd_lowrank(side, q=rank + 8, niter=4)[0][:, :rank],
        "torch eigh": lambda: torch.linalg.eigh(side @ side.T)[1][:, -rank:],
    }
    torch.manual_seed(0)
    exact = svd_tail(trained(n, d), rank)
    u = runs[who]().double()
    error = float((side.double() - u @ (u.T @ side.double())).square().sum())
    assert error <= 1.01 * exact
    race(f"rank {rank} of {n}x{d}", who, runs[who], rounds=3, bytes=4 * n * d, error_over_svd_tail=error / exact)
