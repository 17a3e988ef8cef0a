"""PruneNet's parts against scipy, numpy and torch.nn; its policy where half of the channels carry the spectrum."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

import pycompress
from pycompress import PruneNet
from pycompress.methods.prunenet import Policy, ks_distance, learn, reward, singular_values, threshold, train
from pycompress.methods.structural import Group, Member
from pycompress.nn.weights import dense_weight

CHANNELS, HIDDEN, KEPT, BLOCKS = 48, 12, 24, 4


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("first", "second"), [(30, 30), (63, 17), (1, 5)])
@pytest.mark.parametrize("rounded", [False, True])
def test_ks_distance_is_that_of_scipy(first, second, rounded):
    one, other = draw(first), draw(second, seed=1) * 1.5 + 0.3
    if rounded:  # many equal values, within and between
        one, other = one.round(), other.round()
    expected = ks_2samp(one.numpy(), other.numpy()).statistic
    assert ks_distance(one, other) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [(63, 20), (20, 63), (16, 16)])
def test_singular_values_are_those_of_an_svd(shape):
    weight = draw(*shape).float()
    expected = np.linalg.svd(weight.double().numpy(), compute_uv=False)[::-1]
    np.testing.assert_allclose(singular_values(weight).numpy(), expected, rtol=1e-9)


def test_the_reward_is_one_over_the_distance_and_finite_without_one():
    before, after = draw(30).abs(), draw(17, seed=1).abs()
    assert reward(before, after) == pytest.approx(1 / ks_2samp(before.numpy(), after.numpy()).statistic)
    assert reward(before, before) == 2 * 30


def test_the_policy_is_a_linear_layer_and_a_product():
    policy = Policy.start(HIDDEN, CHANNELS, torch.Generator().manual_seed(0), torch.device("cpu"))
    rows, layer = draw(7, HIDDEN), torch.nn.Linear(HIDDEN, CHANNELS, dtype=torch.float64)
    layer.load_state_dict({"weight": policy.inner.detach(), "bias": policy.bias.detach()})
    torch.testing.assert_close(policy.logits(rows), layer(rows) @ policy.sparsity)
    # As torch.nn.Linear begins.
    largest = float(policy.inner.detach().abs().max())
    assert largest <= HIDDEN**-0.5 < 1.1 * largest


@pytest.mark.parametrize("count", [1, 20, 47])
def test_the_threshold_is_what_as_many_samples_exceed(count):
    logits = 5 * draw(CHANNELS)
    assert float((logits - threshold(logits, count)).sigmoid().sum()) == pytest.approx(count, rel=1e-9)
    noise = torch.rand(20_000, CHANNELS, generator=torch.Generator().manual_seed(1), dtype=torch.float64).logit()
    exceeding = (logits + noise > threshold(logits, count)).double().sum(1)
    assert float(exceeding.mean()) == pytest.approx(count, abs=0.1)


def blocks(seed=3):
    """Gate matrices in which half of the rows are large and the others next to nothing, in any order."""
    generator, groups = torch.Generator().manual_seed(seed), []
    for _ in range(BLOCKS):
        weight = 0.05 * torch.randn(CHANNELS, HIDDEN, generator=generator)
        weight[:KEPT] = torch.randn(KEPT, HIDDEN, generator=generator) + 1
        weight = weight[torch.randperm(CHANNELS, generator=generator)]
        units = torch.arange(CHANNELS)[:, None]
        groups.append(Group((Member(weight, units),), (Member(weight.T.contiguous(), units),)))
    return groups


def spectral_reward(group, scores):
    """1 / KS of numpy's and scipy's spectra, of the channels with the largest scores."""
    weight = group.writers[0].weight.double().numpy()
    kept = np.argsort(scores.numpy())[-KEPT:]
    spectra = [np.linalg.svd(matrix, compute_uv=False) for matrix in (weight, weight[kept])]
    return 1 / ks_2samp(*spectra).statistic


@pytest.mark.parametrize("seed", range(3))
def test_training_raises_the_reward_above_that_of_chance(seed):
    groups, shown = blocks(), []

    def bar(items, what):
        shown.append((list(items), what))
        return items

    config = PruneNet(seed=seed)
    training = train(groups.__getitem__, [KEPT] * BLOCKS, config, bar)
    assert np.mean(training.rewards[-5:]) > 1.5 * np.mean(training.rewards[:5])
    assert np.mean(training.rewards[-5:]) > 1.5 * training.random
    assert shown == [(list(range(20)), "learning a policy")]

    learnt = learn(groups.__getitem__, [KEPT] * BLOCKS, config, lambda items, what: items)
    chance = learn(groups.__getitem__, [KEPT] * BLOCKS, PruneNet(policy="random", seed=seed), None)
    rewards = [
        np.mean([spectral_reward(group, score(group, config)) for group in groups]) for score in (learnt, chance)
    ]
    assert rewards[0] > 2 * rewards[1]


def test_blocks_of_a_random_policy_keep_other_channels():
    groups = blocks()
    score = learn(groups.__getitem__, [KEPT] * BLOCKS, PruneNet(policy="random"), None)
    orders = [score(group, None).tolist() for group in groups]
    assert all(sorted(order) == list(range(CHANNELS)) for order in orders)
    assert len(set(map(tuple, orders))) == BLOCKS


def kept_rows(tiny_model, config, architecture="LlamaForCausalLM", **settings):
    """Of each block, the rows of the first MLP matrix that stay, as indices."""
    path = "mlp.gate_proj" if architecture == "LlamaForCausalLM" else "mlp.c_fc"
    layers = (lambda m: m.model.layers) if architecture == "LlamaForCausalLM" else (lambda m: m.transformer.h)
    dense, model = tiny_model(architecture), tiny_model(architecture)
    pycompress.apply(model, config, progress=False, **settings)
    pairs = zip(layers(dense), layers(model), strict=True)
    weights = [[dense_weight(block.get_submodule(path)) for block in pair] for pair in pairs]
    return [[int((rows == row).all(1).nonzero()) for row in left] for rows, left in weights]


@pytest.mark.parametrize("policy", ["random", "learned"])
def test_a_seed_gives_one_choice(tiny_model, policy):
    first, again, other = (
        kept_rows(tiny_model, PruneNet(0.7, policy=policy, episodes=2, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again != other
    assert len(set(map(len, first))) == 1


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_one_policy_ranks_the_gate_or_up_rows_of_all_blocks(tiny_model, architecture):
    model, config = tiny_model(architecture), PruneNet(0.7, episodes=3, round_to=8)
    matrices = [m for n, m in model.named_modules() if n.endswith(("gate_proj", "c_fc"))]
    weights = [dense_weight(matrix).float() for matrix in matrices]
    units = torch.arange(len(weights[0]))[:, None]
    groups = [Group((Member(weight, units),), ()) for weight in weights]
    got = kept_rows(tiny_model, config, architecture)
    policy = train(groups.__getitem__, [len(rows) for rows in got], config, lambda items, what: items).policy
    expected = [policy.logits(weight).topk(len(rows)).indices for weight, rows in zip(weights, got, strict=True)]
    assert got == [sorted(index.tolist()) for index in expected]


def test_a_checkpoint_of_another_size_is_not_taken_for_this_one(tiny_model, tmp_path):
    fresh = kept_rows(tiny_model, PruneNet(0.6, episodes=2))
    kept_rows(tiny_model, PruneNet(0.8, episodes=2), checkpoint=tmp_path)
    assert kept_rows(tiny_model, PruneNet(0.6, episodes=2), checkpoint=tmp_path) == fresh


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"policy": "best"}, "policy must be one of 'learned', 'random', got 'best'"),
        ({"episodes": 0}, "episodes must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0"),
        ({"parts": ("mlp", "attention")}, "removes channels of MLPs"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        PruneNet(**settings)
