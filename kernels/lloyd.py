"""K-means on the GPU: Lloyd on a Gram matrix and on points; batched, no atomics.

B matrices, n points, d dimensions, k clusters. On a Gram matrix the squared distance of point i to centroid c is
`G_ii - 2 s_ci + q_c`, with `s_c` the mean of the rows of G that belong to c and `q_c` the mean of `s_c` over them. On
points, `s_ci` is a product of centroids and points that is never stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from pycompress.kernels.seeding import kmeans_plus_plus_cuda
from pycompress.kernels.segments import group_by_label, segment_mean
from torch import Tensor

__all__ = ["kmeans_plus_plus_cuda", "lloyd_cuda", "lloyd_points_cuda"]

# Labels [B, n] -> least score of each point against those clusters' means, and the cluster it belongs to.
Assign = Callable[[Tensor], tuple[Tensor, Tensor]]


@triton.jit
def _nearest_kernel(
    similarity_ptr,  # [B, k, n]
    squares_ptr,  # [B, k]
    labels_ptr,
    scores_ptr,
    n,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    best = tl.full((BLOCK_N,), float("inf"), similarity_ptr.dtype.element_ty)
    label = tl.full((BLOCK_N,), 0, tl.int32)
    for first in range(0, k, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < k
        squares = tl.load(squares_ptr + batch * k + offs_c, mask=mask_c, other=float("inf"))
        tile = similarity_ptr + (batch * k + offs_c[:, None]) * n + offs_n[None, :]
        scores = squares[:, None] - 2 * tl.load(tile, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        least, index = tl.min(scores, axis=0, return_indices=True)
        # Strictly less: among equals the lowest label wins, within a tile and across tiles.
        label = tl.where(least < best, first + index, label)
        best = tl.minimum(least, best)
    tl.store(labels_ptr + batch * n + offs_n, label.to(tl.int64), mask=mask_n)
    tl.store(scores_ptr + batch * n + offs_n, best, mask=mask_n)


def _nearest(similarity: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Least score `q - 2 s` over the clusters and where it is: `[B, k, n]` and `[B, k]` to `[B, n]` twice."""
    batch, clusters, n = similarity.shape
    scores = torch.empty((batch, n), dtype=similarity.dtype, device=similarity.device)
    labels = torch.empty((batch, n), dtype=torch.int64, device=similarity.device)
    _nearest_kernel[(triton.cdiv(n, 32), batch)](
        similarity, squares, labels, scores, n, clusters, BLOCK_N=32, BLOCK_C=64
    )
    return scores, labels


@triton.jit
def _nearest_point_kernel(
    x_ptr,  # [B, n, d]
    centroids_ptr,  # [B, k, d]
    squares_ptr,  # [B, k]
    labels_ptr,
    scores_ptr,
    n,
    d,
    k,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n
    best = tl.full((BLOCK_N,), float("inf"), x_ptr.dtype.element_ty)
    label = tl.full((BLOCK_N,), 0, tl.int32)
    for first in range(0, k, BLOCK_C):
        offs_c = first + tl.arange(0, BLOCK_C)
        mask_c = offs_c < k
        acc = tl.full((BLOCK_N, BLOCK_C), 0, x_ptr.dtype.element_ty)
        for start in range(0, d, BLOCK_D):
            offs_d = start + tl.arange(0, BLOCK_D)
            mask_d = (offs_d < d)[None, :]
            x_tile = x_ptr + (batch * n + offs_n[:, None]) * d + offs_d[None, :]
            c_tile = centroids_ptr + (batch * k + offs_c[:, None]) * d + offs_d[None, :]
            x = tl.load(x_tile, mask=mask_n[:, None] & mask_d, other=0.0)
            c = tl.load(c_tile, mask=mask_c[:, None] & mask_d, other=0.0)
            acc = tl.dot(x, tl.trans(c), acc, input_precision=PRECISION, out_dtype=x_ptr.dtype.element_ty)
        squares = tl.load(squares_ptr + batch * k + offs_c, mask=mask_c, other=float("inf"))
        least, index = tl.min(squares[None, :] - 2 * acc, axis=1, return_indices=True)
        label = tl.where(least < best, first + index, label)
        best = tl.minimum(least, best)
    tl.store(labels_ptr + batch * n + offs_n, label.to(tl.int64), mask=mask_n)
    tl.store(scores_ptr + batch * n + offs_n, best, mask=mask_n)


def _nearest_point(x: Tensor, centroids: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nearest`, the similarities computed tile by tile from `x [B, n, d]` and `centroids [B, k, d]`."""
    batch, n, d = x.shape
    scores = torch.empty((batch, n), dtype=x.dtype, device=x.device)
    labels = torch.empty((batch, n), dtype=torch.int64, device=x.device)
    double = x.dtype == torch.float64
    _nearest_point_kernel[(triton.cdiv(n, 64), batch)](
        x,
        centroids,
        squares,
        labels,
        scores,
        n,
        d,
        centroids.shape[1],
        BLOCK_N=64,
        BLOCK_C=64,
        BLOCK_D=16 if double else 32,
        PRECISION="ieee" if double else "tf32x3",
        num_warps=4 if double else 8,
    )
    return scores, labels


def lloyd_cuda(gram: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Lloyd on `gram [B, n, n]` from `seeds [B, k]`: labels `[B, n]` int64 and inertia `[B]` float32.

    The inertia is the (weighted) sum of squared distances to the final labels' own means.
    """
    gram = _accumulable(gram)
    clusters = seeds.shape[1]
    norms = gram.diagonal(dim1=1, dim2=2).contiguous()
    mass = torch.ones_like(norms) if weights is None else weights.to(gram.dtype).contiguous()

    def means(labels: Tensor) -> tuple[Tensor, Tensor]:
        order, offsets = group_by_label(labels, clusters)
        similarity = segment_mean(gram, order, offsets, mass)  # [B, k, n]
        own = similarity.gather(1, labels[:, None])[:, 0, :, None]  # [B, n, 1]
        return similarity, segment_mean(own, order, offsets, mass)[..., 0]

    def assign(labels: Tensor) -> tuple[Tensor, Tensor]:
        similarity, squares = means(labels)
        return _nearest(similarity, _barred(squares, labels, mass))

    rows = gram.gather(1, seeds[..., None].expand(-1, -1, gram.shape[2]))
    labels = _iterate(assign, _nearest(rows, norms.gather(1, seeds)), norms, mass, clusters, iterations)
    similarity, squares = means(labels)
    own = similarity.gather(1, labels[:, None])[:, 0]
    return labels, _inertia(norms - 2 * own + squares.gather(1, labels), mass)


def lloyd_points_cuda(
    x: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Lloyd on points `x [B, n, d]`, for n much larger than d; everything else as in `lloyd_cuda`.

    The mean is subtracted first, so that a common offset costs no digits.
    """
    x = _accumulable(x)
    x = x - x.mean(1, keepdim=True)
    clusters = seeds.shape[1]
    norms = x.square().sum(-1)
    mass = torch.ones_like(norms) if weights is None else weights.to(x.dtype).contiguous()

    def assign(labels: Tensor) -> tuple[Tensor, Tensor]:
        centroids = segment_mean(x, *group_by_label(labels, clusters), mass)
        return _nearest_point(x, centroids, _barred(centroids.square().sum(-1), labels, mass))

    start = x.gather(1, seeds[..., None].expand(-1, -1, x.shape[2]))
    first = _nearest_point(x, start, norms.gather(1, seeds))
    labels = _iterate(assign, first, norms, mass, clusters, iterations)
    centroids = segment_mean(x, *group_by_label(labels, clusters), mass)
    own = centroids.gather(1, labels[..., None].expand_as(x))
    return labels, _inertia((x - own).square().sum(-1), mass)


def _iterate(
    assign: Assign,
    first: tuple[Tensor, Tensor],
    norms: Tensor,
    mass: Tensor,
    clusters: int,
    iterations: int,
) -> Tensor:
    """Labels after at most `iterations` updates of the centroids, or once no label of any matrix changes."""
    labels = _without_empty(*first, norms, mass, clusters)
    for _ in range(iterations):
        updated = _without_empty(*assign(labels), norms, mass, clusters)
        if torch.equal(updated, labels):
            break
        labels = updated
    return labels


def _population(labels: Tensor, mass: Tensor, clusters: int) -> Tensor:
    """Points of positive weight in each cluster, `[B, k]`."""
    ordered = torch.where(mass > 0, labels, clusters).sort(dim=1).values
    bounds = torch.arange(clusters + 1, device=labels.device).expand(len(labels), -1).contiguous()
    return torch.searchsorted(ordered, bounds).diff(dim=1)


def _barred(squares: Tensor, labels: Tensor, mass: Tensor) -> Tensor:
    """Infinity for clusters without weight, so that no point joins their undefined mean."""
    return squares.masked_fill(_population(labels, mass, squares.shape[1]) == 0, torch.inf).contiguous()


def _without_empty(scores: Tensor, labels: Tensor, norms: Tensor, mass: Tensor, clusters: int) -> Tensor:
    """Labels with each empty cluster given the farthest point of a cluster that can spare one."""
    counts = _population(labels, mass, clusters)
    rows = (counts == 0).any(1).nonzero()[:, 0].tolist()
    if rows:
        distance = torch.where(mass > 0, norms + scores, -torch.inf)
        for row in rows:
            # A few scalar decisions, each depending on the one before: not work for a GPU.
            moved = _reseed(labels[row].cpu(), distance[row].cpu(), counts[row].cpu())
            labels[row] = moved.to(labels.device)
    return labels


def _reseed(labels: Tensor, distance: Tensor, counts: Tensor) -> Tensor:
    for cluster in (counts == 0).nonzero()[:, 0].tolist():
        movable = torch.where(counts[labels] > 1, distance, -torch.inf)
        farthest = int(movable.argmax())
        if not movable[farthest] > 0:
            break
        counts[labels[farthest]] -= 1
        counts[cluster] += 1
        labels[farthest] = cluster
        distance[farthest] = -torch.inf
    return labels


def _inertia(distance: Tensor, mass: Tensor) -> Tensor:
    return (mass * distance.clamp(min=0)).double().sum(1).float()


def _accumulable(x: Tensor) -> Tensor:
    """Float64 as it is, everything else in float32; contiguous."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
