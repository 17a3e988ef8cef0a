"""Rate-distortion curves: the choice that a budget leaves."""

import torch

from pycompress.methods.registry import Curve


def test_a_budget_of_exactly_its_bytes_buys_a_choice():
    curve = Curve(torch.tensor([30, 10, 20]), torch.tensor([0.1, 0.4, 0.2]), 1.0, torch.tensor([7, 8, 9]))
    assert [curve.best(budget) for budget in (9, 10, 19, 20, 29, 30, 99)] == [-1, 8, 8, 9, 9, 7, 7]
