"""Structural methods through `apply`: sizes, what is refitted, undo, resume, recipes of several methods."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import pycompress
from pycompress import FLAP, RTN, SWSC, LayerDrop, Magnitude, PruneNet, Random, SubnetSearch, Taylor, Wanda, prune
from pycompress.groups import architecture_of, blocks
from pycompress.hub import added_biases
from pycompress.replace import dense_weight

IDS = torch.randint(3, 97, (12, 24), generator=torch.Generator().manual_seed(1))
METHODS = {
    "magnitude": Magnitude(0.8, round_to=8),
    "random": Random(0.8, round_to=8),
    "prunenet": PruneNet(0.8, episodes=2, round_to=8),
    "prunenet at random": PruneNet(0.8, policy="random", round_to=8),
    "wanda": Wanda(0.8, round_to=8),
    "taylor": Taylor(0.8, round_to=8),
    "flap": FLAP(0.8, round_to=8),
    "search": SubnetSearch(0.8, round_to=8),
    "phi": SubnetSearch(0.8, round_to=8, importance="phi", allocation="uniform"),
    "admm": SubnetSearch(0.8, round_to=8, reform="admm"),
    "sequential": SubnetSearch(0.8, round_to=8, sequential=True),
    "heads too": SubnetSearch(0.8, round_to=8, parts=("mlp", "attention")),
    "layers": LayerDrop(0.8),
    "last layers": LayerDrop(0.8, order="last"),
}


def weights_of(model):
    """Parameters of the linears of the decoder blocks."""
    paths = architecture_of(model).paths.values()
    return sum(dense_weight(block.get_submodule(path)).numel() for block in blocks(model) for path in paths)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_every_architecture(tiny_model, architecture, name, tmp_path):
    model = tiny_model(architecture)
    dense = weights_of(model)
    report = pycompress.apply(model, METHODS[name], IDS, progress=False)
    kept = weights_of(model) / dense
    assert report.targets.keep == pytest.approx(kept)
    assert 0.4 < kept <= 0.8
    with torch.inference_mode():
        logits = model(IDS).logits
    assert bool(torch.isfinite(logits).all())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, logits)


def test_refit_is_the_least_squares_solution(tiny_model):
    """`down` of the first block on the dense inputs, solved from the inputs themselves."""
    model = tiny_model("LlamaForCausalLM", mlp_bias=False)
    dense = copy.deepcopy(model)
    seen = []
    handle = dense.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, args, y: seen.append((args[0], y)))
    with torch.inference_mode():
        dense(IDS)
    handle.remove()
    x, y = (t.flatten(0, 1).double().numpy() for t in seen[0])
    pycompress.apply(model, SubnetSearch(0.8, round_to=8), IDS, progress=False)
    up, small = model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight
    kept = [int((small == row).all(1).nonzero()) for row in up]
    start = dense.model.layers[0].mlp.down_proj.weight.detach().double().numpy()[:, kept]
    got = model.model.layers[0].mlp.down_proj.weight.detach().double().numpy()

    def solved(damping):
        ridge = math.sqrt(damping * np.mean(np.sum(x[:, kept] ** 2, 0)))
        inputs = np.concatenate([x[:, kept], ridge * np.eye(len(kept))])
        return np.linalg.lstsq(inputs, np.concatenate([y, ridge * start.T]), rcond=None)[0].T

    closest = min(np.abs(got - solved(damping)).max() for damping in (1e-4, 1e-3, 1e-2, 1e-1, 1.0))
    assert closest < 1e-4 * np.abs(got).max()
    assert np.abs(got - start).max() > 1e-2 * np.abs(got).max()


def test_refit_brings_the_outputs_nearer(tiny_model):
    dense = tiny_model("Qwen3ForCausalLM")
    with torch.inference_mode():
        expected = dense(IDS).logits
    errors = {}
    for reform in ("none", "exact"):
        model = tiny_model("Qwen3ForCausalLM")
        pycompress.apply(model, SubnetSearch(0.7, round_to=8, reform=reform), IDS, progress=False)
        with torch.inference_mode():
            errors[reform] = float((model(IDS).logits - expected).norm())
    assert errors["exact"] < errors["none"]


def test_flap_puts_the_mean_of_what_is_gone_into_a_bias(tiny_model):
    model, dense = tiny_model("MistralForCausalLM"), tiny_model("MistralForCausalLM")
    seen = []
    handle = dense.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.inference_mode():
        dense(IDS)
    handle.remove()
    pycompress.apply(model, FLAP(0.7, round_to=8), IDS, progress=False)
    rows = dense.model.layers[0].mlp.up_proj.weight
    kept = [int((rows == row).all(1).nonzero()) for row in model.model.layers[0].mlp.up_proj.weight]
    gone = [channel for channel in range(len(rows)) if channel not in kept]
    mean = seen[0].flatten(0, 1).double().mean(0)[gone]
    expected = dense.model.layers[0].mlp.down_proj.weight.double()[:, gone] @ mean
    torch.testing.assert_close(model.model.layers[0].mlp.down_proj.bias.double(), expected, rtol=1e-4, atol=1e-5)
    assert added_biases(model) == {"down": [0, 1]}


def test_uniform_is_an_ordinary_model(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, SubnetSearch(0.8, round_to=8, uniform=True), IDS, progress=False)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "quantization_config" not in text
    assert len({len(block.mlp.up_proj.weight) for block in model.model.layers}) == 1


def test_an_error_leaves_the_model_as_it_was(tiny_model, monkeypatch):
    model = tiny_model("Gemma3ForCausalLM")
    before, config = state(model), model.config.to_dict()

    def fails(*args, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune, "refit_reader", fails)
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, SubnetSearch(0.8, round_to=8), IDS, progress=False)
    assert same(state(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("recipe", ["search", "sequential"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tiny_model, monkeypatch, tmp_path, recipe):
    whole = tiny_model("LlamaForCausalLM")
    pycompress.apply(whole, METHODS[recipe], IDS, progress=False)
    step = "refit_linear" if recipe == "sequential" else "refit_reader"
    original, calls = getattr(prune, step), []

    def stops(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **settings)

    model = tiny_model("LlamaForCausalLM")
    monkeypatch.setattr(prune, step, stops)
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, METHODS[recipe], IDS, checkpoint=tmp_path, progress=False)
    assert calls
    monkeypatch.setattr(prune, step, original)
    monkeypatch.setattr(prune.Pruning, "choose", lambda self: pytest.fail("the subnet is chosen again"))
    pycompress.apply(model, METHODS[recipe], IDS, checkpoint=tmp_path, progress=False)
    assert same(state(model), state(whole))


def test_a_structural_method_below_another(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=3)
    dense = weights_of(model)
    recipe = [LayerDrop(0.7), SubnetSearch(0.8, round_to=8), SWSC(0.5)]
    report = pycompress.apply(model, recipe, IDS, checkpoint=tmp_path / "run", progress=False)
    assert len(model.model.layers) == 2
    assert report.targets.before == 4 * dense * 2 // 3
    assert report.targets.after <= 0.5 * 0.8 * report.targets.before + 1
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved").eval()
    with torch.inference_mode():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_a_structural_method_cannot_follow_packing(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    before = state(model)
    with pytest.raises(ValueError, match="put SubnetSearch first"):
        pycompress.apply(model, [RTN(4), SubnetSearch(0.6)], IDS, progress=False)
    assert same(state(model), before)


@pytest.mark.parametrize("masks", ["nested", "free"])
def test_search_is_no_worse_than_where_it_starts(tiny_model, tmp_path, masks):
    config = SubnetSearch(
        0.8, round_to=8, candidates=12, population=6, mutations=3, crossovers=2, parents=2, masks=masks, positions=1.0
    )
    found = []
    for _ in range(2):
        model = tiny_model("LlamaForCausalLM")
        report = pycompress.apply(model, config, IDS, checkpoint=tmp_path, progress=False)
        (result,) = report.searches
        assert 2 <= len(result.history) <= 12
        assert result.perplexity == min(entry.perplexity for entry in result.history)
        assert report.targets.keep <= 0.8
        found.append(state(model))
    assert same(*found)


def test_settings_are_checked():
    for wrong in ({"keep": 0}, {"parts": ("mlp", "norms")}, {"round_to": 0}, {"targets": ("q",)}, {"candidates": -1}):
        with pytest.raises(ValueError, match="SubnetSearch"):
            SubnetSearch(**({"keep": 0.5} | wrong))
    with pytest.raises(ValueError, match="elimination"):
        SubnetSearch(importance="phi", allocation="loss")
    with pytest.raises(ValueError, match="candidates"):
        SubnetSearch(uniform=True, candidates=3)
    assert dataclasses.asdict(SubnetSearch(parts="mlp"))["parts"] == ("mlp",)


def test_a_size_that_cannot_be_reached_says_what_can(tiny_model):
    with pytest.raises(ValueError, match="keeps at least"):
        pycompress.apply(tiny_model("LlamaForCausalLM"), Magnitude(0.05, round_to=8), progress=False)
