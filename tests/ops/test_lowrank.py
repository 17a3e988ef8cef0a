from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pycompress.ops import gram, lowrank, truncated_svd


def _matrix(n: int, d: int, decay: float = 1.0) -> Tensor:
    """Singular values that fall slowly, as those of weight matrices do."""
    generator = torch.Generator().manual_seed(n + d)
    left, _ = torch.linalg.qr(torch.randn(n, min(n, d), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(d, min(n, d), generator=generator))
    return left * (1 + torch.arange(min(n, d))) ** -decay @ right.T


def _centred(x: Tensor, labels: Tensor | None, clusters: int) -> np.ndarray:
    rows = x.double().numpy().copy()
    for cluster in range(clusters if labels is not None else 0):
        member = labels.numpy() == cluster
        if member.any():
            rows[member] -= rows[member].mean(0)
    return rows


def _tails(x: Tensor, u: Tensor, labels: Tensor | None, clusters: int) -> tuple[float, float]:
    """Squared error of the correction `u`, and the least one any correction of that rank can have."""
    rows, basis = _centred(x, labels, clusters), u.double().numpy()
    exact = (np.linalg.svd(rows, compute_uv=False)[u.shape[1] :] ** 2).sum()
    return float(((rows - basis @ (basis.T @ rows)) ** 2).sum()), float(exact)


@pytest.mark.parametrize("decay", [0.2, 1.0])
@pytest.mark.parametrize("clustered", [False, True])
@pytest.mark.parametrize(("n", "d", "rank"), [(500, 700, 16), (1000, 300, 64), (63, 1000, 5)])
def test_error_is_within_a_thousandth_of_the_exact_tail(
    n: int, d: int, rank: int, clustered: bool, decay: float
) -> None:
    x = _matrix(n, d, decay)
    labels = torch.randint(0, 20, (n,), generator=torch.Generator().manual_seed(0)) if clustered else None
    u, values = lowrank(gram(x), rank, labels, 20)
    error, exact = _tails(x, u, labels, 20)
    assert error <= 1.001 * exact
    spectrum = np.linalg.svd(_centred(x, labels, 20), compute_uv=False)[:rank] ** 2
    np.testing.assert_allclose(values.numpy(), spectrum, rtol=0.02)
    assert values.sum() == pytest.approx(spectrum.sum(), rel=2e-3)


@pytest.mark.parametrize("columns", [1, 33])
def test_centring_takes_each_clusters_mean_away(level: str, columns: int) -> None:
    """A Gram matrix of rank one: its only eigenvector is the centred generator."""
    x = _matrix(400, columns, 0.1)
    labels = torch.arange(400) % 7
    u, _ = lowrank(gram(x), 1, labels, 7)
    rows = _centred(x, labels, 7)
    first = np.linalg.svd(rows)[0][:, 0]
    assert abs(float(first @ u[:, 0].double().numpy())) > 0.999 or columns > 1
    for cluster in range(7):
        assert abs(float(u[labels == cluster, 0].sum())) < 1e-4


@pytest.mark.parametrize(("n", "d", "rank"), [(600, 5, 20), (600, 600, 0), (600, 1, 1), (40, 60, 40), (40, 60, 50)])
def test_columns_are_orthonormal_whatever_the_rank_of_the_matrix(n: int, d: int, rank: int) -> None:
    u, values = lowrank(gram(_matrix(n, d)), rank)
    assert u.shape == (n, rank)
    assert values.shape == (rank,)
    expected = torch.eye(rank)
    expected[n:] = 0  # columns past n are zero
    torch.testing.assert_close(u.T @ u, expected, rtol=0, atol=1e-5)
    assert values.isfinite().all()
    assert (values.diff() <= 1e-6).all()


def test_a_zero_matrix_gives_finite_columns_and_zero_eigenvalues() -> None:
    u, values = lowrank(torch.zeros(500, 500), 10, torch.arange(500) % 3, 3)
    assert u.isfinite().all()
    assert values.abs().max() == 0


def test_scale_of_the_matrix_does_not_matter() -> None:
    x = _matrix(500, 200)
    for scale in (1e-9, 1e9):
        error, exact = _tails(x, lowrank(gram(x) * scale, 12)[0], None, 0)
        assert error <= 1.001 * exact


def test_an_empty_cluster_is_harmless(level: str) -> None:
    x, labels = _matrix(500, 300), torch.arange(500) % 9
    u, _ = lowrank(gram(x), 10, labels, 12)
    error, exact = _tails(x, u, labels, 12)
    assert error <= 1.001 * exact


def test_batched_matrices_equal_single_ones(level: str) -> None:
    x = torch.stack([_matrix(400, 100), _matrix(400, 100, 0.5)])
    labels = torch.stack([torch.arange(400) % 11, torch.arange(400) % 5])
    u, values = lowrank(gram(x), 8, labels, 11)
    for b in range(2):
        alone_u, alone_values = lowrank(gram(x[b]), 8, labels[b], 11)
        torch.testing.assert_close(values[b], alone_values, rtol=1e-4, atol=1e-6)
        overlap = torch.linalg.svdvals(u[b].T @ alone_u)
        torch.testing.assert_close(overlap, torch.ones(8), rtol=1e-3, atol=1e-3)


def test_two_runs_give_the_same_bits(level: str) -> None:
    matrix, labels = gram(_matrix(500, 300)), torch.arange(500) % 9
    first, second = lowrank(matrix, 16, labels, 9), lowrank(matrix, 16, labels, 9)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_float64_stays_float64() -> None:
    x = _matrix(400, 300).double()
    u, values = lowrank(gram(x), 10)
    assert u.dtype == values.dtype == torch.float64
    torch.testing.assert_close(u.T @ u, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12)


def test_wrong_input_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"gram must be floating point, \[n, n\] or \[B, n, n\], got .*\(3, 4\)|1, 3, 4"
    ):
        lowrank(torch.zeros(3, 4), 1)
    with pytest.raises(ValueError, match="rank must be 0 or more, got -1"):
        lowrank(torch.eye(4), -1)
    with pytest.raises(ValueError, match=r"labels must be \(1, 4\) with clusters >= 1, got \(1, 3\)"):
        lowrank(torch.eye(4), 1, torch.zeros(3, dtype=torch.int64), 2)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("n", "d", "rank"), [(500, 900, 16), (900, 500, 40), (63, 1000, 5)])
def test_svd_of_a_matrix_is_within_a_thousandth_of_the_exact_tail(n: int, d: int, rank: int, decay: float) -> None:
    generator = torch.Generator().manual_seed(n + d)
    x = torch.randn(n, d, generator=generator) if decay == 0 else _matrix(n, d, decay)
    u, s, v = truncated_svd(x, rank)
    exact = np.linalg.svd(x.double().numpy(), compute_uv=False)
    error = (x.double() - u.double() * s @ v.double().T).square().sum()
    assert error <= 1.001 * (exact[rank:] ** 2).sum()
    np.testing.assert_allclose(s.numpy(), exact[:rank], rtol=0.02)
    for side in (u, v):
        torch.testing.assert_close(side.T @ side, torch.eye(rank), rtol=0, atol=2e-3)
    shorter = u if n < d else v
    torch.testing.assert_close(shorter.T @ shorter, torch.eye(rank), rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e9])
def test_svd_of_a_matrix_of_lower_rank_or_any_scale_is_finite(scale: float) -> None:
    x = scale * _matrix(600, 5).repeat(1, 140)
    u, s, v = truncated_svd(x, 16)
    assert s.isfinite().all()
    torch.testing.assert_close(u.T @ u, torch.eye(16), rtol=0, atol=1e-5)
    torch.testing.assert_close(u * s @ v.T, x, rtol=0, atol=2e-6 * float(x.norm()))


def test_svd_of_many_matrices_equals_that_of_each() -> None:
    x = torch.stack([_matrix(400, 500), _matrix(400, 500, 0.5)])
    u, s, v = truncated_svd(x, 8)
    assert u.shape == (2, 400, 8)
    assert v.shape == (2, 500, 8)
    for b in range(2):
        alone = truncated_svd(x[b], 8)
        torch.testing.assert_close(s[b], alone[1], rtol=1e-4, atol=0)
        torch.testing.assert_close(u[b] * s[b] @ v[b].T, alone[0] * alone[1] @ alone[2].T, rtol=0, atol=1e-4)


def test_svd_names_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"needs x \[\.\.\., n, d\] and a rank of 0 or more, got \(3,\) and 1"):
        truncated_svd(torch.zeros(3), 1)
    with pytest.raises(TypeError, match=r"floating-point x, got torch\.int64"):
        truncated_svd(torch.zeros(3, 3, dtype=torch.int64), 1)


def test_opcheck() -> None:
    matrix = gram(_matrix(60, 40))[None]
    op = torch.ops.pycompress.lowrank.default
    torch.library.opcheck(op, (matrix, torch.randn(1, 60, 9), 4, (torch.arange(60) % 5)[None], 5, 3))
    torch.library.opcheck(op, (matrix, torch.randn(1, 60, 9), 4, None, 0, 3))


def test_labels_without_a_cluster_are_refused() -> None:
    far = torch.full((1, 200), 10**9)
    for options in ({"oversample": 2, "iterations": 2}, {}):  # by a Krylov space, by a full decomposition
        for dtype in (torch.float32, torch.float64):
            with pytest.raises(IndexError, match="labels must be at least 0 and below 15, got 1000000000"):
                lowrank(torch.eye(200, dtype=dtype)[None], 2, far, 15, **options)


def test_counts_are_bounded_before_anything_is_allocated() -> None:
    matrix = torch.eye(20)
    for error, call in (
        (ValueError, lambda: lowrank(matrix, 10**12)),
        (ValueError, lambda: lowrank(matrix, 2, torch.zeros(20, dtype=torch.int64), 10**12)),
        (ValueError, lambda: lowrank(matrix, 2, iterations=-1)),
        (ValueError, lambda: lowrank(matrix, 2, oversample=-1)),
        (ValueError, lambda: truncated_svd(matrix, 10**12)),
        (TypeError, lambda: lowrank(matrix, 2, torch.zeros(20), 3)),
        (TypeError, lambda: lowrank(matrix, 2.0)),
        (TypeError, lambda: truncated_svd(matrix, 2, "seed")),
    ):
        with pytest.raises(error):
            call()


def test_sizes_that_do_not_fit_are_refused_by_the_registered_op() -> None:
    op, matrix, omega = torch.ops.pycompress.lowrank, torch.eye(20)[None], torch.randn(1, 20, 4)
    labels = torch.zeros(1, 20, dtype=torch.int64)
    for error, args in (
        (ValueError, (matrix[0], omega, 2, None, 0, 2)),
        (ValueError, (matrix, omega[:, :19], 2, None, 0, 2)),
        (ValueError, (matrix, omega[:, :, :0], 0, None, 0, 2)),
        (ValueError, (matrix, torch.randn(1, 20, 21), 2, None, 0, 2)),
        (ValueError, (matrix, omega, 9, None, 0, 2)),
        (ValueError, (matrix, omega, -1, None, 0, 2)),
        (ValueError, (matrix, omega, 2, None, 0, 0)),
        (ValueError, (matrix, omega, 2, labels[:, 1:], 3, 2)),
        (TypeError, (matrix, omega, 2, labels.int(), 3, 2)),
        (ValueError, (matrix, omega, 2, labels, 10**12, 2)),
        (ValueError, (matrix, omega.to("meta"), 2, None, 0, 2)),
    ):
        with pytest.raises(error):
            op(*args)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    matrix = torch.eye(300)
    matrix[3, 4] = matrix[4, 3] = value
    for call in (lambda: lowrank(matrix, 2), lambda: lowrank(matrix, 100), lambda: truncated_svd(matrix, 2)):
        with pytest.raises(ValueError, match="must be finite, but holds NaN or infinite values"):
            call()


def test_a_space_of_two_blocks_is_never_larger_than_the_matrix() -> None:
    """One block is asked for, two are the least there are."""
    x = torch.randn(31, 63, generator=torch.Generator().manual_seed(0))
    u, s, v = truncated_svd(x, 10, iterations=1)
    exact = torch.linalg.svdvals(x.double())
    missed = torch.linalg.matrix_norm(x.double() - (u * s).double() @ v.double().T)
    assert float(missed) <= 1.05 * float(exact[10:].square().sum().sqrt())
