"""K-means on the GPU: Lloyd on a Gram matrix and on points; batched, no atomics.

B matrices, n points, d dimensions, k clusters. On a Gram matrix the squared distance of point i to centroid c is
`G_ii - 2 s_ci + q_c`, with `s_c` the mean of the rows of G that belong to c and `q_c` the mean of `s_c` over them. On
points, `s_ci` is a product of centroids and points that is never stored. An iteration is five launches, whatever B is,
and reads G once; the host looks at the labels in every few of them only.
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

# Iterations between two looks at whether labels still change: each waits for the GPU.
PATIENCE = 8

# Labels [B, n] and the clusters' counts [B, k] -> least score of each point against those clusters' means, and where.
Assign = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


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
    tl.store(labels_ptr + batch * n + offs_n, label, mask=mask_n)
    tl.store(scores_ptr + batch * n + offs_n, best, mask=mask_n)


@triton.jit
def _squares_kernel(
    similarity_ptr,  # [B, k, n]
    weights_ptr,  # [B, n]
    order_ptr,
    offsets_ptr,
    squares_ptr,  # [B, k]
    n,
    k,
    BLOCK_J: tl.constexpr,
):
    """Mean of a cluster's own row of similarities over its members; infinity for one without weight."""
    group, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + batch * (k + 1) + group)
    stop = tl.load(offsets_ptr + batch * (k + 1) + group + 1)
    acc = tl.full((BLOCK_J,), 0, similarity_ptr.dtype.element_ty)
    mass = tl.full((BLOCK_J,), 0, similarity_ptr.dtype.element_ty)
    for first in range(start, stop, BLOCK_J):
        offs_j = first + tl.arange(0, BLOCK_J)
        mask_j = offs_j < stop
        rows = tl.load(order_ptr + batch * n + offs_j, mask=mask_j, other=0)
        weights = tl.load(weights_ptr + batch * n + rows, mask=mask_j, other=0.0)
        acc += weights * tl.load(similarity_ptr + (batch * k + group) * n + rows, mask=mask_j, other=0.0)
        mass += weights
    total = tl.sum(mass, axis=0)
    square = tl.where(total > 0, tl.sum(acc, axis=0) / tl.where(total > 0, total, 1), float("inf"))
    tl.store(squares_ptr + batch * k + group, square)


def _squares(similarity: Tensor, order: Tensor, offsets: Tensor, mass: Tensor) -> Tensor:
    """Squared lengths `[B, k]` of means, from their similarities `[B, k, n]`; infinity bars clusters without weight."""
    batch, clusters, n = similarity.shape
    squares = torch.empty((batch, clusters), dtype=similarity.dtype, device=similarity.device)
    _squares_kernel[(clusters, batch)](similarity, mass, order, offsets, squares, n, clusters, BLOCK_J=64, num_warps=2)
    return squares


def _nearest(similarity: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Least score `q - 2 s` over the clusters and where it is: `[B, k, n]` and `[B, k]` to `[B, n]` twice."""
    batch, clusters, n = similarity.shape
    scores = torch.empty((batch, n), dtype=similarity.dtype, device=similarity.device)
    labels = torch.empty((batch, n), dtype=torch.int32, device=similarity.device)
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
    tl.store(labels_ptr + batch * n + offs_n, label, mask=mask_n)
    tl.store(scores_ptr + batch * n + offs_n, best, mask=mask_n)


def _nearest_point(x: Tensor, centroids: Tensor, squares: Tensor) -> tuple[Tensor, Tensor]:
    """As `_nearest`, the similarities computed tile by tile from `x [B, n, d]` and `centroids [B, k, d]`."""
    batch, n, d = x.shape
    scores = torch.empty((batch, n), dtype=x.dtype, device=x.device)
    labels = torch.empty((batch, n), dtype=torch.int32, device=x.device)
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
        return similarity, _squares(similarity, order, offsets, mass)

    def assign(labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        return _nearest(*means(labels))

    rows = gram.gather(1, seeds[..., None].expand(-1, -1, gram.shape[2]))
    labels = _iterate(assign, _nearest(rows, norms.gather(1, seeds)), norms, mass, clusters, iterations)
    similarity, squares = means(labels)
    own = similarity.gather(1, labels[:, None])[:, 0]
    squares = squares.masked_fill(squares == torch.inf, 0)  # no point of any weight is there
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

    def assign(labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        centroids = segment_mean(x, *group_by_label(labels, clusters), mass)
        squares = centroids.square().sum(-1).masked_fill(counts == 0, torch.inf)
        return _nearest_point(x, centroids, squares)

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
    """Labels int64 after at most `iterations` updates of the centroids, or once no label of any matrix changes."""
    labels, counts = _without_empty(*first, norms, mass, clusters)
    for step in range(1, iterations + 1):
        updated, counts = _without_empty(*assign(labels, counts), norms, mass, clusters)
        # Labels that have not changed once never change again.
        if step % PATIENCE == 0 and torch.equal(updated, labels):
            break
        labels = updated
    return labels.long()


@triton.jit
def _without_empty_kernel(
    labels_ptr,  # [B, n], int32, read and written
    scores_ptr,  # [B, n], of moved points written
    norms_ptr,  # [B, n]
    weights_ptr,  # [B, n]
    counts_ptr,  # [B, k], int32
    n,
    k,
    BLOCK_N: tl.constexpr,
    BINS: tl.constexpr,
):
    """Count the points of positive weight, then give empty clusters a point each; one program a matrix."""
    batch = tl.program_id(0).to(tl.int64)
    labels_ptr += batch * n
    scores_ptr += batch * n
    norms_ptr += batch * n
    weights_ptr += batch * n
    counts_ptr += batch * k
    counts = tl.full((BINS,), 0, tl.int32)
    for first in range(0, n, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        counted = tl.load(weights_ptr + offs_n, mask=offs_n < n, other=0.0) > 0
        counts += tl.histogram(tl.load(labels_ptr + offs_n, mask=counted, other=k), BINS)
    offs_c = tl.arange(0, BINS)
    tl.store(counts_ptr + offs_c, counts, mask=offs_c < k)
    tl.debug_barrier()
    left = tl.sum(((counts == 0) & (offs_c < k)).to(tl.int32), axis=0)
    cluster = 0
    while left > 0:
        if tl.load(counts_ptr + cluster) == 0:
            farthest = tl.full((), 0, tl.int32)
            distance = tl.full((), 0, norms_ptr.dtype.element_ty)
            for first in range(0, n, BLOCK_N):
                offs_n = first + tl.arange(0, BLOCK_N)
                mask_n = offs_n < n
                spare = tl.load(counts_ptr + tl.load(labels_ptr + offs_n, mask=mask_n, other=0), mask=mask_n, other=0)
                movable = (spare > 1) & (tl.load(weights_ptr + offs_n, mask=mask_n, other=0.0) > 0)
                here = tl.load(norms_ptr + offs_n, mask=mask_n, other=0.0)
                here += tl.load(scores_ptr + offs_n, mask=mask_n, other=0.0)
                most, index = tl.max(tl.where(movable, here, float("-inf")), axis=0, return_indices=True)
                farthest = tl.where(most > distance, first + index, farthest)
                distance = tl.maximum(most, distance)
            left = tl.where(distance > 0, left - 1, 0)
            if distance > 0:
                giver = tl.load(labels_ptr + farthest)
                spare = tl.load(counts_ptr + giver)
                # Every thread has read what one of them changes now, and reads it again only afterwards.
                tl.debug_barrier()
                tl.store(counts_ptr + giver, spare - 1)
                tl.store(counts_ptr + cluster, 1)
                tl.store(labels_ptr + farthest, cluster)
                tl.store(scores_ptr + farthest, float("-inf"))
                tl.debug_barrier()
        cluster += 1


def _without_empty(scores: Tensor, labels: Tensor, norms: Tensor, mass: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Labels with each empty cluster given the farthest point of a cluster that can spare one, and the counts `[B, k]`.

    Points without weight neither count nor move. `scores` and `labels` are written over.
    """
    batch, n = labels.shape
    counts = torch.empty((batch, clusters), dtype=torch.int32, device=labels.device)
    _without_empty_kernel[(batch,)](
        labels,
        scores,
        norms,
        mass,
        counts,
        n,
        clusters,
        BLOCK_N=min(4096, triton.next_power_of_2(n)),
        BINS=triton.next_power_of_2(clusters + 1),
        num_warps=8,
    )
    return labels, counts


def _inertia(distance: Tensor, mass: Tensor) -> Tensor:
    return (mass * distance.clamp(min=0)).double().sum(1).float()


def _accumulable(x: Tensor) -> Tensor:
    """Float64 as it is, everything else in float32; contiguous."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous()
