"""Seeding for K-means on the GPU: greedy k-means++ on a Gram matrix, one program a matrix, batched over matrices.

B matrices, n points, k clusters, T trials a seed. All k steps run inside one launch; the distance of every point to its
nearest seed stays in a scratch row that the first-level cache holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Float32 numbers of one [T, points] tile; with 16 warps it takes 16 registers a thread.
TILE = 8192


@triton.jit
def _mass(closest_ptr, weights_ptr, offs_n, mask_n, HAS_WEIGHTS: tl.constexpr):
    """Weight times distance to the nearest seed; the weight alone before the first seed; zero where taken."""
    closest = tl.load(closest_ptr + offs_n, mask=mask_n, other=0.0)
    mass = tl.maximum(tl.where(closest == float("inf"), 1.0, closest), 0.0)
    if HAS_WEIGHTS:
        mass = mass * tl.load(weights_ptr + offs_n, mask=mask_n, other=0.0)
    return closest, mass.to(tl.float64)


@triton.jit
def _draw(closest_ptr, weights_ptr, targets, total, n, offs_t, HAS_WEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """For each target the first index whose cumulative mass passes it; the first not taken when there is no mass."""
    drawn = tl.full(offs_t.shape, 2147483647, tl.int32)
    unused = n - 1
    before = tl.full((), 0, tl.float64)
    for first in range(0, n, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        closest, mass = _mass(closest_ptr, weights_ptr, offs_n, mask_n, HAS_WEIGHTS)
        passed = ((before + tl.cumsum(mass, axis=0))[None, :] > targets[:, None]) & mask_n[None, :]
        drawn = tl.minimum(drawn, tl.min(tl.where(passed, offs_n[None, :], 2147483647), axis=1))
        unused = tl.minimum(unused, tl.min(tl.where((closest >= 0) & mask_n, offs_n, n - 1), axis=0))
        before += tl.sum(mass, axis=0)
    return tl.where(total > 0, tl.minimum(drawn, n - 1), unused)


@triton.jit
def _distances(gram_ptr, norms_ptr, seeds, offs_n, mask_n, n):
    """Squared distances of points to seeds, `[T, points]`, not below zero."""
    norms = tl.load(norms_ptr + offs_n, mask=mask_n, other=0.0)
    own = tl.load(norms_ptr + seeds)
    rows = tl.load(gram_ptr + seeds.to(tl.int64)[:, None] * n + offs_n[None, :], mask=mask_n[None, :], other=0.0)
    return tl.maximum(norms[None, :] + own[:, None] - 2 * rows, 0.0)


@triton.jit
def _best(gram_ptr, norms_ptr, closest_ptr, weights_ptr, seeds, n, HAS_WEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The seed that leaves the least inertia, the first of equals."""
    inertia = tl.full(seeds.shape, 0, tl.float64)
    for first in range(0, n, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n
        closest = tl.load(closest_ptr + offs_n, mask=mask_n, other=0.0)
        nearest = tl.minimum(closest[None, :], _distances(gram_ptr, norms_ptr, seeds, offs_n, mask_n, n))
        nearest = tl.where(mask_n[None, :], tl.maximum(nearest, 0.0), 0.0)
        if HAS_WEIGHTS:
            nearest = nearest * tl.load(weights_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
        inertia += tl.sum(nearest.to(tl.float64), axis=1)
    return inertia


@triton.jit
def _seed_kernel(
    gram_ptr,  # [B, n, n]
    norms_ptr,  # [B, n]
    closest_ptr,  # [B, n], infinite at first; -1 marks a seed
    uniforms_ptr,  # [B, k, T], float64
    weights_ptr,  # [B, n]
    seeds_ptr,  # [B, k], int64
    n,
    k,
    trials,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    batch = tl.program_id(0).to(tl.int64)
    gram_ptr += batch * n * n
    norms_ptr += batch * n
    closest_ptr += batch * n
    weights_ptr += batch * n
    offs_t = tl.arange(0, BLOCK_T)
    total = tl.full((), 0, tl.float64)
    for first in range(0, n, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        _, mass = _mass(closest_ptr, weights_ptr, offs_n, offs_n < n, HAS_WEIGHTS)
        total += tl.sum(tl.where(offs_n < n, mass, 0.0), axis=0)
    for step in range(k):
        uniforms = tl.load(uniforms_ptr + (batch * k + step) * trials + offs_t, mask=offs_t < trials, other=0.0)
        seeds = _draw(closest_ptr, weights_ptr, uniforms * total, total, n, offs_t, HAS_WEIGHTS, BLOCK_N)
        inertia = _best(gram_ptr, norms_ptr, closest_ptr, weights_ptr, seeds, n, HAS_WEIGHTS, BLOCK_N)
        inertia = tl.where(offs_t < trials, inertia, float("inf"))
        _, winner = tl.min(inertia, axis=0, return_indices=True)
        seed = tl.sum(tl.where(offs_t == winner, seeds, 0), axis=0)
        # Every thread is done with the scratch row before any of them changes it.
        tl.debug_barrier()
        total = tl.full((), 0, tl.float64)
        for first in range(0, n, BLOCK_N):
            offs_n = first + tl.arange(0, BLOCK_N)
            mask_n = offs_n < n
            closest = tl.load(closest_ptr + offs_n, mask=mask_n, other=0.0)
            distance = _distances(gram_ptr, norms_ptr, seed + tl.zeros((1,), tl.int32), offs_n, mask_n, n)
            closest = tl.where(offs_n == seed, -1.0, tl.minimum(closest, tl.reshape(distance, (BLOCK_N,))))
            tl.store(closest_ptr + offs_n, closest, mask=mask_n)
            mass = tl.where(mask_n, tl.maximum(closest, 0.0), 0.0)
            if HAS_WEIGHTS:
                mass = mass * tl.load(weights_ptr + offs_n, mask=mask_n, other=0.0)
            total += tl.sum(mass.to(tl.float64), axis=0)
        tl.store(seeds_ptr + batch * k + step, seed.to(tl.int64))
        tl.debug_barrier()


def kmeans_plus_plus_cuda(gram: Tensor, uniforms: Tensor, weights: Tensor | None = None) -> Tensor:
    """Seeds `[B, k]` by k-means++ from `gram [B, n, n]` and `uniforms [B, k]`, or `[B, k, T]` for T greedy trials.

    Distances are float32 (float64 for a float64 Gram); cumulative masses are float64.
    """
    gram = gram.to(torch.float64 if gram.dtype == torch.float64 else torch.float32).contiguous()
    batch, n, _ = gram.shape
    draws = (uniforms if uniforms.dim() == 3 else uniforms[..., None]).double().contiguous()
    seeds = torch.empty(draws.shape[:2], dtype=torch.int64, device=gram.device)
    if seeds.numel():
        block_t = triton.next_power_of_2(draws.shape[2])
        block_n = min(triton.next_power_of_2(n), max(TILE * 4 // gram.element_size() // block_t, 16))
        norms = gram.diagonal(dim1=1, dim2=2).contiguous()
        _seed_kernel[(batch,)](
            gram,
            norms,
            torch.full_like(norms, torch.inf),
            draws,
            norms if weights is None else weights.to(gram.dtype).contiguous(),
            seeds,
            n,
            draws.shape[1],
            draws.shape[2],
            HAS_WEIGHTS=weights is not None,
            BLOCK_N=block_n,
            BLOCK_T=block_t,
            num_warps=16 if n > 512 else 4,
        )
    return seeds
