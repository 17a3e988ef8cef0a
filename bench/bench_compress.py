"""Seconds that one matrix of a 7B model takes to compress, its inputs' Gram matrix given.

`fixed`: clusters and rank are given, as when one setting serves all layers. `searched`: sharing, clusters and rank are
chosen by the error curve, which is measured too.
"""

import pytest
import torch

from pycompress import SWSC
from pycompress.methods import METHODS, Statistics

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
RANK, KEEP = 64, 0.2


@pytest.mark.parametrize("who", ["pycompress"])
@pytest.mark.parametrize("choice", ["fixed", "searched"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compress(race, shape, choice, who):
    n, k = shape
    if choice == "searched" and n != k:
        pytest.skip("one shape shows what the search adds; the others take minutes")
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()
    inputs = torch.randn(2 * k, k, generator=generator)
    statistics = Statistics(inputs.T @ inputs / len(inputs), len(inputs), torch.rand(n, generator=generator))
    clusters = int((KEEP * n * k - n * RANK) / k) - RANK
    fixed = SWSC(share="output", clusters=clusters, rank=RANK)
    config = fixed if choice == "fixed" else SWSC(KEEP)
    method = METHODS[SWSC]
    packed = []

    def compress():
        measured = None if choice == "fixed" else method.curve(weight, statistics, config)
        budget = None if choice == "fixed" else int(KEEP * weight.nbytes)
        packed[:] = [method.compress(weight, statistics, config, budget, measured)]

    race(f"compress bf16 {n}x{k} to keep {KEEP}, {choice}", who, compress, rounds=1)
    assert packed[0].nbytes <= KEEP * weight.nbytes * 1.01
    exact, left = weight.float(), weight.float() - packed[0].unpack()
    assert (left @ statistics.gram * left).sum() < (exact @ statistics.gram * exact).sum()
