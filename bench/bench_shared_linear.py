"""The shared-channel linear against the dense F.linear and against its own formula in plain torch.

Each round takes another set of weights, together more than twice the last-level cache, as a model's layers do.
"""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from pycompress.ops import shared_linear, subnet_linear

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


@pytest.mark.parametrize("who", ["pycompress", "dense by our kernel", "dense F.linear", "plain read"])
@pytest.mark.parametrize("keep", [0.5, 0.2, 0.1])
@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize("tokens", [1, 128])
def test_large_layer(race, cold_copies, tokens, share, keep, who):
    """A down projection of a 7B model at rank 64; the plain read is of as many bytes as our layer has.

    One token's calls follow each other at once, as those of a decoder's layers do.
    """
    outputs, inputs, rank = 4096, 11008, 64
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, inputs, generator=generator).bfloat16()
    length, other = (inputs, outputs) if share == "output" else (outputs, inputs)
    clusters = int((keep * outputs * inputs - other * rank) / length) - rank
    stacked = (clusters + rank, inputs) if share == "output" else (outputs, clusters + rank)
    factor = (outputs, rank) if share == "output" else (rank, inputs)
    labels = torch.randint(0, clusters, (other,), generator=generator).to(torch.int16)
    ours = 2 * clusters * length + 2 * rank * (length + other)
    if who == "pycompress":
        shapes, run = (stacked, factor), lambda w, f: shared_linear(x, w, f, labels, share=share)
    elif who == "dense by our kernel":
        shapes, run = ((outputs, inputs),), lambda w: subnet_linear(x, w)
    elif who == "dense F.linear":
        shapes, run = ((outputs, inputs),), lambda w: linear(x, w)
    else:
        shapes, run = ((1, ours // 2),), lambda w: w[0, : ours // 4 * 2].view(torch.float32).sum()
    tensors = [(torch.randn(shape, generator=generator) / length**0.5).bfloat16() for shape in shapes]
    if who == "pycompress":
        expected = composite(x.double(), *(t.double() for t in tensors), labels, share)
        assert (run(*tensors).double() - expected).norm() <= 3e-2 * expected.norm()
    nbytes = sum(tensor.nbytes for tensor in tensors)
    sets = itertools.cycle([[tensor.clone() for tensor in tensors] for _ in range(cold_copies(nbytes))])
    race(
        f"bf16, {tokens} tokens, {outputs}x{inputs}, keep {keep}, share {share}",
        who,
        torch.inference_mode()(run),
        setup=lambda: (tuple(next(sets)), {}),
        rounds=15 if tokens == 1 else 7,
        calls=8 if tokens == 1 else 1,
        flops=2 * tokens * sum(tensor.numel() for tensor in tensors),
        bytes=nbytes,
    )
