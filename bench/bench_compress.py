"""Seconds that one matrix of a 7B model takes to compress: clusters and rank given, its inputs' Gram matrix too."""

import pytest
import torch

from pycompress import SWSC
from pycompress.methods import METHODS, Statistics

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
RANK, KEEP = 64, 0.2


@pytest.mark.parametrize("who", ["pycompress"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_compress(race, shape, who):
    n, k = shape
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(n, k, generator=generator) / k**0.5).bfloat16()
    inputs = torch.randn(2 * k, k, generator=generator)
    statistics = Statistics(inputs.T @ inputs / len(inputs), len(inputs), torch.rand(n, generator=generator))
    config = SWSC(share="output", clusters=int((KEEP * n * k - n * RANK) / k) - RANK, rank=RANK)
    packed = []

    def compress():
        packed[:] = [METHODS[SWSC].compress(weight, statistics, config, None, None)]

    race(f"compress bf16 {n}x{k} to keep {KEEP}", who, compress, rounds=1)
    assert packed[0].nbytes <= KEEP * weight.nbytes * 1.01
    exact, left = weight.float(), weight.float() - packed[0].unpack()
    assert (left @ statistics.gram * left).sum() < (exact @ statistics.gram * exact).sum()
