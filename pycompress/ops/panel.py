"""A panel of columns, each rounded or set to zero in its turn while those behind it compensate: the OBS update.

p columns of the panel, R rows of the matrix. A panel is `[p, R]`, a column's numbers side by side. `factor [p, p]` is
the panel's part of the upper Cholesky factor of the inverse Hessian, of which the upper triangle is read. What a column
loses, over its diagonal, is given back for the columns behind the panel: `rest -= factor[:p, p:].T @ lost`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycompress import _ext
from pycompress.ops._arguments import PrunePanelArgs, RoundPanelArgs
from pycompress.ops._checks import check_floats, check_tensors
from pycompress.ops._library import DTYPE_CODES, accumulator, dispatch, register, triton_kernel

Rounded = tuple[Tensor, Tensor, Tensor]  # codes, what was lost, the scales that were chosen
MOST_COLUMNS = 256  # of a panel, as in csrc/cpu/kernels.h


def limits_of(dtype: torch.dtype, high: int) -> tuple[float, float]:
    """The largest scale of a dtype with which its highest code is finite, and the smallest that is not zero."""
    limits = torch.finfo(dtype)
    return limits.max / high * (1 - limits.eps), limits.smallest_normal * limits.eps


def chosen_scale(group: Tensor, low: int, high: int, reductions: list[float], dtype: torch.dtype) -> Tensor:
    """Of groups `[..., columns, R]`, each row's scale that loses least by plain rounding, as `dtype` can hold it.

    With one code more below zero than above, a scale may be negative, so that the largest value takes that code.

    Parameters
    ----------
    group
        `[..., columns, R]`, float32 or float64.
    low, high
        The lowest and the highest code.
    reductions
        Shares of the largest magnitude to try as the end of the scale.
    dtype
        Of the scales.

    Returns
    -------
    Tensor
        `[..., R]` in the dtype of `group`, with values of `dtype`, none of them zero.
    """
    extreme = group.gather(-2, group.abs().argmax(-2, keepdim=True)).squeeze(-2)
    unit = torch.where(extreme == 0, 1.0, extreme.abs())
    ends = [unit / high] if low == -high else [unit / high, extreme / low]
    narrower = min(dtype, group.dtype, key=lambda each: torch.finfo(each).max)
    relative, (most, smallest) = group / unit.unsqueeze(-2), limits_of(narrower, high)
    best, least = unit, torch.full_like(unit, torch.inf)
    for end in ends:
        for reduction in reductions:
            held = (reduction * end).clamp(-most, most).to(dtype).to(group.dtype)
            scale = torch.where(held == 0, smallest, held)
            step = (scale / unit).unsqueeze(-2)
            codes = (relative / step).clamp_(low, high).round_()
            error = torch.addcmul(relative, codes, step, value=-1).square_().sum(-2)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def round_panel_ref(values: Tensor, factor: Tensor, scales: Tensor | None, *given: Any) -> Rounded:
    """Plain torch, a column at a time, in the dtype of the values."""
    low, high, group, reductions, dtype = given
    rest = values.to(accumulator(values.dtype)).clone()
    factor = factor.to(rest.dtype)
    codes, lost = torch.empty(values.shape, dtype=torch.int8, device=values.device), torch.empty_like(rest)
    made = rest.new_empty((-(-len(rest) // group), rest.shape[1])) if scales is None else scales.to(rest.dtype)
    for column in range(len(rest)):
        if scales is None and column % group == 0:
            made[column // group] = chosen_scale(rest[column : column + group], low, high, reductions, dtype)
        scale = made[column // group if scales is None else column]
        code = (rest[column] / scale).clamp_(low, high).round_()
        codes[column] = code
        lost[column] = (rest[column] - code * scale) / factor[column, column]
        rest[column + 1 :] -= factor[column, column + 1 :, None] * lost[column]
    return codes, lost, made if scales is None else rest.new_empty(0)


def prune_panel_ref(values: Tensor, factor: Tensor, gone: Tensor | None, keep: int, size: int) -> tuple[Tensor, Tensor]:
    """Plain torch, a column at a time, in the dtype of the values."""
    rest = values.to(accumulator(values.dtype)).clone()
    factor, lost = factor.to(rest.dtype), torch.empty_like(rest)
    prices = factor.diagonal().square()
    for column in range(len(rest)):
        if gone is None and column % size == 0:
            near = slice(column, column + size)
            order = (rest[near].square() / prices[near, None]).argsort(dim=0, stable=True)
            mask = torch.zeros_like(order, dtype=torch.bool).scatter_(0, order[: size - keep], True)
        zero = mask[column % size] if gone is None else gone[column]
        lost[column] = rest[column] * zero / factor[column, column]
        rest[column].masked_fill_(zero, 0)
        rest[column + 1 :] -= factor[column, column + 1 :, None] * lost[column]
    return rest, lost


def _check_panel(values: Tensor, factor: Tensor) -> None:
    check_floats(values=values, factor=factor)
    columns = len(values)
    if values.dim() != 2 or columns > MOST_COLUMNS:
        raise ValueError(f"values must be [p, R] with p of at most {MOST_COLUMNS}, got {list(values.shape)}")
    if factor.shape != (columns, columns):
        raise ValueError(f"factor must be [{columns}, {columns}], one for each column, got {list(factor.shape)}")


def _check_round(values: Tensor, factor: Tensor, scales: Tensor | None, *given: Any) -> None:
    low, high, group, reductions, dtype = given
    check_tensors({"values": values, "factor": factor}, {"scales": scales})
    _check_panel(values, factor)
    if scales is not None:
        check_floats(scales=scales)
    if not -128 <= low < 0 < high <= 127:
        raise ValueError(f"codes must reach from -128 or more below zero to at most 127, got {low} to {high}")
    if scales is not None and scales.shape != values.shape:
        raise ValueError(f"scales must be {list(values.shape)}, one for each value, got {list(scales.shape)}")
    if scales is None and (group < 1 or not reductions or not dtype.is_floating_point):
        asked = f"group {group}, reductions {list(reductions)}, {dtype}"
        raise ValueError(
            f"scales are chosen for groups of at least one column among reductions, as floats, got {asked}"
        )


def _check_prune(values: Tensor, factor: Tensor, gone: Tensor | None, keep: int, size: int) -> None:
    check_tensors({"values": values, "factor": factor}, {"gone": gone})
    _check_panel(values, factor)
    if gone is not None and (gone.dtype != torch.bool or gone.shape != values.shape):
        raise ValueError(f"gone must be bool {list(values.shape)}, got {gone.dtype} {list(gone.shape)}")
    if gone is None and (not 0 <= keep <= size or size < 1 or len(values) % size):
        raise ValueError(
            f"of every `size` columns `keep` are kept, and a panel has whole groups of them, got keep {keep}, size "
            f"{size} and {len(values)} columns"
        )


def _fake_round(values: Tensor, factor: Tensor, scales: Tensor | None, *given: Any) -> Rounded:
    group, dtype = given[2], accumulator(values.dtype)
    made = (-(-values.shape[0] // group), values.shape[1]) if scales is None else (0,)
    lost = values.new_empty(values.shape, dtype=dtype)
    return values.new_empty(values.shape, dtype=torch.int8), lost, values.new_empty(made, dtype=dtype)


def _fake_prune(values: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    kept = values.new_empty(values.shape, dtype=accumulator(values.dtype))
    return kept, torch.empty_like(kept)


def _plain(factor: Tensor) -> Tensor:
    """Float32 with contiguous rows; they may be apart."""
    factor = factor.float()
    return factor if factor.stride(1) == 1 else factor.contiguous()


def _round_cpu(values: Tensor, factor: Tensor, scales: Tensor | None, *given: Any) -> Rounded:
    _check_round(values, factor, scales, *given)
    low, high, group, reductions, dtype = given
    if values.dtype == torch.float64 or dtype not in DTYPE_CODES:
        return round_panel_ref(values, factor, scales, *given)
    values, factor = values.float().contiguous(), _plain(factor)
    columns, rows = values.shape
    codes, lost = torch.empty((columns, rows), dtype=torch.int8), torch.empty_like(values)
    choose = scales is None
    made = values.new_empty((-(-columns // group), rows)) if scales is None else scales.float().contiguous()
    _ext.C.round_panel(
        RoundPanelArgs(
            values=values,
            factor=factor,
            scales=made,
            reductions=torch.tensor(reductions, dtype=torch.float32),
            codes=codes,
            lost=lost,
            columns=columns,
            rows=rows,
            factor_stride=factor.stride(0),
            group=group,
            tries=len(reductions),
            low=low,
            high=high,
            most=limits_of(dtype, high)[0],
            least=limits_of(dtype, high)[1],
            dtype=DTYPE_CODES[dtype],
            choose=choose,
            threads=_ext.threads(),
        )
    )
    return codes, lost, made if choose else values.new_empty(0)


def _prune_cpu(values: Tensor, factor: Tensor, gone: Tensor | None, keep: int, size: int) -> tuple[Tensor, Tensor]:
    _check_prune(values, factor, gone, keep, size)
    if values.dtype == torch.float64:
        return prune_panel_ref(values, factor, gone, keep, size)
    values, factor = values.float().contiguous(), _plain(factor)
    kept, lost = torch.empty_like(values), torch.empty_like(values)
    _ext.C.prune_panel(
        PrunePanelArgs(
            values=values,
            factor=factor,
            gone=None if gone is None else gone.contiguous(),
            kept=kept,
            lost=lost,
            columns=values.shape[0],
            rows=values.shape[1],
            factor_stride=factor.stride(0),
            keep=keep,
            size=size,
            threads=_ext.threads(),
        )
    )
    return kept, lost


_launch_round, _launch_prune = (triton_kernel("panel", f"{name}_panel_cuda") for name in ("round", "prune"))


def _round_cuda(values: Tensor, factor: Tensor, scales: Tensor | None, *given: Any) -> Rounded:
    _, high, _, _, dtype = given
    if values.dtype == torch.float64 or dtype not in DTYPE_CODES:
        return round_panel_ref(values, factor, scales, *given)
    return _launch_round(values, factor, scales, *given, *limits_of(dtype, high))


def _prune_cuda(values: Tensor, factor: Tensor, gone: Tensor | None, keep: int, size: int) -> tuple[Tensor, Tensor]:
    launch = prune_panel_ref if values.dtype == torch.float64 else _launch_prune
    return launch(values, factor, gone, keep, size)


_round = register(
    "round_panel(Tensor values, Tensor factor, Tensor? scales, int low, int high, int group, float[] reductions, "
    "ScalarType dtype) -> (Tensor, Tensor, Tensor)",
    round_panel_ref,
    _fake_round,
    cpu=_round_cpu,
    cuda=_round_cuda,
    check=_check_round,
)
_prune = register(
    "prune_panel(Tensor values, Tensor factor, Tensor? gone, int keep, int size) -> (Tensor, Tensor)",
    prune_panel_ref,
    _fake_prune,
    cpu=_prune_cpu,
    cuda=_prune_cuda,
    check=_check_prune,
)


def round_panel(
    values: Tensor,
    factor: Tensor,
    scales: Tensor | None = None,
    *,
    low: int = -8,
    high: int = 7,
    group: int = 64,
    reductions: tuple[float, ...] = (1.0,),
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round the columns of a panel to codes, one after another, each compensated for by those behind it.

    Parameters
    ----------
    values
        `[p, R]`, at most 256 columns, float32, bfloat16, float16 or float64.
    factor
        `[p, p]`, the panel's part of the upper Cholesky factor of the inverse Hessian, its diagonal not zero.
    scales
        `[p, R]`, of each value; None: for every `group` columns a row's scale is chosen when their turn comes, of those
        that `reductions` of the largest magnitude give the one that loses least by plain rounding.
    low, high
        The lowest and the highest code, within int8.
    group
        Columns that share a scale.
    reductions
        Shares of the largest magnitude to try as the end of a scale.
    dtype
        Of the scales that are chosen.

    Returns
    -------
    tuple[Tensor, Tensor, Tensor]
        Codes `[p, R]` int8; what each column lost over its diagonal, `[p, R]`; the scales chosen,
        `[ceil(p / group), R]`, or none. The floats are float32, or float64 as the values.

    Raises
    ------
    ValueError
        For sizes that do not fit, and codes outside int8.
    TypeError
        For what are no floats.

    Examples
    --------
    >>> import torch
    >>> from pycompress.ops import round_panel
    >>> codes, lost, scales = round_panel(torch.tensor([[7.0], [3.0]]), torch.eye(2), group=2)
    >>> codes.T, scales
    (tensor([[7, 3]], dtype=torch.int8), tensor([[1.]]))

    Reference: arXiv:2210.17323, algorithm 1.
    """
    return dispatch(_round, values, factor, scales, low, high, group, list(reductions), dtype)


def prune_panel(
    values: Tensor, factor: Tensor, gone: Tensor | None = None, *, keep: int = 2, size: int = 4
) -> tuple[Tensor, Tensor]:
    """Set values of a panel to zero, column after column, each compensated for by the columns behind it.

    Parameters
    ----------
    values, factor
        As of `round_panel`.
    gone
        bool `[p, R]`, what becomes zero; None: of every `size` columns of a row all but `keep`, those whose square over
        that of the factor's diagonal is least when their turn comes, of equal ones the first.
    keep, size
        Of N:M sparsity; p is a multiple of `size`.

    Returns
    -------
    tuple[Tensor, Tensor]
        The values `[p, R]` with their zeros, and what each column lost over its diagonal, float32, or float64 as the
        values.

    Raises
    ------
    ValueError
        For sizes that do not fit.
    TypeError
        For what are no floats.

    Examples
    --------
    >>> import torch
    >>> from pycompress.ops import prune_panel
    >>> prune_panel(torch.tensor([[3.0], [1.0], [-2.0], [0.5]]), torch.eye(4))[0].T
    tensor([[ 3.,  0., -2.,  0.]])

    Reference: arXiv:2301.00774, algorithm 1.
    """
    return dispatch(_prune, values, factor, gone, keep, size)
