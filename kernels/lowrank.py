"""Leading eigenpairs of a cluster-centred Gram matrix on the GPU, by a block Krylov space.

`(I - Π) G (I - Π)` is applied as a product, a Triton pass that subtracts each cluster's mean in place, and nothing
else; the n by n centred matrix is never formed. The small Cholesky factorisations and the eigenproblem are torch's, in
float64: their cost does not grow with n, and their digits decide the result's.

Reference: Musco and Musco, arXiv:1504.05477; Fukaya et al., arXiv:1809.11085 (shifted Cholesky QR).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from pycompress.kernels.segments import group_by_label, segment_centre_
from torch import Tensor

Centre = Callable[[Tensor], Tensor]


def lowrank_cuda(
    gram: Tensor, omega: Tensor, rank: int, labels: Tensor | None, clusters: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Top `rank` eigenpairs of `(I - Π) G (I - Π)`, Π averaging within labels: `u [B, n, r]` and `[B, r]`, falling.

    `gram [B, n, n]`, `omega [B, n, p]` with p at least `rank`, `labels [B, n]` below `clusters`, or None for G itself;
    `iterations` is the number of blocks in the Krylov space. Float32; float64 for a float64 Gram.
    """
    gram = gram.to(torch.float64 if gram.dtype == torch.float64 else torch.float32)
    centre = _centring(labels, clusters)
    omega = omega.to(gram.dtype)
    basis, image = _krylov(gram, omega, centre, max(1, min(iterations, gram.shape[1] // max(omega.shape[2], 1))))
    small = torch.bmm(basis.mT, image).double()
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    leading = values.shape[1] - rank
    values, vectors = values[:, leading:].flip(-1), vectors[..., leading:].flip(-1)
    return torch.bmm(basis, vectors.to(gram.dtype)), values.clamp(min=0).to(gram.dtype)


def _centring(labels: Tensor | None, clusters: int) -> Centre:
    """A function that gives `(I - Π) y` for `y [B, n, p]`, written over `y` where it is contiguous."""
    if labels is None:
        return lambda y: y
    order, offsets = group_by_label(labels, clusters)
    return lambda y: segment_centre_(y.contiguous(), order, offsets)


def _krylov(gram: Tensor, omega: Tensor, centre: Centre, blocks: int) -> tuple[Tensor, Tensor]:
    """An orthonormal basis `[B, n, blocks * p]` of the Krylov space, and its image under the centred matrix."""
    batch, n, width = omega.shape
    basis, image = (torch.empty((batch, n, blocks * width), dtype=gram.dtype, device=gram.device) for _ in range(2))

    def apply(y: Tensor) -> Tensor:
        # Both sides are centred: directions that come from rounding alone are not centred by themselves.
        return centre(torch.bmm(gram, centre(y.clone(memory_format=torch.contiguous_format))))

    block = apply(omega)
    for step in range(blocks):
        done, end = step * width, (step + 1) * width
        new = _orthonormal(_unit(block) + _noise(omega, step), basis[..., :done])
        block = apply(new)
        basis[..., done:end], image[..., done:end] = new, block
    return basis, image


def _unit(block: Tensor) -> Tensor:
    """Columns of length one, or zero; the largest entry is divided out first, so that no square underflows."""
    tiny = torch.finfo(block.dtype).tiny
    block = block / block.abs().amax(1, keepdim=True).clamp(min=tiny)
    return block / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp(min=tiny)


def _noise(omega: Tensor, step: int) -> Tensor:
    """Ten rounding errors in random directions, other ones at each step: what a matrix of low rank leaves empty."""
    return omega.roll(step + 1, dims=1) * (10 * torch.finfo(omega.dtype).eps / omega.shape[1] ** 0.5)


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of what `block [B, n, p]` adds to the orthonormal columns of `basis`."""
    for shift in (1e-13, 1e-13, 0.0):
        if basis.shape[2]:
            block = torch.baddbmm(block, basis, torch.bmm(basis.mT, block), alpha=-1)
        wide = block.double()
        inner = torch.bmm(wide.mT, wide)
        diagonal = inner.diagonal(dim1=1, dim2=2)
        diagonal += shift * diagonal.sum(1, keepdim=True)
        triangle = torch.linalg.cholesky_ex(inner).L
        block = torch.linalg.solve_triangular(triangle.mT, wide, upper=True, left=False).to(block.dtype)
    return block
