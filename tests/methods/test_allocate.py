"""One budget over many matrices."""

import itertools

import numpy as np
import pytest
import torch

from pycompress.methods import Curve
from pycompress.methods.allocate import allocate, hull


def curve(*points):
    nbytes, error = zip(*points, strict=True)
    return Curve(torch.tensor(nbytes), torch.tensor(error, dtype=torch.float64), 1.0, torch.zeros(len(nbytes)))


def test_hull_is_scipys_lower_convex_hull():
    from scipy.spatial import ConvexHull

    rng = np.random.default_rng(0)
    nbytes = rng.permutation(1000)[:200]
    error = np.exp(-nbytes / 300) + 0.3 * rng.random(200)
    ours = hull(Curve(torch.tensor(nbytes), torch.tensor(error), 1.0, torch.zeros(len(nbytes))), 1.0)
    corners = ConvexHull(np.stack([nbytes, error], 1)).vertices
    best = int(np.argmin(error))
    least = int(np.argmin(nbytes))
    slope = (error[best] - error[least]) / (nbytes[best] - nbytes[least])
    chord = error[least] + slope * (nbytes - nbytes[least])
    lower = sorted(nbytes[i] for i in corners if nbytes[i] <= nbytes[best] and error[i] <= chord[i] + 1e-12)
    assert list(ours.nbytes) == lower


def test_allocation_is_optimal_among_hull_choices_when_the_budget_is_met_exactly():
    curves = {
        "a": curve((10, 1.0), (20, 0.4), (40, 0.1), (80, 0.0)),
        "b": curve((10, 1.0), (30, 0.2), (80, 0.0)),
        "c": curve((5, 1.0), (10, 0.9), (80, 0.0)),
    }
    weights = {"a": 1.0, "b": 3.0, "c": 0.5}

    def total(given):
        return sum(weights[n] * float(curves[n].error[curves[n].nbytes == given[n]]) for n in curves)

    given = allocate(curves, weights, 75)
    best = min(
        (
            dict(zip(curves, choice, strict=True))
            for choice in itertools.product(*(c.nbytes.tolist() for c in curves.values()))
            if sum(choice) <= 75
        ),
        key=total,
    )
    assert sum(given.values()) <= 75
    assert total(given) == pytest.approx(total(best))


def test_a_heavier_matrix_gets_more_bytes():
    points = [(b, 1 / b) for b in range(10, 100, 10)]
    given = allocate({"light": curve(*points), "heavy": curve(*points)}, {"light": 1.0, "heavy": 50.0}, 110)
    assert given["heavy"] > given["light"]


def test_a_budget_below_the_smallest_forms_is_refused():
    with pytest.raises(ValueError, match="raise keep"):
        allocate({"a": curve((10, 1.0), (20, 0.0))}, {"a": 1.0}, 9)
