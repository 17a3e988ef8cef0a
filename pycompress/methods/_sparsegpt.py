"""SparseGPT: weights of a row become zero one after another, and those that follow compensate for each.

Reference: arXiv:2301.00774, algorithm 1; the order of N:M groups is arXiv:2210.17323's of columns ("act order").
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycompress.methods._gptq import PANEL, inverse_cholesky
from pycompress.ops.panel import prune_panel


def least(scores: Tensor, count: int) -> Tensor:
    """Where the `count` lowest of the last dimension of `scores` are, bool; of equal ones the first."""
    order = scores.argsort(dim=-1, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order[..., :count], True)


def sparsegpt(weight: Tensor, gram: Tensor, sparsity: float, group: tuple[int, int] | None = None) -> Tensor:
    """`weight [N, K]` with zeros, the rest of each row changed so that its outputs change least, float32.

    `gram [K, K]`: mean of x xᵀ over the inputs. `sparsity`: share of zeros of every 128 columns, chosen among all rows
    when the columns before them are done. `group`: (n, m), to keep n of every m columns of a row instead, the groups of
    the largest inputs first: those that follow can compensate for them.
    """
    if group is not None:
        order = _by_energy(gram, group[1])
        pruned = torch.empty_like(weight, dtype=torch.float32)
        pruned[:, order] = _pruned(weight[:, order], gram[order][:, order], sparsity, group)
        return pruned
    return _pruned(weight, gram, sparsity, None)


def _by_energy(gram: Tensor, size: int) -> Tensor:
    """Columns in groups of `size`, the group with the largest mean square first."""
    groups = gram.diagonal().unflatten(0, (-1, size)).sum(1).argsort(descending=True, stable=True)
    return (groups[:, None] * size + torch.arange(size, device=gram.device)).flatten()


def _pruned(weight: Tensor, gram: Tensor, sparsity: float, group: tuple[int, int] | None) -> Tensor:
    """As `sparsegpt`, column after column as they are given."""
    # Of an input that is always zero the weights are worth nothing.
    rest = weight.float().masked_fill(gram.diagonal() == 0, 0).T.contiguous()
    columns, factor = len(rest), inverse_cholesky(gram)
    prices = factor.diagonal().square()[:, None]
    keep, size = group or (0, 1)
    step = max(PANEL // size, 1) * size
    for first in range(0, columns, step):
        outer = slice(first, min(first + step, columns))
        gone = None
        if group is None:
            costs = (rest[outer].square() / prices[outer]).T
            gone = least(costs.flatten(), round(sparsity * costs.numel())).view_as(costs).T
        elif size > PANEL:  # a group of several panels is chosen when its first column's turn comes
            gone = least((rest[outer].square() / prices[outer]).T, size - keep).T
        for start in range(first, outer.stop, PANEL):
            panel = slice(start, min(start + PANEL, outer.stop))
            mask = None if gone is None else gone[panel.start - first : panel.stop - first]
            rest[panel], lost = prune_panel(rest[panel], factor[panel, panel], mask, keep=keep, size=size)
            rest[panel.stop :].addmm_(factor[panel, panel.stop :].T, lost, alpha=-1)
    return rest.T.contiguous()
