"""Codes and their layout against numpy, rounding against plain rounding and least squares in float64."""

import numpy as np
import pytest
import torch

from pycompress.formats import codes as storage
from pycompress.methods._gptq import quantize, round_shared


@pytest.mark.parametrize(("kind", "low", "high"), [("int8", -127, 127), ("int4", -8, 7)])
def test_codes_come_back_as_they_were(kind, low, high):
    codes = torch.randint(low, high + 1, (5, 96), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    stored = storage.pack(codes, kind)
    assert stored.shape == storage.stored_shape(5, 96, kind)
    assert storage.storage_of(stored) == kind
    assert storage.width_of(stored) == 96
    assert torch.equal(storage.codes_of(stored), codes)


def test_the_int4_layout_is_the_documented_one():
    codes = np.random.default_rng(0).integers(-8, 8, (3, 96))
    stored = storage.pack(torch.tensor(codes, dtype=torch.int8), "int4").numpy()
    for row in range(3):
        for byte in range(48):
            block, at = divmod(byte, 16)
            first, second = codes[row, 32 * block + at] + 8, codes[row, 32 * block + at + 16] + 8
            assert stored[row, byte] == first + 16 * second


@pytest.mark.parametrize(("kind", "n"), [("int8", 7), ("int4", 96), ("int4", 128), ("int4", 0), ("int8", 0)])
def test_values_are_codes_times_their_scales(kind, n):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (4, n), generator=generator).to(torch.int8)
    scales = torch.rand(storage.scales_shape(4, n, kind), generator=generator)
    wide = storage.dequantize(storage.pack(codes, kind), scales)
    group = n if kind == "int8" else 64
    expected = np.array([[codes[i, j] * scales[i, j // group] for j in range(n)] for i in range(4)]).reshape(4, n)
    np.testing.assert_allclose(wide.numpy(), expected, rtol=1e-6)
    held = storage.stored_bytes(4, n, kind, 4)
    assert held == storage.pack(codes, kind).nbytes + scales.nbytes


def test_int4_refuses_a_width_that_is_no_multiple_of_its_block():
    with pytest.raises(ValueError, match="multiple of 32 numbers, got 40"):
        storage.stored_shape(4, 40, "int4")


def correlated(n, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * n, n // 4)) @ rng.standard_normal((n // 4, n)) + 0.3 * rng.standard_normal((4 * n, n))
    return torch.tensor(x.T @ x / len(x), dtype=torch.float32)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rounding_in_a_metric_beats_rounding_to_nearest_in_it(kind):
    values = torch.randn(24, 160, generator=torch.Generator().manual_seed(0))
    metric = correlated(160)

    def error(codes, scales):
        difference = (storage.dequantize(codes, scales) - values).double()
        return float((difference @ metric.double() * difference).sum())

    assert error(*quantize(values, kind, metric, torch.float32)) < 0.6 * error(
        *quantize(values, kind, None, torch.float32)
    )


def test_rounding_to_nearest_is_off_by_at_most_half_a_step():
    values = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    wide = storage.dequantize(*quantize(values, "int8", None, torch.float32))
    assert bool(((wide - values).abs() <= values.abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all())


def test_zero_rows_stay_zero():
    values = torch.zeros(4, 64)
    for kind in ("int8", "int4"):
        assert not bool(storage.dequantize(*quantize(values, kind, torch.eye(64), torch.bfloat16)).any())


@pytest.mark.parametrize("pivot", [False, True])
@pytest.mark.parametrize("share", ["output", "input"])
def test_the_second_part_is_fitted_to_the_rounded_first(share, pivot):
    """int8 leaves the fit nearly alone, so what is stored is the least-squares solution for the rounded first part."""
    from pycompress.methods._channels import Channels
    from pycompress.methods.swsc import SWSC, FormChoice, build

    generator = torch.Generator().manual_seed(0)
    weight, metric = torch.randn(48, 64, generator=generator), correlated(64)
    channels = Channels(weight, metric)
    choice = FormChoice(channels.cluster(share, 5, seed=0), 20, 0.0)
    loose = build(channels, choice, torch.float32, SWSC(pivot=pivot))
    packed = round_shared(loose, channels.weight, channels.metric, "int8", torch.float32)
    root = np.linalg.cholesky(channels.metric.double().numpy())
    target = weight.double().numpy() @ root
    if share == "output":
        wide = storage.dequantize(packed.weight, packed.weight_scales).double().numpy()
        member = np.eye(5)[packed.labels.long().numpy()]
        basis, left = wide[5:] @ root, target - member @ wide[:5] @ root
    else:
        member = np.eye(5)[packed.labels.long().numpy()].T
        basis, left = np.concatenate([member, packed.whole_factor().double().numpy()]) @ root, target
    solved = np.linalg.lstsq(basis.T, left.T, rcond=None)[0].T
    if share == "output":
        stored = packed.whole_factor().numpy()
        free = packed.channels[20:].long().numpy() if pivot else np.arange(48)
        stored, solved = stored[free], solved[free]
    else:
        stored = storage.dequantize(packed.weight, packed.weight_scales).numpy()
    # Rounding moves along directions that the metric hardly sees: compare what the two do to the outputs.
    np.testing.assert_allclose(stored @ basis, solved @ basis, atol=0.05 * np.abs(solved @ basis).max())


def test_int4_scales_are_searched_not_those_of_the_largest_value():
    """Of normal values in groups of 64 a grid that clips the largest loses less than one that reaches it."""
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    groups = values.double().view(64, 8, 64)
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    # The better of the two grids that reach the largest value: codes from -8 to 7, the scale of either sign.
    errors = [
        (groups - (groups / scale).round().clamp(-8, 7) * scale).square().sum(-1)
        for scale in (largest.abs() / 7, -largest / 8)
    ]
    reaching = torch.minimum(*errors).sum()
    codes, scales = quantize(values, "int4", None, torch.float32)
    assert (storage.dequantize(codes, scales).double() - values.double()).square().sum() < 0.95 * reaching
