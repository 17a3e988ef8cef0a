"""Which units of a group matter: scores from weights and statistics, and the order in which to remove them.

A unit is what is removed at once. It covers rows of the linears that write the group's channels and columns of those
that read them, given as index matrices, one row a unit: fused matrices and heads that share keys need no code here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# A share of the mean of a Gram matrix's diagonal, added to that diagonal before it is inverted.
DAMPING = 1e-2
# How many units one step of an elimination removes: one in so many of those that are left.
STEP = 12


def inverse(gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Inverse of `gram [K, K]` with `damping` times the mean of its diagonal added to that diagonal, float64."""
    return torch.cholesky_inverse(torch.linalg.cholesky(damped(gram, damping)))


def damped(gram: Tensor, damping: float) -> Tensor:
    """`gram [K, K]` with `damping` times the mean of its diagonal added to that diagonal, float64.

    Raises `ValueError` for a Gram matrix that is zero or not finite.
    """
    gram = gram.double()
    mean = float(gram.diagonal().mean())
    if not 0 < mean < torch.inf:
        raise ValueError(
            f"the Gram matrix has a diagonal of mean {mean}, where only finite values above 0 serve; give calibration "
            f"data that reaches this linear"
        )
    return gram + damping * mean * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)


def phi(weight: Tensor, gram: Tensor, damping: float = DAMPING) -> Tensor:
    """Importance of each weight, `[N, K]` float64: `W_ij² / [(2 X Xᵀ)⁻¹]_jj`, half of it being the squared output error
    when weight ij is removed and the others of its row compensate for it. Zero where all inputs are.

    `weight [N, K]`; `gram [K, K]`: mean of x xᵀ, here in place of the sum. `damping`: as in `inverse`.
    Reference: arXiv:2409.17372, section 3 (weight importance).
    """
    if not bool(gram.any()):
        return torch.zeros_like(weight, dtype=torch.float64)
    return 2 * weight.double().square() / inverse(gram, damping).diagonal()


def row_scores(values: Tensor, units: Tensor) -> Tensor:
    """Sum of `values [N, K]` over the rows that each unit covers (`units [..., U, R]`), `[..., U]`."""
    return values.sum(1)[units].sum(-1)


def column_scores(values: Tensor, units: Tensor) -> Tensor:
    """Sum of `values [N, K]` over the columns that each unit covers (`units [..., U, C]`), `[..., U]`."""
    return values.sum(0)[units].sum(-1)


@dataclass(frozen=True)
class Elimination:
    """`order [S, U]` int64: the units of each set, the first to remove first. `error [U]` float64: what 0, 1, …
    removals from each set cost, the last unit staying; never falling.
    """

    order: Tensor
    error: Tensor

    def kept(self, count: int) -> Tensor:
        """The `count` units of each set that stay longest, ascending, `[S, count]`."""
        return self.order[:, self.order.shape[1] - count :].sort(1).values


def eliminate(
    weight: Tensor,
    gram: Tensor,
    units: Tensor,
    sensitivity: Tensor | None = None,
    damping: float = DAMPING,
    step: int = STEP,
) -> Elimination:
    """Remove units of columns one after the other, each time those whose loss the others can best compensate for.

    Removing the columns R of `Ŵ` and refitting the others costs `tr(Ŵ_R [P_RR]⁻¹ Ŵ_Rᵀ)`, `P` the inverse Gram matrix of
    the columns that are left: the optimal brain surgeon (Hassibi and Stork, 1993), for columns in place of weights.
    The masks are nested, so that one elimination serves every width.

    `weight [N, K]`; `gram [K, K]`: mean of x xᵀ. `units [S, U, C]`: the columns of each unit, in sets that lose a unit
    each at a time. `sensitivity`: what an error at each output costs, `[N]`, or at pairs of outputs, `[N, N]`;
    the same for all where it is None. `step`: a step removes one unit in so many of those left, at least one; within
    a step the error is interpolated. `damping`: as in `inverse`. Arithmetic is in float64.
    """
    sets, count, width = units.shape
    if not bool(gram.any()):  # inputs that are zero, as those of o behind a v of zeros
        return Elimination(torch.arange(count).repeat(sets, 1), torch.zeros(count, dtype=torch.float64))
    inverted = inverse(gram, damping)
    weighted = _weighted(weight, sensitivity)
    left = torch.arange(count, device=weight.device).repeat(sets, 1)
    columns = units.to(weight.device)
    order: list[Tensor] = []
    error = [torch.zeros(1, dtype=torch.float64)]
    while left.shape[1] > 1:
        removed = max(1, min(left.shape[1] // step, left.shape[1] - 1))
        cost = _costs(weighted, inverted, columns.reshape(-1, width)).view(sets, -1)
        ranked = cost.argsort(1)
        chosen, rest = ranked[:, :removed], ranked[:, removed:].sort(1).values
        order.append(left.gather(1, chosen))
        gone, stay = _gather(columns, chosen).flatten(), _gather(columns, rest).flatten()
        lost = inverted[gone]
        factor = torch.linalg.cholesky(lost[:, gone])
        solved = torch.cholesky_solve(lost, factor)[:, stay]
        weighted_lost = weighted[:, gone]
        step_error = float(torch.linalg.solve_triangular(factor, weighted_lost.T, upper=False).square().sum())
        share = torch.arange(1, removed + 1, dtype=torch.float64) / removed
        error.append(error[-1][-1] + step_error * share)
        weighted = weighted[:, stay].sub_(weighted_lost @ solved)
        inverted = inverted[stay[:, None], stay].sub_(inverted[stay[:, None], gone] @ solved)
        left = left.gather(1, rest)
        columns = torch.arange(len(stay), device=weight.device).view(sets, -1, width)
    order.append(left)
    return Elimination(torch.cat(order, 1).cpu(), torch.cat(error))


def eliminate_unread(moments: Tensor, covariance: Tensor, units: Tensor) -> Elimination:
    """Remove units of outputs that nothing can compensate for, one after the other, those that cost the least first.

    Removing the outputs R costs `Σ_ij∈R C_ij Y_ij`, the loss's second-order change by the empirical Fisher information
    where outputs and gradients are taken to be independent, as `eliminate` takes them.

    `moments [N, N]`: Y, mean of y yᵀ of the outputs; `covariance [N, N]`: C, of the loss's gradients by them; `units
    [U, R]`: the outputs of each unit. One set.
    """
    costs = (moments.double() * covariance.double())[units].sum(1)
    between = torch.stack([costs[:, outputs].sum(1) for outputs in units], 1)
    marginal, total = between.diagonal().clone(), 0.0
    order: list[int] = []
    error = [0.0]
    for _ in range(len(units) - 1):
        unit = int(marginal.argmin())
        total += float(marginal[unit])
        order.append(unit)
        error.append(max(error[-1], total))
        marginal += 2 * between[unit]
        marginal[unit] = torch.inf
    order.append(int(marginal.argmin()))
    return Elimination(torch.tensor([order]), torch.tensor(error, dtype=torch.float64))


def _weighted(weight: Tensor, sensitivity: Tensor | None) -> Tensor:
    """The weight with outputs scaled so that squared errors count as the sensitivity says, float64."""
    weight = weight.double()
    if sensitivity is None:
        return weight
    if sensitivity.ndim == 1:
        return sensitivity.double().sqrt()[:, None] * weight
    values, vectors = torch.linalg.eigh(sensitivity.double())
    return values.clamp(min=0).sqrt()[:, None] * (vectors.T @ weight)


def _costs(weighted: Tensor, inverted: Tensor, columns: Tensor) -> Tensor:
    """Error of removing each unit (`columns [U, C]`) alone, `[U]`."""
    if columns.shape[1] == 1:
        return (weighted * (weighted * (1 / inverted.diagonal()))).sum(0)[columns[:, 0]]
    own = weighted[:, columns].permute(1, 2, 0)
    solved = torch.linalg.solve(inverted[columns[:, :, None], columns[:, None, :]], own)
    return (own * solved).sum((1, 2))


def _gather(columns: Tensor, chosen: Tensor) -> Tensor:
    return columns.gather(1, chosen[:, :, None].expand(-1, -1, columns.shape[2]))
