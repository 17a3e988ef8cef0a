"""Half of a weight's rows, of its columns, or of both, in place, against the dense F.linear and a copy of that half.

Each round takes another set of weights, together more than twice the last-level cache, as a model's layers do.
"""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from pycompress.ops import subnet_linear

N, K = 4096, 11008
TOKENS = (1, 128)
# Rows, columns and whether the columns are what is contiguous.
PARTS = {
    "all": (False, False, False),
    "all, transposed": (False, False, True),
    "half the rows": (True, False, False),
    "half the columns": (False, True, False),
    "half the columns, transposed": (False, True, True),
    "half of both": (True, True, False),
    "half of both, transposed": (True, True, True),
}


@pytest.fixture(scope="module")
def weights(cold_copies):
    stored = torch.randn(N, K, generator=torch.Generator().manual_seed(0)).bfloat16() / K**0.5
    rows = [stored.clone() for _ in range(cold_copies(stored.nbytes))]
    return {False: rows, True: [weight.T.contiguous().T for weight in rows]}


def half(count):
    return torch.randperm(count, generator=torch.Generator().manual_seed(1))[: count // 2].sort().values


@pytest.mark.parametrize("who", ["pycompress", "all by our kernel", "copied part", "dense F.linear"])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_subnet_linear(race, weights, tokens, part, who):
    some_rows, some_columns, transposed = PARTS[part]
    rows, columns = half(N) if some_rows else None, half(K) if some_columns else None
    if who in ("copied part", "all by our kernel") and rows is None and columns is None:
        pytest.skip("all of the weight is what pycompress multiplies by")
    x = torch.randn(tokens, K, generator=torch.Generator().manual_seed(2)).bfloat16()
    small = x if columns is None else x[:, columns].contiguous()

    def copied(weight):
        weight = weight if rows is None else weight.index_select(0, rows)
        return linear(small, weight if columns is None else weight.index_select(1, columns))

    runs = {
        "pycompress": lambda weight: subnet_linear(small, weight, None, rows, columns),
        "all by our kernel": lambda weight: subnet_linear(x, weight),
        "copied part": copied,
        "dense F.linear": lambda weight: linear(x, weight),
    }
    # All of a weight is multiplied by as linear layers store it: the part is held against what it would replace.
    layout = transposed and who != "all by our kernel"
    first = weights[layout][0]
    expected = linear(small.float(), subnet_part(first, rows, columns).float())
    if who in ("pycompress", "copied part"):
        assert (runs[who](first).float() - expected).norm() <= 1e-2 * expected.norm()
    sets = itertools.cycle(weights[layout])
    used = len(expected[0]) * small.shape[1]
    nbytes = 2 * (used if who in ("pycompress", "copied part") else N * K)
    race(
        f"bf16, {tokens} tokens, {N}x{K}, {part}",
        who,
        torch.inference_mode()(runs[who]),
        setup=lambda: ((next(sets),), {}),
        rounds=10 if tokens == 1 else 5,
        calls=4 if tokens == 1 else 1,
        flops=2 * tokens * (nbytes // 2),
        bytes=nbytes,
    )


def subnet_part(weight, rows, columns):
    weight = weight if rows is None else weight[rows]
    return weight if columns is None else weight[:, columns]


def test_read(race, weights):
    """The fastest read that torch offers: one token's product in float32, over the same bytes."""
    sets = itertools.cycle([weight.view(torch.float32) for weight in weights[False]])
    x = torch.zeros(1, K // 2)
    race(
        f"bf16, 1 tokens, {N}x{K}, all",
        "read",
        linear,
        setup=lambda: ((x, next(sets)), {}),
        rounds=10,
        calls=4,
        bytes=2 * N * K,
    )


@pytest.mark.parametrize("who", ["pycompress", "dense F.linear"])
def test_call(race, who):
    """A layer so small that the call is what is timed, a hundred of them."""
    x, weight = torch.randn(1, 64), torch.randn(64, 64)
    run = subnet_linear if who == "pycompress" else linear

    def hundred():
        with torch.inference_mode():
            for _ in range(100):
                run(x, weight)

    race("fp32, 100 calls of 1 token, 64x64", who, hundred, rounds=30)
