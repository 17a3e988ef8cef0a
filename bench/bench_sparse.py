"""Layers whose zeros are not stored, against our dense kernel and F.linear over the same weight with its zeros.

Each round takes another set of weights, together more than twice the last-level cache, as a model's layers do.
"""

import itertools
import time

import pytest
import torch
from torch.nn.functional import linear

from pycompress.formats.zeros import pack24, pack_bitmap
from pycompress.ops import bitmap_linear, sparse24_linear, subnet_linear

N, K = 4096, 11008
TOKENS = (1, 128)
SETTLED = 4  # seconds
ZEROS = {"2:4": None, "60% zeros": 0.6, "70% zeros": 0.7, "80% zeros": 0.8, "90% zeros": 0.9}


@pytest.fixture(scope="module", params=ZEROS)
def sparse(request, cold_copies):
    """The name of a kind of zeros, sets of its packed weight, and sets of the weight with its zeros."""
    generator, share = torch.Generator().manual_seed(0), ZEROS[request.param]
    draws = torch.rand(N, K, generator=generator)
    kept = draws >= share if share else (draws.view(N, K // 4, 4).argsort(-1) < 2).view(N, K)
    dense = (torch.randn(N, K, generator=generator) / K**0.5 * kept).bfloat16()
    packed = pack_bitmap(dense) if share else pack24(dense)
    sets = [tuple(t.clone() for t in packed) for _ in range(cold_copies(sum(t.nbytes for t in packed)))]
    # One core did all that. A virtual machine takes seconds to have the other back.
    until = time.perf_counter() + SETTLED
    while time.perf_counter() < until:
        subnet_linear(dense[:1], dense)
    return request.param, sets, [dense.clone() for _ in range(cold_copies(dense.nbytes))]


@pytest.mark.parametrize("who", ["pycompress", "dense, our kernel", "dense F.linear"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_sparse_linear(race, sparse, tokens, who):
    kind, packed, dense = sparse
    layer = sparse24_linear if kind == "2:4" else bitmap_linear
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(1)).bfloat16()
    runs = {
        "pycompress": lambda weight: layer(x, *weight),
        "dense, our kernel": lambda weight: subnet_linear(x, weight),
        "dense F.linear": lambda weight: linear(x, weight),
    }
    stored = packed if who == "pycompress" else dense
    expected = linear(x.float(), dense[0].float())
    assert (runs[who](stored[0]).float() - expected).norm() <= 1e-2 * expected.norm()
    sets = itertools.cycle(stored)
    race(
        f"bf16, {tokens} tokens, {N}x{K}, {kind}",
        who,
        torch.inference_mode()(runs[who]),
        setup=lambda: ((next(sets),), {}),
        rounds=60 if tokens == 1 else 10,
        calls=4 if tokens == 1 else 1,
        flops=2 * tokens * (packed[0][0].numel() if who == "pycompress" else N * K),
        bytes=sum(t.nbytes for t in packed[0]) if who == "pycompress" else 2 * N * K,
    )
