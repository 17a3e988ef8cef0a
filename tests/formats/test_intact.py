"""Tensors of packed weights against their specs: what is packed passes, what was changed is refused by name."""

import pytest
import torch

from pycompress.formats import codes as storage
from pycompress.formats.intact import check_tensors
from pycompress.formats.packed import Rounded, SharedChannels, pack_shared, pack_zeros

GENERATOR = torch.Generator().manual_seed(0)


def shared(share, clusters, rank, pivot, dtype=torch.float32, shape=(48, 80)):
    n, k = shape
    length, channels = (k, n) if share == "output" else (n, k)
    labels = torch.randint(clusters, (channels,), generator=GENERATOR) if clusters else None
    parts = [torch.randn(*size, generator=GENERATOR) for size in ((clusters, length), (n, rank), (rank, k))]
    return pack_shared(share, *parts, labels, dtype, pivot)


def coded(share, kind):
    """In codes: 64 centroids and rank 32 or whole blocks of both."""
    floats = shared(share, 32, 32, True, shape=(64, 96))
    parts = {}
    for name in ("weight", "factor"):
        rows, n = getattr(floats, name).shape
        codes = torch.randint(-7, 8, (rows, n), generator=GENERATOR, dtype=torch.int8)
        parts[name] = storage.pack(codes, kind)
        parts[f"{name}_scales"] = torch.rand(storage.scales_shape(rows, n, kind), generator=GENERATOR)
    return SharedChannels(share, labels=floats.labels, channels=floats.channels, shape=(64, 96), **parts)


def zeros(shape=(40, 72), share=0.7):
    return torch.randn(shape, generator=GENERATOR) * (torch.rand(shape, generator=GENERATOR) > share)


def two_of_four(shape=(24, 64)):
    dense = torch.randn(shape, generator=GENERATOR).reshape(-1, 4)
    dense[:, [1, 2]] = 0
    return pack_zeros(dense.reshape(shape), of_four=True)


SOUND = {
    "output": shared("output", 5, 7, False),
    "input pivoted": shared("input", 5, 7, True, torch.bfloat16),
    "clusters alone": shared("input", 5, 0, False),
    "low rank": shared("output", 0, 9, True, torch.float16),
    "whole by rows": shared("output", 0, 48, True),
    "whole by columns": shared("input", 0, 80, True, shape=(96, 80)),
    "many channels": shared("output", 3, 2, True, shape=(40_000, 4)),
    "int8": coded("output", "int8"),
    "int4": coded("input", "int4"),
    "rounded": Rounded(torch.randn(6, 10), 4, 6),
    "bitmap": pack_zeros(zeros()),
    "empty bitmap": pack_zeros(torch.zeros(17, 65)),
    "2:4": two_of_four(),
}


@pytest.mark.parametrize("packed", SOUND.values(), ids=SOUND)
def test_what_is_packed_passes(packed):
    check_tensors("q", packed.spec(), packed.tensors())
    meta = {part: tensor.to("meta") for part, tensor in packed.tensors().items()}
    check_tensors("q", packed.spec(), meta)


@pytest.mark.parametrize("packed", SOUND.values(), ids=SOUND)
def test_each_tensor_has_its_dtype_and_its_shape(packed):
    spec, tensors = packed.spec(), packed.tensors()
    for part, tensor in tensors.items():
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool):
            if dtype != tensor.dtype:
                with pytest.raises(ValueError, match=rf"q\.{part} must be .*, got {str(dtype)[6:]} \["):
                    check_tensors("q", spec, tensors | {part: tensor.to(dtype)})
        for other in (tensor[None], tensor.flatten()[:-1], torch.cat([tensor, tensor])):
            if other.shape != tensor.shape:
                with pytest.raises(ValueError, match=rf"q\.{part} must be "):
                    check_tensors("q", spec, tensors | {part: other})
        with pytest.raises(ValueError, match=rf"of .*\b{part}\b.*, but its tensors are "):
            check_tensors("q", spec, {name: each for name, each in tensors.items() if name != part})
    with pytest.raises(ValueError, match=r"but its tensors are .*spare"):
        check_tensors("q", spec, tensors | {"spare": torch.zeros(1)})


def changed(packed, part, at, value):
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    tensors[part].view(-1)[at] = value
    return packed.spec(), tensors


@pytest.mark.parametrize(
    ("packed", "part", "value", "message"),
    [
        ("output", "labels", 5, r"q\.labels must be 0 to 4, got 0 to 5"),
        ("input pivoted", "labels", -1, r"q\.labels must be 0 to 4, got -1 to 4"),
        ("input pivoted", "channels", 80, r"q\.channels must be each of 0 to 79 once"),
        ("low rank", "channels", -1, r"q\.channels must be each of 0 to 47 once"),
        ("int8", "weight", -128, r"q\.weight holds the code -128"),
        ("2:4", "positions", 0b0101_1000, r"q\.positions must be pairs"),
        ("2:4", "positions", 0b1000_0010, r"q\.positions must be pairs"),
        ("bitmap", "offsets", 3, r"q keeps \d+ values, but its bitmap"),
        ("bitmap", "bitmap", 255, r"q keeps \d+ values, but its bitmap"),
    ],
)
def test_values_out_of_range_are_refused(packed, part, value, message):
    spec, tensors = changed(SOUND[packed], part, 1, value)
    with pytest.raises(ValueError, match=message):
        check_tensors("q", spec, tensors)


def test_a_repeated_channel_is_no_permutation():
    packed = SOUND["low rank"]
    spec, tensors = changed(packed, "channels", 0, int(packed.channels[1]))
    with pytest.raises(ValueError, match="each of 0 to 47 once"):
        check_tensors("q", spec, tensors)


def test_bits_beyond_the_columns_are_refused():
    packed = pack_zeros(torch.eye(16, 72))
    tensors = {name: tensor.clone() for name, tensor in packed.tensors().items()}
    # The first row's bit goes from column 0 to 72, which is not there: as many bits in the tile as before.
    tensors["bitmap"].view(-1)[0] = 0
    tensors["bitmap"].view(-1)[16 * 8 + 1] = 1
    with pytest.raises(ValueError, match=r"q\.bitmap has bits beyond its 72 columns"):
        check_tensors("q", packed.spec(), tensors)


def test_floats_of_two_dtypes_are_refused():
    packed = SOUND["output"]
    with pytest.raises(ValueError, match="must be of one dtype, got weight float16, factor float32"):
        check_tensors("q", packed.spec(), packed.tensors() | {"weight": packed.weight.half()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": ["zip"]}, r"unknown format \['zip'\]"),
        ({"format": "zip"}, "unknown format 'zip'"),
        ({"shape": [48]}, "needs a shape of two sizes"),
        ({"shape": [48, 10**12]}, "needs a shape of two sizes"),
        ({"shape": [True, 80]}, "needs a shape of two sizes"),
        ({"share": "both"}, "share of q must be output or input, got 'both'"),
        ({"clusters": -1}, "clusters of q must be an integer from 0"),
        ({"clusters": 10**9}, "clusters of q must be an integer from 0"),
        ({"rank": 2.0}, "rank of q must be an integer from 0"),
        ({"rank": 60, "pivoted": True}, "rank 60, but only 48 channels"),
        ({"pivoted": 1}, "pivoted of q must be True or False"),
        ({"storage": "int2"}, "storage of q must be float or int8 or int4"),
        ({"storage": "int4"}, "int4 stores rows of a multiple of 32"),
    ],
)
def test_specs_that_say_nothing_are_refused(change, message):
    packed = SOUND["output"]
    with pytest.raises(ValueError, match=message):
        check_tensors("q", packed.spec() | change, packed.tensors())
    with pytest.raises(ValueError, match="q has no format"):
        check_tensors("q", {}, packed.tensors())
