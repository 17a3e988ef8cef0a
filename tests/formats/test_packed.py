"""Packed weights stand for the matrix they were made from, in the bytes they say."""

import pytest
import torch

from pycompress.formats.packed import Rounded, pack_shared, rebuild

SIZES = [(63, 100, 20, 5), (100, 63, 63, 0), (128, 64, 33, 9), (64, 64, 1, 1)]


def parts(share, n, k, r, clusters):
    generator = torch.Generator().manual_seed(n + r)
    u, v = torch.randn(n, r, generator=generator), torch.randn(r, k, generator=generator)
    channels, width = (n, k) if share == "output" else (k, n)
    centroids = torch.randn(clusters, width, generator=generator)
    labels = torch.randint(0, clusters, (channels,), generator=generator) if clusters else None
    dense = u.double() @ v.double()
    if labels is not None:
        shared = centroids.double()[labels]
        dense = dense + (shared if share == "output" else shared.T)
    return centroids, u, v, labels, dense


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", ["output", "input"])
def test_unpack_gives_the_sum_of_centroids_and_correction(share, size, pivot):
    centroids, u, v, labels, dense = parts(share, *size)
    packed = pack_shared(share, centroids, u, v, labels, torch.float32, pivot)
    torch.testing.assert_close(packed.unpack().double(), dense, rtol=1e-4, atol=1e-4)
    assert (packed.clusters, packed.rank, packed.shape) == (size[3], size[2], size[:2])


@pytest.mark.parametrize("share", ["output", "input"])
def test_pivots_save_rank_squared_numbers_and_cost_one_index_a_channel(share):
    n, k, r, clusters = 128, 64, 33, 9
    centroids, u, v, labels, _ = parts(share, n, k, r, clusters)
    full = pack_shared(share, centroids, u, v, labels, torch.bfloat16, pivot=False)
    pivoted = pack_shared(share, centroids, u, v, labels, torch.bfloat16, pivot=True)
    assert full.nbytes - pivoted.nbytes == 2 * r * r - 2 * (n if share == "output" else k)


def test_pivoted_entries_stay_near_one():
    """Large entries would lose accuracy in 16 bits."""
    u = torch.linalg.qr(torch.randn(1024, 300, generator=torch.Generator().manual_seed(0))).Q
    packed = pack_shared("output", torch.zeros(0, 640), u, torch.randn(300, 640), None, torch.float32)
    assert packed.factor.abs().max() < 20
    assert packed.factor.abs().mean() < 1


@pytest.mark.parametrize("share", ["output", "input"])
def test_nbytes_is_what_the_tensors_take(share):
    centroids, u, v, labels, _ = parts(share, 63, 100, 20, 5)
    packed = pack_shared(share, centroids, u, v, labels, torch.float16)
    assert packed.nbytes == sum(t.numpy().nbytes for t in packed.tensors().values())


def test_spec_and_tensors_rebuild_the_packed_weight():
    for packed in (
        pack_shared("input", *parts("input", 63, 100, 20, 5)[:4], torch.float32),
        Rounded(torch.ones(3, 4), 3, 3),
    ):
        again = rebuild(packed.spec(), packed.tensors())
        assert again.spec() == packed.spec()
        assert torch.equal(again.unpack(), packed.unpack())


def test_rebuild_refuses_an_unknown_format():
    with pytest.raises(ValueError, match="unknown format 'ternary'"):
        rebuild({"format": "ternary", "shape": [1, 1]}, {})


def test_more_channels_than_16_bits_get_wider_indices():
    u, v = torch.randn(40_000, 1), torch.randn(1, 2)
    packed = pack_shared("output", torch.randn(3, 2), u, v, torch.arange(40_000) % 3, torch.float32)
    assert packed.labels.dtype == packed.channels.dtype == torch.int32
    torch.testing.assert_close(packed.unpack(), packed.weight[:3][torch.arange(40_000) % 3] + u @ v)


def test_rounded_counts_packed_codes_and_scales():
    assert Rounded(torch.zeros(8, 64), bits=3, scales=8).nbytes == 8 * 64 * 3 // 8 + 8 * 4
