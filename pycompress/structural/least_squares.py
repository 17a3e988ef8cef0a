"""Refits the matrices that read pruned channels, so that what is left gives what the dense matrix gave.

With `M` marking the removed columns: `min ‖Ŵ X - Y‖² subject to Ŵ ⊙ M = 0`. Since `M` takes whole columns the solution
is a linear system in the Gram matrix of the kept inputs; `reform_admm` is the published iteration towards it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Ridge parameters to choose from, as shares of the mean of the kept inputs' energies.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def reform(
    weight: Tensor,
    gram: Tensor,
    kept: Tensor,
    cross: Tensor | None = None,
    damping: float = 1e-2,
    towards: Tensor | None = None,
) -> Tensor:
    """The least-squares matrix over the kept inputs, `[N, K']` float64.

    Minimises `‖Ŵ X_S - Y‖² + λ‖Ŵ - towards‖²` with `λ = damping` times the mean of the kept inputs' energies.
    `weight [N, K]`: the dense matrix; `gram [K, K]`: mean of x xᵀ over the inputs; `kept [K']` int64: those left.
    `cross [N, K]`: mean of y xᵀ for outputs y to aim at, from the dense model say; None aims at `weight x`. `towards`
    `[N, K']`: None for the kept columns of `weight`. Raises `ValueError` where the system cannot be solved.

    Reference: arXiv:2409.17372, section 3.3, solved exactly.
    """
    weight, gram = weight.double(), gram.double()
    inner = gram[kept][:, kept]
    aimed = (weight @ gram[:, kept]) if cross is None else cross.double()[:, kept]
    prior = weight[:, kept] if towards is None else towards.double()
    if damping and not bool(inner.any()):  # inputs that are zero say nothing of the weight
        return prior
    ridge = damping * float(inner.diagonal().mean())
    system = inner + ridge * torch.eye(len(kept), dtype=inner.dtype, device=inner.device)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed) or not bool(torch.isfinite(factor).all()):
        raise ValueError(
            f"the kept inputs' Gram matrix cannot be inverted with damping {damping}; raise damping, or give more "
            f"calibration data"
        )
    return torch.cholesky_solve((aimed + ridge * prior).T, factor).T


def held_out_dampings(
    gram: Tensor,
    crosses: Sequence[Tensor],
    held_out_gram: Tensor,
    held_out_crosses: Sequence[Tensor],
    towards: Sequence[Tensor],
    dampings: tuple[float, ...] = DAMPINGS,
) -> list[float]:
    """For each matrix the damping whose refit on sums over some tokens errs least on those of others.

    `gram [K', K']` of x xᵀ, for each matrix a `cross [N, K']` of y xᵀ, sums over the tokens that are fitted;
    `held_out_gram` and `held_out_crosses` those over the others. `towards`: for each `[N, K']`, as in `reform`.
    """
    inner, vectors = torch.linalg.eigh(gram.double())
    held, ridge = held_out_gram.double(), float(inner.mean())
    if not ridge:  # inputs that are zero
        return [dampings[-1]] * len(crosses)
    chosen = []
    for cross, held_out, start in zip(crosses, held_out_crosses, towards, strict=True):
        prior, aimed = start.double(), held_out.double()
        residual = (cross.double() - prior @ gram.double()) @ vectors
        errors = []
        for damping in dampings:
            fitted = prior + (residual / (inner + damping * ridge)) @ vectors.T
            errors.append(float(((fitted @ held - 2 * aimed) * fitted).sum()))
        chosen.append(dampings[min(range(len(dampings)), key=errors.__getitem__)])
    return chosen


def compensation(weight: Tensor, mean: Tensor, kept: Tensor) -> Tensor:
    """The bias that stands for removed inputs by their mean (`[K]`), `[N]` float64.

    Reference: arXiv:2312.11983.
    """
    gone = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
    gone[kept] = False
    return weight.double()[:, gone] @ mean.double()[gone]


def reform_admm(weight: Tensor, gram: Tensor, kept: Tensor, rho: float = 1.0, iterations: int = 30) -> Tensor:
    """The published iteration towards `reform(weight, gram, kept, damping=0)`, `[N, K']` float64.

    The Gram matrix is scaled to a mean diagonal of one, which is what gives `rho` a meaning. The step of `Z` takes
    `(Ŵ + U)` off the removed columns, `⊙ (1 - M)`: the paper prints `⊙ M`, which keeps them and drops the others.

    Reference: arXiv:2409.17372, section 3.3.
    """
    weight = weight.double()
    if not bool(gram.any()):
        return weight[:, kept]
    scaled = gram.double() / gram.double().diagonal().mean()
    stays = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    stays[kept] = 1
    system = scaled + rho * torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    factor = torch.linalg.cholesky(system)
    aimed = weight @ scaled
    z, u = weight * stays, torch.zeros_like(weight)
    for _ in range(iterations):
        fitted = torch.cholesky_solve((aimed + rho * (z - u)).T, factor).T
        z = (fitted + u) * stays
        u = u + fitted - z
    return z[:, kept]
