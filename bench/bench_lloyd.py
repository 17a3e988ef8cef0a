"""K-means against scikit-learn: Lloyd from the same seeds, then seeding and Lloyd together."""

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
