"""Scores of the structural baselines, against sums written out in numpy; a group as attention heads make it."""

import numpy as np
import pytest
import torch

import pycompress.methods  # noqa: F401
from pycompress.methods.flap import FLAP
from pycompress.methods.layerdrop import LayerDrop
from pycompress.methods.magnitude import Magnitude
from pycompress.methods.random_units import Random
from pycompress.methods.structural import NEEDS, STRUCTURAL, Group, Member
from pycompress.methods.taylor import Taylor
from pycompress.methods.trajectory_channels import TrajectoryChannels
from pycompress.methods.wanda import Wanda

UNITS, HIDDEN = 6, 5
READ = torch.arange(2 * UNITS).view(2, UNITS).T  # two query heads read each channel
SCORES = [Magnitude(), Wanda(), FLAP(), Taylor(), Random()]


@pytest.fixture
def data():
    """A writer [6, 5], a reader [5, 12], the reader's inputs [T, 12], saliencies."""
    generator = torch.Generator().manual_seed(0)
    writer, reader = (
        torch.randn(UNITS, HIDDEN, generator=generator),
        torch.randn(HIDDEN, 2 * UNITS, generator=generator),
    )
    inputs = torch.randn(200, 2 * UNITS, generator=generator, dtype=torch.float64) * torch.arange(1, 13) + 3
    return writer, reader, inputs, torch.rand(UNITS, generator=generator), torch.rand(12, generator=generator)


def group(data):
    writer, reader, inputs, rows, columns = data
    gram, mean = (inputs.T @ inputs / len(inputs)).float(), inputs.mean(0).float()
    return Group(
        writers=(Member(writer, torch.arange(UNITS)[:, None], saliency=rows),),
        readers=(Member(reader, READ, gram, mean, columns),),
    )


def score(config, group):
    return STRUCTURAL[type(config)].scores(group, config).numpy()


def per_unit(columns):
    """Sums over the two columns of each unit."""
    return columns[:UNITS] + columns[UNITS:]


def test_magnitude(data):
    writer, reader = data[0].numpy(), data[1].numpy()
    expected = (writer**2).sum(1) + per_unit((reader**2).sum(0))
    np.testing.assert_allclose(score(Magnitude(), group(data)), expected, rtol=1e-5)


def test_importance_along_training(data):
    writer, reader = data[:2]
    followed = Group(
        (Member(torch.zeros_like(writer), torch.arange(UNITS)[:, None], recorded=writer),),
        (Member(torch.zeros_like(reader), READ, recorded=reader),),
    )
    expected = (writer.numpy() ** 2).sum(1) + per_unit((reader.numpy() ** 2).sum(0))
    np.testing.assert_allclose(score(TrajectoryChannels(trajectory="followed"), followed), expected, rtol=1e-5)


def test_wanda(data):
    reader, inputs = data[1].numpy(), data[2].numpy()
    expected = per_unit((np.abs(reader) * np.sqrt((inputs**2).mean(0))).sum(0))
    np.testing.assert_allclose(score(Wanda(), group(data)), expected, rtol=1e-5)


def test_flap(data):
    reader, inputs = data[1].numpy(), data[2].numpy()
    raw = per_unit(inputs.var(0) * (reader**2).sum(0))
    np.testing.assert_allclose(score(FLAP(), group(data)), (raw - raw.mean()) / raw.std(ddof=1), rtol=1e-3)


def test_flap_gives_no_score_to_a_constant(data):
    writer, reader, inputs, *rest = data
    inputs[:, [2, 2 + UNITS]] = 7.0
    raw = score(FLAP(), group((writer, reader, inputs, *rest)))
    assert int(raw.argmin()) == 2


def test_taylor(data):
    rows, columns = data[3].numpy(), data[4].numpy()
    np.testing.assert_allclose(score(Taylor(), group(data)), rows + per_unit(columns), rtol=1e-5)


def test_random_is_a_permutation_of_its_seed(data):
    first, again, other = (score(Random(seed=seed), group(data)) for seed in (0, 0, 1))
    assert sorted(first) == list(range(UNITS))
    assert first.tolist() == again.tolist() != other.tolist()


def test_layerdrop_orders_blocks():
    influence = torch.tensor([0.3, 0.1, 0.2])
    rank = STRUCTURAL[LayerDrop].blocks
    assert rank(influence, LayerDrop()).argsort().tolist() == [1, 2, 0]
    assert rank(influence, LayerDrop(order="last")).argsort().tolist() == [2, 1, 0]


@pytest.mark.parametrize("config", SCORES, ids=lambda config: config.name)
def test_reordered_units_have_reordered_scores(data, config):
    if isinstance(config, Random):
        pytest.skip("does not read the units")
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    whole = group(data)
    writer, reader = whole.writers[0], whole.readers[0]
    moved = Group(
        (Member(writer.weight, writer.units[order], saliency=writer.saliency),),
        (Member(reader.weight, reader.units[order], reader.gram, reader.mean, reader.saliency),),
    )
    np.testing.assert_allclose(score(config, moved), score(config, whole)[order], rtol=1e-12)


@pytest.mark.parametrize("config", STRUCTURAL, ids=lambda config: config.__name__)
def test_a_method_ranks_units_or_blocks_and_says_what_it_needs(config):
    method = STRUCTURAL[config]
    assert sum(ranks is not None for ranks in (method.scores, method.eliminate, method.blocks, method.learn)) == 1
    assert set(method.needs) <= set(NEEDS)
    refit = method.refit(config(trajectory="followed") if config is TrajectoryChannels else config())
    assert refit is None or refit.kind in ("weights", "admm", "bias")


@pytest.mark.parametrize("config", [Magnitude, Wanda, FLAP, Taylor, Random, LayerDrop])
def test_keep_is_checked(config):
    with pytest.raises(ValueError, match=r"keep must be in \(0, 1\]"):
        config(0.0)


def test_choices_are_checked():
    with pytest.raises(ValueError, match=r"needs trajectory, the folder that TrajectoryTracker\.save wrote"):
        TrajectoryChannels(0.5)
    with pytest.raises(ValueError, match="structure"):
        FLAP(structure="global")
    with pytest.raises(ValueError, match="order"):
        LayerDrop(order="first")
