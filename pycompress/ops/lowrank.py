"""Leading eigenpairs of a Gram matrix whose rows and columns are centred within clusters; truncated SVD of a matrix.

For `G = X Xᵀ` they are the optimal rank-r correction of `X` after its cluster means are taken away: with `U` the
eigenvectors, `V = Uᵀ (X - ΠX)`. The centred matrix `(I - Π) G (I - Π)` is applied, never formed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pycompress import _ext
from pycompress.ops._arguments import CentreArgs
from pycompress.ops._checks import (
    MOST_ITERATIONS,
    SEEDS,
    check_count,
    check_finite,
    check_floats,
    check_range,
    check_tensors,
    once,
)
from pycompress.ops._library import accumulator, dispatch, register, triton_kernel
from pycompress.ops.gram import gram as gram_of

# The Krylov space pays while it is smaller than this share of n; past it a full eigendecomposition is quicker.
SPACE_LIMIT = 0.6
SPARE_COLUMNS = 64  # of zeros that may be asked for, besides n

Centre = Callable[[Tensor], Tensor]


def lowrank_ref(
    gram: Tensor, omega: Tensor, rank: int, labels: Tensor | None, clusters: int, iterations: int
) -> tuple[Tensor, Tensor]:
    """Plain torch on any device."""
    gram = gram.to(accumulator(gram.dtype))
    return _krylov(gram, omega.to(gram.dtype), rank, _centring(labels, clusters, gram), iterations)


def _centring(labels: Tensor | None, clusters: int, like: Tensor) -> Centre:
    """`y -> (I - Π) y`, the means taken as products so that the order of the sums is fixed on every device."""
    if labels is None:
        return lambda y: y
    member = torch.nn.functional.one_hot(labels, clusters).to(like.dtype)  # [B, n, k]
    average = (member / member.sum(1, keepdim=True).clamp(min=1)).mT
    return lambda y: torch.baddbmm(y, member, average @ y, alpha=-1)


def _krylov(gram: Tensor, omega: Tensor, rank: int, centre: Centre, iterations: int) -> tuple[Tensor, Tensor]:
    """Block Krylov space of `iterations` blocks, then Rayleigh-Ritz on all of it.

    Reference: Musco and Musco, arXiv:1504.05477, algorithm 2, on a symmetric matrix.
    """
    check_finite("gram", gram)
    n, width = omega.shape[1:]
    limits = torch.finfo(gram.dtype)
    scale = gram.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=limits.tiny)
    blocks = _blocks(omega, iterations)
    basis = gram.new_empty((len(gram), n, blocks * width))
    image = torch.empty_like(basis)
    block = centre(gram @ centre(omega))
    for step in range(blocks):
        done, now = step * width, slice(step * width, (step + 1) * width)
        # Noise at the level of rounding keeps the block of full rank where the matrix is not.
        noise = omega.roll(step + 1, dims=1) * (10 * limits.eps / n)
        basis[..., now] = _orthonormal(block / scale + noise, basis[..., :done])
        image[..., now] = block = centre(gram @ centre(basis[..., now]))
    small = (basis.mT @ image).double()
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    top = slice(vectors.shape[-1] - rank, None)
    return (
        basis @ vectors[..., top].flip(-1).to(gram.dtype),
        values[..., top].flip(-1).clamp(min=0).to(gram.dtype),
    )


def _orthonormal(block: Tensor, basis: Tensor) -> Tensor:
    """Columns spanning `block`, orthonormal and orthogonal to `basis`: three passes of shifted Cholesky QR.

    Reference: Fukaya et al., arXiv:1809.11085.
    """
    eps = torch.finfo(block.dtype).eps
    for shift in (11 * eps, eps, 0.0):
        if basis.shape[-1]:
            block = torch.baddbmm(block, basis, basis.mT @ block, alpha=-1)
        inner = (block.mT @ block).double()
        diagonal = inner.diagonal(dim1=1, dim2=2)
        diagonal += shift * diagonal.sum(1, keepdim=True)
        triangle, failed = torch.linalg.cholesky_ex(inner)
        if bool(failed.any()):
            raise ValueError(
                f"{basis.shape[-1] + block.shape[-1]} columns are too many for a Krylov space in {block.shape[1]} "
                f"dimensions: take fewer, or a matrix of finite products"
            )
        identity = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device).expand_as(inner)
        block = block @ torch.linalg.solve_triangular(triangle, identity, upper=False).mT.to(block.dtype)
    return block


def _check_space(gram: Tensor, omega: Tensor, rank: int, labels: Tensor | None, clusters: int, iterations: int) -> None:
    check_tensors({"gram": gram, "omega": omega}, {"labels": labels})
    _check(gram, rank, labels, clusters)
    check_floats(omega=omega)
    n = gram.shape[1]
    if omega.dim() != 3 or omega.shape[:2] != gram.shape[:2] or not 1 <= omega.shape[2] <= n:
        raise ValueError(
            f"omega must be [B, n, width] with B = {len(gram)}, n = {n} and a width of 1 to n, got {tuple(omega.shape)}"
        )
    check_count("iterations", iterations, 1, MOST_ITERATIONS)
    columns = _blocks(omega, iterations) * omega.shape[2]
    if rank > columns:
        raise ValueError(f"rank must be at most the {columns} columns of the Krylov space, got {rank}")


def _check_labels(
    gram: Tensor, omega: Tensor, rank: int, labels: Tensor | None, clusters: int, iterations: int
) -> None:
    once(labels, check_range, "labels", clusters)


def _blocks(omega: Tensor, iterations: int) -> int:
    """How many blocks of the Krylov space fit into it."""
    return max(1, min(iterations, omega.shape[1] // omega.shape[2]))


def _fake(
    gram: Tensor, omega: Tensor, rank: int, labels: Tensor | None, clusters: int, iterations: int
) -> tuple[Tensor, Tensor]:
    dtype = accumulator(gram.dtype)
    return gram.new_empty((*gram.shape[:2], rank), dtype=dtype), gram.new_empty((len(gram), rank), dtype=dtype)


def _cpu(
    gram: Tensor, omega: Tensor, rank: int, labels: Tensor | None, clusters: int, iterations: int
) -> tuple[Tensor, Tensor]:
    _check_space(gram, omega, rank, labels, clusters, iterations)
    if gram.dtype == torch.float64 or labels is None:
        _check_labels(gram, omega, rank, labels, clusters, iterations)
        return lowrank_ref(gram, omega, rank, labels, clusters, iterations)
    labels = labels.contiguous()

    def centre(y: Tensor) -> Tensor:
        centred = y.clone(memory_format=torch.contiguous_format)
        batch, n, columns = y.shape
        _ext.C.centre(CentreArgs(centred, labels, batch, n, columns, clusters, _ext.threads()))
        return centred

    return _krylov(gram.float(), omega.float(), rank, centre, iterations)


_op = register(
    "lowrank(Tensor gram, Tensor omega, int rank, Tensor? labels, int clusters, int iterations) -> (Tensor, Tensor)",
    lowrank_ref,
    _fake,
    cpu=_cpu,
    cuda=triton_kernel("lowrank", "lowrank_cuda"),
    check=_check_space,
    check_values=_check_labels,
)


def lowrank(
    gram: Tensor,
    rank: int,
    labels: Tensor | None = None,
    clusters: int = 0,
    seed: int = 0,
    iterations: int = 4,
    oversample: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Leading eigenpairs of `(I - Π) G (I - Π)`, Π averaging within labels; of `G` when there are none.

    Takes a full eigendecomposition when the Krylov space would be too large to pay.

    Parameters
    ----------
    gram
        G `[B, n, n]` symmetric, the B optional.
    rank
        Pairs.
    labels, clusters
        `[B, n]` int64 below `clusters`.
    seed
        Of the start.
    iterations
        Blocks in the Krylov space, of `rank + oversample` columns each.
    oversample
        None for 32.

    Returns
    -------
    u : Tensor
        `[B, n, rank]` with orthonormal columns, float32 (float64 for float64); columns past n are zero.
    values : Tensor
        `[B, rank]` in falling order.

    Raises
    ------
    ValueError
        For other shapes, a negative rank or one far above n, and what is not finite.
    IndexError
        For labels without a cluster.
    """
    check_tensors({"gram": gram}, {"labels": labels})
    if gram.dim() == 2:
        one = None if labels is None else labels[None]
        u, values = lowrank(gram[None], rank, one, clusters, seed, iterations, oversample)
        return u[0], values[0]
    _check(gram, rank, labels, clusters)
    n = gram.shape[-1]
    check_count("iterations", iterations, 1, MOST_ITERATIONS)
    check_count("seed", seed, *SEEDS)
    if oversample is not None:
        check_count("oversample", oversample, 0, MOST_ITERATIONS)
    width = rank + (32 if oversample is None else oversample)
    if not rank or iterations * width > SPACE_LIMIT * n:
        return _exact(gram, rank, labels, clusters)
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn((n, width), generator=generator, dtype=accumulator(gram.dtype)).to(gram.device)
    return dispatch(_op, gram, omega.expand(len(gram), -1, -1), rank, labels, clusters, iterations)


def truncated_svd(x: Tensor, rank: int, seed: int = 0, iterations: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors and values, `x ≈ u diag(s) vᵀ`, without a Gram matrix.

    For a matrix whose Gram matrix serves nothing else, and a rank well below its sides; where the Gram matrix is there,
    `lowrank` on it is cheaper.

    Parameters
    ----------
    x
        `[..., n, d]`, floating.
    rank
        Values.
    seed
        Of the start.
    iterations
        Blocks of `max(16, rank / 2)` columns in the Krylov space, each at the cost of two products with `x`: 12 leave
        an error within 0.1% of the least one also where the spectrum is flat, 6 do where it decays.

    Returns
    -------
    u, s, v : Tensor
        `[..., n, rank]`, `[..., rank]` falling and `[..., d, rank]`, float32 (float64 for float64), the columns of the
        shorter side orthonormal. Past the rank of `x`, columns may be zero.

    Raises
    ------
    ValueError
        For other shapes and a negative rank.
    TypeError
        For integers.

    Examples
    --------
    >>> import torch
    >>> from pycompress.ops import truncated_svd
    >>> u, s, v = truncated_svd(torch.diag(torch.tensor([3.0, 2.0, 1.0])), rank=1)
    >>> round(float(s[0]), 3)
    3.0

    Reference: Musco and Musco, arXiv:1504.05477, algorithm 2.
    """
    check_tensors({"x": x})
    check_count("seed", seed, *SEEDS)
    check_count("iterations", iterations, 1, MOST_ITERATIONS)
    if x.dim() < 2 or (isinstance(rank, int) and rank < 0):
        raise ValueError(f"truncated_svd needs x [..., n, d] and a rank of 0 or more, got {tuple(x.shape)} and {rank}")
    if not x.is_floating_point():
        raise TypeError(f"truncated_svd needs a floating-point x, got {x.dtype}: convert it first")
    _check_rank(rank, min(x.shape[-2:]))
    check_finite("x", x)
    if x.shape[-2] > x.shape[-1]:
        v, s, u = truncated_svd(x.mT, rank, seed, iterations)
        return u, s, v
    matrix = x.to(accumulator(x.dtype)).reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
    width = max(16, -(-rank // 2))
    iterations = max(2, iterations)
    if not rank or max(iterations * width, rank) > SPACE_LIMIT * x.shape[-2]:
        u, _ = lowrank(gram_of(matrix), rank)
        image = matrix.mT @ u
    else:
        u, image = _krylov_on_matrix(matrix, rank, width, iterations, seed)
    s = torch.linalg.vector_norm(image, dim=1)
    v = image / s[:, None].clamp(min=torch.finfo(s.dtype).tiny)
    lead = x.shape[:-2]
    return u.reshape(*lead, *u.shape[1:]), s.reshape(*lead, rank), v.reshape(*lead, *v.shape[1:])


def _krylov_on_matrix(x: Tensor, rank: int, width: int, blocks: int, seed: int) -> tuple[Tensor, Tensor]:
    """`u [B, n, rank]` of the Krylov space of `x xᵀ`, and `xᵀ u`."""
    batch, n, d = x.shape
    limits = torch.finfo(x.dtype)
    scale = torch.linalg.matrix_norm(x, keepdim=True)
    scale = torch.where(scale > 0, scale, 1)
    generator = torch.Generator().manual_seed(seed)
    omega = torch.randn((d, width), generator=generator, dtype=x.dtype).to(x.device)
    basis, image = x.new_empty((batch, n, blocks * width)), x.new_empty((batch, d, blocks * width))
    block = x @ (omega / (scale * d**0.5))
    for step in range(blocks):
        done, now = step * width, slice(step * width, (step + 1) * width)
        # Noise at the level of rounding keeps the block of full rank where the matrix is not.
        noise = omega[:n].roll(step + 1, dims=1) * (10 * limits.eps / n)
        basis[..., now] = _orthonormal(block + noise, basis[..., :done])
        image[..., now] = x.mT @ basis[..., now]
        if step + 1 < blocks:
            block = (x @ (image[..., now] / scale)) / scale
    image /= scale
    _, vectors = torch.linalg.eigh((image.mT @ image).double())
    top = vectors[..., -rank:].flip(-1).to(x.dtype)
    return basis @ top, scale * (image @ top)


def _exact(gram: Tensor, rank: int, labels: Tensor | None, clusters: int) -> tuple[Tensor, Tensor]:
    once(labels, check_range, "labels", clusters)
    check_finite("gram", gram)
    gram = gram.to(accumulator(gram.dtype))
    centre = _centring(labels, clusters, gram)
    centred = centre(centre(gram).mT.contiguous())
    values, vectors = torch.linalg.eigh((centred + centred.mT) / 2)
    missing = max(0, rank - gram.shape[-1])
    kept = slice(gram.shape[-1] - (rank - missing), None)
    u, values = vectors[..., kept].flip(-1), values[..., kept].flip(-1).clamp(min=0)
    return torch.nn.functional.pad(u, (0, missing)).contiguous(), torch.nn.functional.pad(values, (0, missing))


def _check(gram: Tensor, rank: int, labels: Tensor | None, clusters: int) -> None:
    if gram.dim() != 3 or gram.shape[1] != gram.shape[2] or not gram.is_floating_point():
        raise ValueError(f"gram must be floating point, [n, n] or [B, n, n], got {gram.dtype} {tuple(gram.shape)}")
    _check_rank(rank, gram.shape[1])
    if labels is None:
        return
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    if labels.shape != gram.shape[:2] or (isinstance(clusters, int) and clusters < 1):
        raise ValueError(
            f"labels must be {tuple(gram.shape[:2])} with clusters >= 1, got {tuple(labels.shape)} and {clusters=}"
        )
    check_count("clusters", clusters, 1, max(gram.shape[1], 1))


def _check_rank(rank: int, n: int) -> None:
    """A rank above n is one of zero columns, up to a bound: they are memory."""
    most = 2 * n + SPARE_COLUMNS
    check_count("rank", rank, min(rank, 0) if isinstance(rank, int) else 0, most)
    if rank < 0:
        raise ValueError(f"rank must be 0 or more, got {rank}")
