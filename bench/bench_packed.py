"""Packed layers at about 4.5 bits a weight beside bitsandbytes' NF4 and the dense F.linear, one token in bfloat16.

int4 holds the whole matrix at 4.25 bits a weight; int8 holds shared channels and a correction in the bytes of NF4. On a
processor without AVX512-BF16 bitsandbytes has no kernel for one token, and restores the weight on each call.
"""

import itertools

import pytest
import torch
from torch.nn.functional import linear

from pycompress.formats import codes as storage
from pycompress.ops import shared_linear

N, K, RANK = 4096, 11008, 64
NF4_BYTES = N * K // 2 + N * K // 64 * 4  # a float32 scale for 64 weights
WHO = ["pycompress", "int4, whole matrix", "int8, whole matrix", "bitsandbytes NF4", "dense F.linear"]


def packed(rows, n, kind, generator):
    lowest, highest = storage.RANGE[kind]
    codes = torch.randint(lowest, highest + 1, (rows, n), generator=generator, dtype=torch.int8)
    scales = torch.rand(storage.scales_shape(rows, n, kind), generator=generator) / (highest * K**0.5)
    return storage.pack(codes, kind), scales.bfloat16()


def make_shared(kind, clusters, rank, generator):
    """An output-sharing layer; a cluster for each row and no correction is the matrix itself."""
    weight, weight_scales = packed(clusters + rank, K, kind, generator)
    factor, factor_scales = packed(N, rank, kind, generator)
    rows = torch.arange(N) if clusters == N else torch.randint(0, clusters, (N,), generator=generator)
    return weight, factor, rows.to(torch.int16), None, None, weight_scales, factor_scales


def make_nf4(weight):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    layer = bitsandbytes.nn.Linear4bit(
        K, N, bias=False, compute_dtype=torch.bfloat16, compress_statistics=False, quant_type="nf4"
    )
    layer.weight.data = weight
    return layer.to("cpu").eval()


def clusters_of(nbytes):
    """Clusters that take at most `nbytes` in int8, labels and a correction of rank RANK included."""
    row, factor = storage.stored_bytes(1, K, "int8", 2), storage.stored_bytes(N, RANK, "int8", 2)
    return (nbytes - factor - 2 * N) // row - RANK


@pytest.mark.parametrize("who", WHO)
def test_one_token_at_four_bits(race, cold_copies, who):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, K, generator=generator).bfloat16()
    weight = (torch.randn(N, K, generator=generator) / K**0.5).bfloat16()
    if who == "bitsandbytes NF4":
        tensors, nbytes = (make_nf4(weight),), NF4_BYTES
        run = lambda layer: layer(x)  # noqa: E731
    elif who == "dense F.linear":
        tensors, nbytes = (weight,), weight.nbytes
        run = lambda weight: linear(x, weight)  # noqa: E731
    else:
        kind, clusters, rank = (who[:4], N, 0) if "whole" in who else ("int8", clusters_of(NF4_BYTES), RANK)
        tensors = make_shared(kind, clusters, rank, generator)
        nbytes = sum(t.nbytes for t in tensors if t is not None)
        run = lambda *tensors: shared_linear(x, *tensors, share="output")  # noqa: E731
        exact = storage.dequantize(tensors[0], tensors[5]).double() @ x[0].double()
        expected = exact[:clusters][tensors[2].long()]
        if rank:
            expected += storage.dequantize(tensors[1], tensors[6]).double() @ exact[clusters:]
        assert (run(*tensors)[0].double() - expected).norm() <= 1e-2 * expected.norm()
    sets = itertools.cycle([copy_of(tensors) for _ in range(cold_copies(nbytes))])
    with torch.inference_mode():
        race("bf16, 1 token, 4096x11008", who, run, setup=lambda: (next(sets), {}), rounds=30, bytes=nbytes)


def copy_of(tensors):
    if isinstance(tensors[0], torch.nn.Module):
        return (make_nf4(torch.randn(N, K).bfloat16()),)
    return tuple(t if t is None else t.clone() for t in tensors)
