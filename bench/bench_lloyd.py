"""K-means against scikit-learn and faiss: Lloyd from the same seeds, then seeding and Lloyd together."""

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from pycompress.ops import gram, kmeans, lloyd, lloyd_points

ITERATIONS = 10
SHAPES = [(2048, 640, 256), (640, 2048, 64)]


def sklearn_lloyd(x, clusters, init, iterations):
    model = KMeans(clusters, init=init, n_init=1, max_iter=iterations, tol=0, algorithm="lloyd", random_state=0)
    return model.fit(x.numpy())


def inertia_of(x, labels):
    """Float64, by the definition."""
    points, labels = x.double(), labels.long()
    one_hot = torch.zeros(int(labels.max()) + 1, len(points), dtype=torch.float64)
    one_hot[labels, torch.arange(len(points))] = 1
    centroids = one_hot @ points / one_hot.sum(1, keepdim=True).clamp(min=1)
    return float((points - centroids[labels]).square().sum())


@pytest.mark.parametrize("who", ["pycompress", "pycompress on points", "scikit-learn"])
@pytest.mark.parametrize(("n", "d", "clusters"), SHAPES)
@pytest.mark.filterwarnings("ignore:Number of distinct clusters", "ignore::sklearn.exceptions.ConvergenceWarning")
def test_lloyd_from_the_same_seeds(race, trained, n, d, clusters, who):
    x = trained(n, d)
    seeds = torch.randperm(n, generator=torch.Generator().manual_seed(0))[:clusters]
    g = gram(x)
    runs = {
        "pycompress": lambda: lloyd(g[None], seeds[None], ITERATIONS)[0][0],
        "pycompress on points": lambda: lloyd_points(x[None], seeds[None], ITERATIONS)[0][0],
        "scikit-learn": lambda: torch.as_tensor(sklearn_lloyd(x, clusters, x[seeds].numpy(), ITERATIONS).labels_),
    }
    inertia = inertia_of(x, runs[who]())
    assert inertia <= 1.01 * inertia_of(x, runs["scikit-learn"]())
    flops = 2 * ITERATIONS * (n * n if who == "pycompress" else n * d * clusters)
    group = f"{ITERATIONS} Lloyd iterations, {n} points of {d}, k={clusters}"
    race(
        group,
        who,
        runs[who],
        rounds=5,
        flops=flops,
        bytes=4 * (n * n if who == "pycompress" else n * d),
        inertia=inertia,
    )


@pytest.mark.parametrize("who", ["pycompress", "scikit-learn"])
@pytest.mark.parametrize(("n", "d", "clusters"), SHAPES)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_kmeans_with_its_seeding(race, trained, n, d, clusters, who):
    x = trained(n, d)
    runs = {
        "pycompress": lambda: kmeans(x, clusters=clusters, iterations=25)[0],
        "scikit-learn": lambda: torch.as_tensor(np.asarray(sklearn_lloyd(x, clusters, "k-means++", 25).labels_)),
    }
    inertia = inertia_of(x, runs[who]())
    assert inertia <= 1.02 * inertia_of(x, runs["scikit-learn"]())
    race(f"k-means, {n} points of {d}, k={clusters}", who, runs[who], rounds=3, bytes=4 * n * d, inertia=inertia)


LARGE, LARGE_CLUSTERS = 4096, 512
# Inertia by contestant: the slow ones run once, and ours, the last, is held against them.
INERTIA = {}


def faiss_labels(x):
    """From random points: faiss knows no k-means++."""
    faiss = pytest.importorskip("faiss", reason="faiss-cpu is not installed")
    faiss.omp_set_num_threads(torch.get_num_threads())
    sizes = {"min_points_per_centroid": 1, "max_points_per_centroid": len(x)}
    model = faiss.Kmeans(x.shape[1], LARGE_CLUSTERS, niter=ITERATIONS, seed=0, **sizes)
    model.train(x.numpy())
    return torch.from_numpy(model.index.search(x.numpy(), 1)[1][:, 0])


@pytest.mark.parametrize("who", ["scikit-learn", "faiss", "pycompress"])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_kmeans_of_a_large_matrix(race, trained, who):
    x = trained(LARGE, LARGE)
    runs = {
        "pycompress": lambda: kmeans(x, clusters=LARGE_CLUSTERS, iterations=ITERATIONS)[0],
        "faiss": lambda: faiss_labels(x),
        "scikit-learn": lambda: torch.as_tensor(sklearn_lloyd(x, LARGE_CLUSTERS, "k-means++", ITERATIONS).labels_),
    }
    labels = []
    if who == "pycompress":
        INERTIA[who] = inertia_of(x, runs[who]())
        assert INERTIA[who] <= 1.005 * INERTIA.get("scikit-learn", INERTIA[who])
    group = f"k-means, {LARGE} points of {LARGE}, k={LARGE_CLUSTERS}"
    race(group, who, lambda: labels.append(runs[who]()), rounds=5 if who == "pycompress" else 1, bytes=x.nbytes)
    INERTIA[who] = inertia_of(x, labels[-1])


@pytest.mark.parametrize("who", ["pycompress", "pycompress on points"])
def test_lloyd_of_a_large_matrix(race, trained, who):
    """Gram matrix and seeds are there; few dimensions and random seeds, so that labels still change at the end."""
    x = trained(LARGE, 16) @ torch.randn(16, LARGE, generator=torch.Generator().manual_seed(0))
    x = x - x.mean(0)
    g = gram(x)[None]
    seeds = torch.randperm(LARGE, generator=torch.Generator().manual_seed(0))[None, :LARGE_CLUSTERS]
    runs = {
        "pycompress": lambda: lloyd(g, seeds, ITERATIONS),
        "pycompress on points": lambda: lloyd_points(x[None], seeds, ITERATIONS),
    }
    assert not torch.equal(lloyd(g, seeds, ITERATIONS - 1)[0], lloyd(g, seeds, ITERATIONS)[0])
    inertia = float(runs[who]()[1])
    assert inertia == pytest.approx(float(runs["pycompress"]()[1]), rel=5e-3)
    group = f"{ITERATIONS} Lloyd iterations, {LARGE} points of {LARGE}, k={LARGE_CLUSTERS}"
    flops = 2 * ITERATIONS * LARGE * (LARGE if who == "pycompress" else LARGE * LARGE_CLUSTERS)
    race(group, who, runs[who], rounds=5, flops=flops, bytes=x.nbytes, inertia=inertia)
