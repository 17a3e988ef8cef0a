"""Leading singular vectors and factors against torch.svd_lowrank and the full decompositions."""

from functools import cache

import pytest
import torch

from pycompress.ops import gram, lowrank, truncated_svd

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


# Spectrum -> the fewest blocks of ours, and the cheapest width and iterations of torch's, with an error within 0.1%.
LARGE = {"decaying": (6, 192, 4), "flat": (12, 192, 12)}


@cache
def large(spectrum):
    """A matrix, its squared norm, and the squared error of its best approximation of rank 128."""
    w = torch.randn(4096, 11008, generator=torch.Generator().manual_seed(0))
    if spectrum == "decaying":
        w *= torch.arange(1, 11009) ** -0.5
    total = float(w.double().square().sum())
    return w, total, total - float(torch.linalg.eigvalsh(w @ w.T)[-128:].double().sum())


@pytest.mark.parametrize(
    ("spectrum", "who"),
    [(spectrum, who) for spectrum in LARGE for who in ("pycompress", "torch svd_lowrank")] + [("flat", "torch svd")],
)
def test_truncated_svd_of_a_large_matrix(race, spectrum, who):
    """From W to the factors, at an error within 0.1% of the least one; the full SVD, of a minute, once."""
    blocks, q, niter = LARGE[spectrum]
    w, total, exact = large(spectrum)
    runs = {
        "pycompress": lambda: truncated_svd(w, 128, iterations=blocks),
        "torch svd_lowrank": lambda: torch.svd_lowrank(w, q=q, niter=niter),
        "torch svd": lambda: torch.linalg.svd(w, full_matrices=False),
    }
    torch.manual_seed(0)
    facts = {"rounds": 1}
    if who != "torch svd":
        u = runs[who]()[0][:, :128].double()
        error = total - float((u.T @ w.double()).square().sum())
        assert error <= 1.001 * exact
        facts = {"rounds": 3, "error_over_svd_tail": error / exact}
    race(f"rank 128 of 4096x11008, {spectrum} spectrum", who, runs[who], bytes=w.nbytes, **facts)
