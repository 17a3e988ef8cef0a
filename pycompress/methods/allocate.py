"""Allocates one budget of bytes to many matrices, by the error each byte saves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pycompress.methods.registry import Curve, lower_hull


@dataclass(frozen=True)
class Hull:
    """The lower convex hull of a curve: `nbytes` rising, `error` falling, each step saving less a byte."""

    nbytes: np.ndarray
    error: np.ndarray


def hull(curve: Curve, weight: float) -> Hull:
    """The choices of a curve that are best for some price of a byte, their errors times `weight`."""
    nbytes, error = curve.nbytes.numpy(), weight * curve.error.numpy()
    chosen = lower_hull(nbytes, error)
    return Hull(nbytes[chosen], error[chosen])


def allocate(curves: dict[str, Curve], weights: dict[str, float], budget: int) -> dict[str, int]:
    """Bytes for each matrix, at most `budget` in all, with the least weighted sum of errors (on the convex hulls).

    Raises `ValueError` when even the smallest choices do not fit.
    """
    hulls = {name: hull(curve, weights[name]) for name, curve in curves.items()}
    given = {name: int(h.nbytes[0]) for name, h in hulls.items()}
    left = budget - sum(given.values())
    if left < 0:
        raise ValueError(
            f"the budget of {budget} bytes is below the {sum(given.values())} that the smallest packed form takes; "
            f"raise keep"
        )
    steps = [
        (-(h.error[i] - h.error[i + 1]) / (h.nbytes[i + 1] - h.nbytes[i]), name, int(h.nbytes[i]), int(h.nbytes[i + 1]))
        for name, h in hulls.items()
        for i in range(len(h.nbytes) - 1)
    ]
    for _, name, low, high in sorted(steps):
        if given[name] == low and high - low <= left:
            given[name] = high
            left -= high - low
    return given
