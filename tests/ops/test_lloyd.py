from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from pycompress.demo import gemma
from pycompress.ops import gram, kmeans, kmeans_plus_plus, lloyd, lloyd_points


def _mixture(n: int, d: int, modes: int, seed: int = 0) -> Tensor:
    """Points around centres of unequal size and spread, as rows of weight matrices are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(modes, d, generator=generator)
    member = (torch.rand(n, generator=generator) ** 2 * modes).long()
    noise = torch.randn(n, d, generator=generator) * (0.2 + torch.rand(n, 1, generator=generator))
    return centres[member] + noise


def _lloyd64(x: np.ndarray, seeds: np.ndarray, iterations: int, weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Lloyd in float64 on points, with explicit centroids."""
    centroids = x[seeds].copy()
    labels = np.full(len(x), -1)
    for step in range(iterations + 1):
        distances = ((x[:, None] - centroids[None]) ** 2).sum(2)
        updated = distances.argmin(1)
        own = distances[np.arange(len(x)), updated]
        for cluster in range(len(seeds)):
            if not (weights[updated == cluster] > 0).any():
                counts = np.bincount(updated[weights > 0], minlength=len(seeds))
                own_allowed = np.where((counts[updated] > 1) & (weights > 0), own, -1)
                updated[own_allowed.argmax()], own[own_allowed.argmax()] = cluster, -1
        if step and (updated == labels).all():
            break
        labels = updated
        for cluster in range(len(seeds)):
            centroids[cluster] = np.average(x[labels == cluster], axis=0, weights=weights[labels == cluster])
    return labels, float((weights * ((x - centroids[labels]) ** 2).sum(1)).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("n", "d", "k"), [(200, 20, 12), (63, 7, 5), (1000, 33, 17), (40, 3, 39)])
@pytest.mark.parametrize("form", ["gram", "points"])
def test_labels_and_inertia_are_those_of_float64_lloyd(
    level: str, form: str, n: int, d: int, k: int, weighted: bool
) -> None:
    x = _mixture(n, d, 15)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    seeds = torch.randperm(n, generator=torch.Generator().manual_seed(2))[:k]
    if form == "gram":
        labels, inertia = lloyd(gram(x)[None], seeds[None], 30, None if weights is None else weights[None])
    else:
        labels, inertia = lloyd_points(x[None], seeds[None], 30, None if weights is None else weights[None])
    plain = np.ones(n) if weights is None else weights.double().numpy()
    expected, expected_inertia = _lloyd64(x.double().numpy(), seeds.numpy(), 30, plain)
    np.testing.assert_array_equal(labels[0].numpy(), expected)
    assert float(inertia[0]) == pytest.approx(expected_inertia, rel=1e-4)


def test_lloyd_on_gram_equals_lloyd_on_points(level: str) -> None:
    x = _mixture(400, 30, 10)
    x = x - x.mean(0)
    seeds = torch.arange(0, 400, 25)[None]
    on_gram, on_points = lloyd(gram(x)[None], seeds, 20), lloyd_points(x[None], seeds, 20)
    assert torch.equal(on_gram[0], on_points[0])
    torch.testing.assert_close(on_gram[1], on_points[1], rtol=1e-4, atol=0)


def test_batched_runs_equal_single_runs(level: str) -> None:
    matrices = torch.stack([gram(_mixture(90, 12, 6, seed)) for seed in range(3)])
    uniforms = torch.rand(3, 8, 3, generator=torch.Generator().manual_seed(0))
    weights = torch.rand(3, 90, generator=torch.Generator().manual_seed(1))
    seeds = kmeans_plus_plus(matrices, uniforms, weights)
    labels, inertia = lloyd(matrices, seeds, 10, weights)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(kmeans_plus_plus(matrices[one], uniforms[one], weights[one]), seeds[one])
        alone = lloyd(matrices[one], seeds[one], 10, weights[one])
        assert torch.equal(alone[0], labels[one])
        assert torch.equal(alone[1], inertia[one])


def test_an_empty_cluster_is_reseeded_at_the_farthest_point(level: str) -> None:
    x = torch.tensor([[0.0], [0.1], [0.2], [9.0], [0.3]])
    labels, _ = lloyd(gram(x)[None], torch.tensor([[0, 0]]), 0)
    assert labels.tolist() == [[0, 0, 0, 1, 0]]


def test_duplicates_fewer_than_clusters_are_harmless(level: str) -> None:
    x = torch.ones(20, 4)
    x[10:] = 3
    for form in (lambda s: lloyd(gram(x)[None], s, 5), lambda s: lloyd_points(x[None], s, 5)):
        labels, inertia = form(torch.arange(6)[None])
        assert len(labels[0, :10].unique()) == len(labels[0, 10:].unique()) == 1
        assert labels[0, 0] != labels[0, 10]
        assert inertia[0] < 1e-4


def test_points_without_weight_move_no_centroid(level: str) -> None:
    x = _mixture(100, 8, 5)
    x[50:] += 100
    weights = torch.ones(1, 100)
    weights[:, 50:] = 0
    seeds = torch.arange(0, 50, 10)[None]
    labels, inertia = lloyd(gram(x)[None], seeds, 20, weights)
    alone, inertia_alone = lloyd(gram(x[:50])[None], seeds, 20)
    assert torch.equal(labels[:, :50], alone)
    torch.testing.assert_close(inertia, inertia_alone, rtol=1e-4, atol=1e-3)


def test_seeds_follow_the_squared_distance(level: str) -> None:
    """On points of a line the cumulative mass is known by hand."""
    x = torch.tensor([[0.0], [1.0], [3.0], [10.0]])
    matrix = gram(x)[None]
    assert kmeans_plus_plus(matrix, torch.tensor([[0.0, 0.0]])).tolist() == [[0, 1]]  # masses 0, 1, 9, 100
    assert kmeans_plus_plus(matrix, torch.tensor([[0.0, 0.08]])).tolist() == [[0, 2]]
    assert kmeans_plus_plus(matrix, torch.tensor([[0.0, 0.5]])).tolist() == [[0, 3]]
    assert kmeans_plus_plus(matrix, torch.tensor([[0.6, 0.999]])).tolist() == [[2, 3]]


def test_of_several_trials_the_one_with_least_inertia_is_kept(level: str) -> None:
    x = torch.tensor([[0.0], [9.0], [10.0], [11.0]])
    drawn = torch.tensor([[[0.1, 0.1], [0.2, 0.5]]])  # second step: points 1 and 2
    assert kmeans_plus_plus(gram(x)[None], drawn).tolist() == [[0, 2]]


def test_seeds_without_mass_are_the_lowest_not_taken(level: str) -> None:
    seeds = kmeans_plus_plus(torch.ones(1, 5, 5), torch.full((1, 4), 0.5))
    assert seeds.tolist() == [[2, 0, 1, 3]]


@pytest.mark.parametrize(("n", "d", "k"), [(600, 40, 40), (1500, 16, 60)])
def test_inertia_is_within_half_a_percent_of_scikit_learns(n: int, d: int, k: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    x = _mixture(n, d, 50)
    theirs = np.mean([cluster.KMeans(k, n_init=1, random_state=s).fit(x.numpy()).inertia_ for s in range(6)])
    ours = np.mean([float(kmeans(x, clusters=k, seed=s, iterations=100)[1]) for s in range(6)])
    assert ours <= 1.005 * theirs


@pytest.mark.parametrize(("name", "k"), [("self_attn.k_proj", 32), ("self_attn.q_proj", 128), ("mlp.down_proj", 64)])
def test_inertia_on_real_weights_is_within_half_a_percent_of_scikit_learns(name: str, k: int) -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    path = gemma.cache_folder() / gemma.FOLDER / "model.safetensors"
    if not path.exists():
        pytest.skip("the demo's model is not converted: run `pycompress demo` once")
    with safe_open(path, "pt") as weights:
        x = weights.get_tensor(f"model.layers.8.{name}.weight").float()
    runs = range(2)
    theirs = [cluster.KMeans(k, n_init=1, max_iter=10, tol=0, random_state=s).fit(x.numpy()).inertia_ for s in runs]
    ours = [float(kmeans(x, clusters=k, seed=s, iterations=10)[1]) for s in runs]
    assert np.mean(ours) <= 1.005 * np.mean(theirs)


def test_more_restarts_never_hurt() -> None:
    x = _mixture(300, 10, 20)
    one, many = kmeans(x, clusters=15, restarts=1)[1], kmeans(x, clusters=15, restarts=4)[1]
    assert many <= one


def test_kmeans_takes_points_or_gram_batched_or_not() -> None:
    x = _mixture(80, 100, 6)
    x = x - x.mean(0)
    labels, inertia = kmeans(x, clusters=6)
    assert torch.equal(kmeans(gram=gram(x), clusters=6)[0], labels)
    both, _ = kmeans(torch.stack([x, x.flip(0)]), clusters=6)
    assert both.shape == (2, 80)
    assert inertia.shape == ()


def test_two_runs_and_any_number_of_threads_give_the_same_bits(level: str) -> None:
    x = _mixture(700, 25, 30)
    first = kmeans(x, clusters=30)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        second = kmeans(x, clusters=30)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


def test_float64_is_computed_in_float64() -> None:
    x = _mixture(120, 9, 6).double() * 1e-4 + 1.0
    seeds = torch.arange(0, 120, 20)[None]
    labels, inertia = lloyd_points(x[None], seeds, 20)
    expected, expected_inertia = _lloyd64(x.numpy(), seeds[0].numpy(), 20, np.ones(120))
    np.testing.assert_array_equal(labels[0].numpy(), expected)
    assert float(inertia[0]) == pytest.approx(expected_inertia, rel=1e-5)


def test_wrong_input_is_named() -> None:
    matrix = torch.eye(5)[None]
    with pytest.raises(ValueError, match="clusters must be between 1 and the number of points, 5, got 6"):
        kmeans(gram=matrix, clusters=6)
    with pytest.raises(ValueError, match="exactly one of x and gram"):
        kmeans(clusters=2)
    with pytest.raises(ValueError, match="restarts must be at least 1, got 0"):
        kmeans(gram=matrix, clusters=2, restarts=0)
    with pytest.raises(ValueError, match=r"gram must be floating point, \[B, n, n\], got torch\.float32 \(1, 5, 4\)"):
        lloyd(matrix[..., :4], torch.zeros(1, 2, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match=r"seeds must be int64 \[B, k\] with B = 1, got torch\.int32"):
        lloyd(matrix, torch.zeros(1, 2, dtype=torch.int32), 3)
    with pytest.raises(ValueError, match=r"weights must be \(1, 5\), one a point, got \(5,\)"):
        lloyd(matrix, torch.zeros(1, 2, dtype=torch.int64), 3, torch.ones(5))
    with pytest.raises(ValueError, match="iterations must be 0 or more, got -1"):
        lloyd(matrix, torch.zeros(1, 2, dtype=torch.int64), -1)


def test_opcheck() -> None:
    x = _mixture(30, 4, 3)[None]
    matrix, seeds, weights = gram(x), torch.arange(5)[None], torch.ones(1, 30)
    torch.library.opcheck(torch.ops.pycompress.kmeans_plus_plus.default, (matrix, torch.rand(1, 5, 2), weights))
    torch.library.opcheck(torch.ops.pycompress.lloyd.default, (matrix, seeds, 3, None))
    torch.library.opcheck(torch.ops.pycompress.lloyd_points.default, (x, seeds, 3, weights))


REGISTERED = torch.ops.pycompress


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # the kernel's, the reference's
@pytest.mark.parametrize("seed", [10**12, 5, -1, -(10**9)])
def test_seeds_that_are_no_points_are_refused(seed: int, dtype: torch.dtype) -> None:
    points = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    seeds = torch.tensor([[0, seed]])
    for call, data in (
        (lloyd, points @ points.mT),
        (lloyd_points, points),
        (REGISTERED.lloyd, points @ points.mT),
        (REGISTERED.lloyd_points, points),
    ):
        with pytest.raises(IndexError, match=f"seeds must be at least 0 and below 5, got {seed}"):
            call(data, seeds, 3, None)


@pytest.mark.parametrize("front", [kmeans_plus_plus, REGISTERED.kmeans_plus_plus])
def test_a_seed_needs_a_trial(front) -> None:
    with pytest.raises(ValueError, match=r"T at least 1, got \(1, 67, 0\)"):
        front(torch.eye(70)[None], torch.empty(1, 67, 0), None)


def test_sizes_that_do_not_fit_are_refused_by_the_registered_ops() -> None:
    gram, seeds, draws = torch.eye(4)[None], torch.zeros(1, 2, dtype=torch.int64), torch.rand(1, 2)
    for error, call in (
        (ValueError, lambda: REGISTERED.lloyd(gram[:, :3], seeds, 1, None)),
        (ValueError, lambda: REGISTERED.lloyd(gram, seeds[0], 1, None)),
        (ValueError, lambda: REGISTERED.lloyd(gram, torch.zeros(1, 5, dtype=torch.int64), 1, None)),
        (ValueError, lambda: REGISTERED.lloyd(gram, torch.zeros(2, 2, dtype=torch.int64), 1, None)),
        (ValueError, lambda: REGISTERED.lloyd(gram, seeds, -1, None)),
        (ValueError, lambda: REGISTERED.lloyd(gram, seeds, 10**12, None)),
        (ValueError, lambda: REGISTERED.lloyd(gram, seeds, 1, torch.ones(1, 3))),
        (TypeError, lambda: REGISTERED.lloyd(gram, seeds, 1, torch.ones(1, 4, dtype=torch.int64))),
        (ValueError, lambda: REGISTERED.lloyd(gram.long(), seeds, 1, None)),
        (ValueError, lambda: REGISTERED.lloyd(gram, seeds.to("meta"), 1, None)),
        (ValueError, lambda: REGISTERED.lloyd_points(gram[0], seeds, 1, None)),
        (ValueError, lambda: REGISTERED.kmeans_plus_plus(gram, torch.rand(1, 5), None)),
        (ValueError, lambda: REGISTERED.kmeans_plus_plus(gram, torch.rand(2, 2), None)),
        (ValueError, lambda: REGISTERED.kmeans_plus_plus(gram, draws, torch.ones(4))),
        (TypeError, lambda: REGISTERED.kmeans_plus_plus(gram, draws.long(), None)),
        (ValueError, lambda: kmeans(torch.eye(4), clusters=10**12)),
        (ValueError, lambda: kmeans(torch.eye(4), clusters=2, restarts=10**12)),
        (TypeError, lambda: kmeans(torch.eye(4), clusters=2, seed="1")),
        (TypeError, lambda: lloyd(gram, seeds, "1")),
        (TypeError, lambda: lloyd(None, seeds, 1)),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30])
def test_points_that_are_not_finite_end_with_labels_of_clusters(value: float) -> None:
    points = torch.randn(2, 40, 6, generator=torch.Generator().manual_seed(0))
    points[0, 3, 2] = value
    for data in ({"x": points}, {"gram": points @ points.mT}):
        labels, _ = kmeans(**data, clusters=7, iterations=1000)
        assert int(labels.min()) >= 0
        assert int(labels.max()) < 7
        alone, _ = kmeans(**{name: each[1:] for name, each in data.items()}, clusters=7, iterations=1000)
        assert int(alone.max()) < 7
