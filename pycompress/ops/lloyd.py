"""K-means on a Gram matrix or on points: k-means++ seeding and Lloyd iterations, deterministic and batched.

With `s_ik` the mean of `G_ij` over the members j of cluster k, and `q_k` the mean of `s_jk`, the squared distance of
point i to centroid k is `G_ii - 2 s_ik + q_k`: no centroid is formed and an iteration costs O(n²) whatever d is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pycompress import _ext
from pycompress.ops import _lloyd_ref as ref
from pycompress.ops._arguments import LloydArgs, SeedArgs
from pycompress.ops._checks import MOST_ITERATIONS, SEEDS, check_count, check_floats, check_range, check_tensors, once
from pycompress.ops._library import accumulator, dispatch, register, triton_kernel
from pycompress.ops.gram import gram as gram_of

# Lloyd on the Gram matrix is the faster form until n is this many times d.
GRAM_FORM_LIMIT = 1.5
MOST_RESTARTS = 10_000  # their draws are made together


def _fake_seeds(gram: Tensor, uniforms: Tensor, weights: Tensor | None) -> Tensor:
    return gram.new_empty(uniforms.shape[:2], dtype=torch.int64)


def _fake_labels(data: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    return data.new_empty(data.shape[:2], dtype=torch.int64), data.new_empty(data.shape[:1], dtype=torch.float32)


def _check_seeding(gram: Tensor, uniforms: Tensor, weights: Tensor | None) -> None:
    check_tensors({"gram": gram, "uniforms": uniforms}, {"weights": weights})
    _check_gram(gram)
    _check_weights(weights, gram.shape[:2])
    check_floats(uniforms=uniforms)
    if uniforms.dim() not in (2, 3) or len(uniforms) != len(gram) or uniforms.shape[2:] == (0,):
        raise ValueError(
            f"uniforms must be [B, k] or [B, k, T] with B = {len(gram)} and T at least 1, got {tuple(uniforms.shape)}"
        )
    _check_clusters(uniforms.shape[1], gram.shape[1])


def _check_lloyd(gram: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> None:
    check_tensors({"gram": gram, "seeds": seeds}, {"weights": weights})
    _check_gram(gram)
    _check_run(gram, seeds, iterations, weights)


def _check_lloyd_points(x: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> None:
    check_tensors({"x": x, "seeds": seeds}, {"weights": weights})
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be floating point, [B, n, d], got {x.dtype} {tuple(x.shape)}")
    _check_run(x, seeds, iterations, weights)


def _check_seeds(data: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> None:
    once(seeds, check_range, "seeds", data.shape[1])


def _check_gram(gram: Tensor) -> None:
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2] or not gram.is_floating_point():
        raise ValueError(f"gram must be floating point, [B, n, n], got {gram.dtype} {tuple(gram.shape)}")


def _check_clusters(clusters: int, n: int) -> None:
    if isinstance(clusters, int) and not 1 <= clusters <= n:
        raise ValueError(f"clusters must be between 1 and the number of points, {n}, got {clusters}")
    check_count("clusters", clusters, 1, n)


def _check_weights(weights: Tensor | None, shape: torch.Size) -> None:
    check_floats(weights=weights)
    if weights is not None and weights.shape != shape:
        raise ValueError(f"weights must be {tuple(shape)}, one a point, got {tuple(weights.shape)}")


def _check_run(data: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> None:
    if seeds.dim() != 2 or len(seeds) != len(data) or seeds.dtype != torch.int64:
        raise ValueError(f"seeds must be int64 [B, k] with B = {len(data)}, got {seeds.dtype} {tuple(seeds.shape)}")
    _check_clusters(seeds.shape[1], data.shape[1])
    _check_weights(weights, data.shape[:2])
    if iterations < 0:
        raise ValueError(f"iterations must be 0 or more, got {iterations}")
    check_count("iterations", iterations, 0, MOST_ITERATIONS)


def _kmeans_plus_plus_cpu(gram: Tensor, uniforms: Tensor, weights: Tensor | None) -> Tensor:
    _check_seeding(gram, uniforms, weights)
    if gram.dtype == torch.float64:
        return ref.kmeans_plus_plus_ref(gram, uniforms, weights)
    gram, weights = _matrices(gram), _plain(weights)
    uniforms = uniforms.float().contiguous()
    seeds = torch.empty(uniforms.shape[:2], dtype=torch.int64)
    batch, k = seeds.shape
    trials = uniforms.shape[2] if uniforms.dim() == 3 else 1
    sizes = (batch, gram.stride(0), gram.shape[1], k, trials, _ext.threads())
    _ext.C.kmeans_plus_plus(SeedArgs(gram, uniforms, weights, seeds, *sizes))
    return seeds


def _lloyd_cpu(gram: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_lloyd(gram, seeds, iterations, weights)
    if gram.dtype == torch.float64:
        _check_seeds(gram, seeds, iterations, weights)
        return ref.lloyd_ref(gram, seeds, iterations, weights)
    return _run_cpu(_matrices(gram), seeds, iterations, weights, points=False)


def _lloyd_points_cpu(x: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    _check_lloyd_points(x, seeds, iterations, weights)
    if x.dtype == torch.float64:
        _check_seeds(x, seeds, iterations, weights)
        return ref.lloyd_points_ref(x, seeds, iterations, weights)
    x = x.float()
    return _run_cpu((x - x.mean(1, keepdim=True)).contiguous(), seeds, iterations, weights, points=True)


def _run_cpu(
    data: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None, points: bool
) -> tuple[Tensor, Tensor]:
    seeds, weights = seeds.contiguous(), _plain(weights)
    batch, n, d = data.shape
    labels = torch.empty((batch, n), dtype=torch.int64)
    inertia = torch.empty(batch, dtype=torch.float32)
    sizes = (batch, data.stride(0), n, d, seeds.shape[1], iterations, points, _ext.threads())
    _ext.C.lloyd(LloydArgs(data, seeds, weights, labels, inertia, *sizes))
    return labels, inertia


def _matrices(gram: Tensor) -> Tensor:
    """Float32 with contiguous matrices; one matrix seen as many (`expand`) is not copied."""
    gram = gram.float()
    return gram if gram.stride()[1:] == (gram.shape[2], 1) else gram.contiguous()


def _plain(weights: Tensor | None) -> Tensor | None:
    return None if weights is None else weights.float().contiguous()


_kmeans_plus_plus = register(
    "kmeans_plus_plus(Tensor gram, Tensor uniforms, Tensor? weights) -> Tensor",
    ref.kmeans_plus_plus_ref,
    _fake_seeds,
    cpu=_kmeans_plus_plus_cpu,
    cuda=triton_kernel("lloyd", "kmeans_plus_plus_cuda"),
    check=_check_seeding,
)
_lloyd = register(
    "lloyd(Tensor gram, Tensor seeds, int iterations, Tensor? weights) -> (Tensor, Tensor)",
    ref.lloyd_ref,
    _fake_labels,
    cpu=_lloyd_cpu,
    cuda=triton_kernel("lloyd", "lloyd_cuda"),
    check=_check_lloyd,
    check_values=_check_seeds,
)
_lloyd_points = register(
    "lloyd_points(Tensor x, Tensor seeds, int iterations, Tensor? weights) -> (Tensor, Tensor)",
    ref.lloyd_points_ref,
    _fake_labels,
    cpu=_lloyd_points_cpu,
    cuda=triton_kernel("lloyd", "lloyd_points_cuda"),
    check=_check_lloyd_points,
    check_values=_check_seeds,
)


def kmeans_plus_plus(gram: Tensor, uniforms: Tensor, weights: Tensor | None = None) -> Tensor:
    """Seeds by k-means++: each drawn with probability proportional to weight times squared distance to the nearest.

    When no distance is left (duplicates) the lowest index not yet taken is the next seed.

    Parameters
    ----------
    gram
        `[B, n, n]`.
    uniforms
        In [0, 1), `[B, k]`, or `[B, k, T]` for T trials a seed of which the one with the least inertia is kept.
    weights
        `[B, n]`, not negative.

    Returns
    -------
    Tensor
        Seeds `[B, k]` int64.

    Raises
    ------
    ValueError
        For other shapes or k > n.

    Reference: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    return dispatch(_kmeans_plus_plus, gram, uniforms, weights)


def lloyd(gram: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's K-means from given seeds, on the Gram matrix of the points.

    Ties go to the lowest label; an empty cluster is reseeded at the farthest point. Stops early when no label changes.

    Parameters
    ----------
    gram
        `[B, n, n]`.
    seeds
        `[B, k]` int64.
    iterations
        At most.
    weights
        `[B, n]`, not negative.

    Returns
    -------
    labels : Tensor
        `[B, n]` int64.
    inertia : Tensor
        `[B]` float32, the weighted sum of squared distances to the final labels' own means.

    Raises
    ------
    ValueError
        For other shapes.
    IndexError
        For seeds that are no points.

    Reference: Lloyd, "Least squares quantization in PCM", 1982.
    """
    return dispatch(_lloyd, gram, seeds, iterations, weights)


def lloyd_points(x: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd's K-means from given seeds, on the points `x [B, n, d]`: the form for n much larger than d.

    Everything else is as in `lloyd`.
    """
    return dispatch(_lloyd_points, x, seeds, iterations, weights)


def kmeans(
    x: Tensor | None = None,
    gram: Tensor | None = None,
    *,
    clusters: int,
    seed: int = 0,
    iterations: int = 25,
    restarts: int = 1,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """K-means with greedy k-means++ seeding, the best of `restarts` runs by inertia; the same seed gives the same bits.

    Parameters
    ----------
    x
        Points `[B, n, d]`, the B optional; or
    gram
        their Gram matrix `[B, n, n]`.
    clusters
        From 1 to n.
    seed
        Of the seeding.
    iterations
        Lloyd's, at most.
    restarts
        From 1 to 64.
    weights
        Of the points, `[B, n]`, not negative.

    Returns
    -------
    labels : Tensor
        `[B, n]` int64.
    inertia : Tensor
        `[B]` float32, the weighted sum of squared distances to the labels' means.

    Raises
    ------
    ValueError
        Unless exactly one of `x` and `gram` is given and the counts are in range.

    Examples
    --------
    >>> import torch
    >>> from pycompress.ops import kmeans
    >>> labels, inertia = kmeans(torch.tensor([[0.0], [0.1], [9.0]]), clusters=2)
    >>> bool(labels[0] == labels[1] != labels[2])
    True

    Reference: Arthur and Vassilvitskii, "k-means++: the advantages of careful seeding", 2007.
    """
    data = x if gram is None else gram
    if data is None or (x is not None and gram is not None):
        raise ValueError("kmeans needs exactly one of x and gram")
    if isinstance(restarts, int) and restarts < 1:
        raise ValueError(f"restarts must be at least 1, got {restarts}")
    check_count("restarts", restarts, 1, MOST_RESTARTS)
    check_count("seed", seed, *SEEDS)
    check_tensors({"x" if gram is None else "gram": data}, {"weights": weights})
    if data.dim() not in (2, 3):
        raise ValueError(f"kmeans needs points [B, n, d] or gram [B, n, n], the B optional, got {tuple(data.shape)}")
    _check_clusters(clusters, data.shape[-2])
    if data.dim() == 2:
        labels, inertia = kmeans(
            None if x is None else x[None],
            None if gram is None else gram[None],
            clusters=clusters,
            seed=seed,
            iterations=iterations,
            restarts=restarts,
            weights=None if weights is None else weights[None],
        )
        return labels[0], inertia[0]
    if x is not None:
        x = x.to(accumulator(x.dtype))
        x = x - x.mean(dim=-2, keepdim=True)
        gram = gram_of(x)
    assert gram is not None
    use_points = x is not None and x.shape[1] > GRAM_FORM_LIMIT * x.shape[2]
    best_labels, best = torch.empty(0), torch.empty(0)
    for draws in _uniforms(len(gram), clusters, restarts, seed, gram.device):
        seeds = kmeans_plus_plus(gram, draws, weights)
        if use_points and x is not None:
            labels, inertia = lloyd_points(x, seeds, iterations, weights)
        else:
            labels, inertia = lloyd(gram, seeds, iterations, weights)
        if not best.numel():
            best_labels, best = labels, inertia
        better = inertia < best
        best_labels, best = torch.where(better[:, None], labels, best_labels), torch.where(better, inertia, best)
    return best_labels, best


def _uniforms(batch: int, clusters: int, restarts: int, seed: int, device: torch.device) -> Tensor:
    """Draws `[restarts, B, k, T]`; made on the CPU, so that every device sees the same.

    A trial costs O(n) on a Gram matrix: twice scikit-learn's number is still cheap, and lowers the inertia by 0.5-2%.
    """
    trials = 2 * (2 + int(math.log(max(clusters, 1))))
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((restarts, batch, clusters, trials), generator=generator).to(device)
