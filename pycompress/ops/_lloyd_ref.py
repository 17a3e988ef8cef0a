"""Plain-torch references of the K-means ops: batched, deterministic on every device, no native code."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from pycompress.ops._library import accumulator

# Membership [B, n, k], columns summing to one -> similarities to the k means [B, n, k], their squared norms [B, k].
Project = Callable[[Tensor], tuple[Tensor, Tensor]]


def kmeans_plus_plus_ref(gram: Tensor, uniforms: Tensor, weights: Tensor | None) -> Tensor:
    """Greedy k-means++ when `uniforms` has trials, plain otherwise; sums are taken in float64."""
    batch, n, _ = gram.shape
    gram = gram.to(accumulator(gram.dtype))
    mass = _weights(gram, weights)
    draws = (uniforms if uniforms.dim() == 3 else uniforms[..., None]).double()
    norms = gram.diagonal(dim1=1, dim2=2)  # [B, n]
    closest = torch.full_like(norms, torch.inf)
    taken = torch.zeros_like(norms, dtype=torch.int8)
    seeds = []
    for step in range(draws.shape[1]):
        distance_mass = mass if step == 0 else mass * closest
        candidates = _draw(distance_mass.double(), draws[:, step], taken)  # [B, T]
        rows = gram.gather(1, candidates[..., None].expand(-1, -1, n))
        distances = (norms[:, None] + norms.gather(1, candidates)[..., None] - 2 * rows).clamp(min=0)
        nearest = torch.minimum(closest[:, None], distances)  # [B, T, n]
        potential = (mass[:, None] * nearest).double().sum(-1)
        best = potential.argmin(1, keepdim=True)  # [B, 1]
        closest = nearest.gather(1, best[..., None].expand(-1, -1, n))[:, 0]
        seeds.append(candidates.gather(1, best))
        taken.scatter_(1, seeds[-1], 1)
    return torch.cat(seeds, dim=1) if seeds else gram.new_empty((batch, 0), dtype=torch.int64)


def _draw(mass: Tensor, draws: Tensor, taken: Tensor) -> Tensor:
    """Indices whose cumulative mass passes `draws` of the total; the first index not taken when the total is zero."""
    cumulative = mass.cumsum(1)
    total = cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, (draws * total).contiguous(), right=True).clamp(max=mass.shape[1] - 1)
    return torch.where(total > 0, drawn, taken.argmin(1, keepdim=True))


def lloyd_ref(gram: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lloyd on the Gram matrix, the segmented mean written as a product with a membership matrix."""
    gram = gram.to(accumulator(gram.dtype))

    def project(membership: Tensor) -> tuple[Tensor, Tensor]:
        similarity = gram @ membership
        return similarity, (membership * similarity).sum(1)

    return _iterate(project, gram.diagonal(dim1=1, dim2=2), seeds, iterations, _weights(gram, weights))


def lloyd_points_ref(x: Tensor, seeds: Tensor, iterations: int, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Lloyd on points; their mean is subtracted first, so that a common offset costs no digits."""
    x = x.to(accumulator(x.dtype))
    x = x - x.mean(1, keepdim=True)

    def project(membership: Tensor) -> tuple[Tensor, Tensor]:
        centroids = membership.mT @ x
        return x @ centroids.mT, centroids.square().sum(-1)

    return _iterate(project, x.square().sum(-1), seeds, iterations, _weights(x, weights))


def _iterate(project: Project, norms: Tensor, seeds: Tensor, iterations: int, weights: Tensor) -> tuple[Tensor, Tensor]:
    batch, n = norms.shape
    k = seeds.shape[1]
    membership = F.one_hot(seeds, n).mT.to(norms.dtype)  # [B, n, k]
    labels = _assign(project, membership, torch.zeros(batch, k, device=norms.device), norms, weights)
    for _ in range(iterations):
        updated = _assign(project, *_membership(labels, weights, k), norms, weights)
        if torch.equal(updated, labels):
            break
        labels = updated
    similarity, squares = project(_membership(labels, weights, k)[0])
    own = similarity.gather(2, labels[..., None])[..., 0]
    distance = (norms - 2 * own + squares.gather(1, labels)).clamp(min=0)
    return labels, (weights * distance).double().sum(1).float()


def _membership(labels: Tensor, weights: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Membership whose columns sum to one, and infinity `[B, k]` for each cluster that has no weight."""
    member = F.one_hot(labels, k) * weights[..., None]
    total = member.sum(1, keepdim=True)
    barred = torch.where(total[:, 0] > 0, 0.0, torch.inf)
    return member / torch.where(total > 0, total, 1), barred


def _assign(project: Project, membership: Tensor, barred: Tensor, norms: Tensor, weights: Tensor) -> Tensor:
    similarity, squares = project(membership)
    scores = (squares + barred)[:, None] - 2 * similarity
    least, labels = scores.min(2)
    labels = scores.argmin(2)
    for row, distance, weight in zip(labels, norms + least, weights, strict=True):
        _reseed_empty(row, distance, weight, membership.shape[2])
    return labels


def _reseed_empty(labels: Tensor, distance: Tensor, weights: Tensor, k: int) -> None:
    """Move the farthest points into the empty clusters, in place; no cluster gives its last point."""
    counts = torch.bincount(labels[weights > 0], minlength=k)
    empty = (counts == 0).nonzero()[:, 0].tolist()
    distance = torch.where(weights > 0, distance, -torch.inf)
    for cluster in empty:
        movable = torch.where(counts[labels] > 1, distance, -torch.inf)
        farthest = int(movable.argmax())
        if not movable[farthest] > 0:
            return
        counts[labels[farthest]] -= 1
        counts[cluster] += 1
        labels[farthest] = cluster
        distance[farthest] = -torch.inf


def _weights(like: Tensor, weights: Tensor | None) -> Tensor:
    return like.new_ones(like.shape[:2]) if weights is None else weights.to(like.dtype)
