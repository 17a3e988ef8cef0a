"""The shared-channel linear against the dense F.linear and against its own formula in plain torch.

Each round takes another set of weights, together more than twice the last-level cache, as a model's layers do.
"""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from pycompress.ops import shared_linear

N, K = 2048, 2048
TOKENS = (1, 16, 256)
KEEPS = (0.5, 0.2)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def sizes(keep, share):
    """Clusters and rank that take `keep` of the dense bytes, half of them centroids."""
    channels = N if share == "output" else K
    width = (keep * N * K) / (N + K)
    clusters = int(width) // 2
    return clusters, int((keep * N * K - clusters * (K if share == "output" else N)) / (N + K)), channels


def make_shared(keep, share, dtype, generator):
    clusters, rank, channels = sizes(keep, share)
    stacked = (clusters + rank, K) if share == "output" else (N, clusters + rank)
    other = (N, rank) if share == "output" else (rank, K)
    weight = (torch.randn(stacked, generator=generator) / K**0.5).to(dtype)
    factor = (torch.randn(other, generator=generator) / K**0.25).to(dtype)
    labels = torch.randint(0, clusters, (channels,), generator=generator).to(torch.int16)
    return weight, factor, labels


def composite(x, weight, factor, labels, share):
    """The formula in torch operations."""
    clusters = weight.shape[0 if share == "output" else 1] - factor.shape[1 if share == "output" else 0]
    if share == "output":
        reduced = linear(x, weight)
        return reduced[:, labels.long()] + linear(reduced[:, clusters:], factor)
    sums = torch.zeros(len(x), clusters, dtype=torch.float32).index_add_(1, labels.long(), x.float())
    return linear(torch.cat([sums.to(x.dtype), linear(x, factor)], dim=1), weight)


def dense_of(weight, factor, labels, share):
    weight, factor = weight.double(), factor.double()
    clusters = weight.shape[0 if share == "output" else 1] - factor.shape[1 if share == "output" else 0]
    if share == "output":
        return weight[:clusters][labels.long()] + factor @ weight[clusters:]
    return weight[:, :clusters][:, labels.long()] + weight[:, clusters:] @ factor


@pytest.mark.parametrize("who", ["pycompress", "torch operations", "dense F.linear"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_shared_linear(race, cold_copies, tokens, share, keep, dtype, who):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, K, generator=generator).to(DTYPES[dtype])
    first = make_shared(keep, share, DTYPES[dtype], generator)
    runs = {
        "pycompress": lambda weight, factor, labels: shared_linear(x, weight, factor, labels, share=share),
        "torch operations": lambda weight, factor, labels: composite(x, weight, factor, labels, share),
        "dense F.linear": lambda weight: linear(x, weight),
    }
    dense = dense_of(*first, share)
    tensors = (dense.to(x.dtype),) if who == "dense F.linear" else first
    expected = x.double() @ dense.T
    tolerance = 1e-5 if dtype == "fp32" else 3e-2
    assert (runs[who](*tensors).double() - expected).norm() <= tolerance * expected.norm()

    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    sets = itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(cold_copies(nbytes))])
    multiplied = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    group = f"{dtype}, {tokens} tokens, {N}x{K}, keep {keep}, share {share}"
    rounds = 30 if tokens <= 16 else 10
    race(
        group,
        who,
        runs[who],
        setup=lambda: (tuple(next(sets)), {}),
        rounds=rounds,
        flops=2 * tokens * multiplied,
        bytes=nbytes,
    )
