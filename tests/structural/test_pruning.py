"""Structural methods through `apply`: sizes, what is refitted, undo, resume, recipes of several methods."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

import pycompress
from pycompress import (
    FLAP,
    RTN,
    SWSC,
    LayerDrop,
    Magnitude,
    PruneNet,
    Random,
    SearchSettings,
    SubnetSearch,
    Taylor,
    Wanda,
)
from pycompress.architectures.model import architecture_of, blocks, geometry
from pycompress.calibration.stream import Stream
from pycompress.hub.record import added_biases
from pycompress.nn.weights import dense_weight
from pycompress.structural import pruning
from pycompress.surgery.shrink import shrink

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
    "every linear": SubnetSearch(0.8, round_to=8, sequential=True, refit="block"),
    "kv heads": SubnetSearch(0.75, round_to=8, parts=("mlp", "kv_heads")),
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


def captured(model, path):
    """Inputs and outputs of a linear for the calibration tokens, `[T, K]` and `[T, N]`."""
    seen = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    with torch.inference_mode():
        model(IDS)
    handle.remove()
    return [tensor.flatten(0, 1).double().numpy() for tensor in seen[0]]


def distance_to_ridge(got, x, y, start):
    """How far `got` is from what lstsq gives for the nearest of the dampings, relative to the largest weight."""

    def solved(damping):
        ridge = math.sqrt(damping * np.mean(np.sum(x**2, 0)))
        inputs = np.concatenate([x, ridge * np.eye(x.shape[1])])
        return np.linalg.lstsq(inputs, np.concatenate([y, ridge * start.T]), rcond=None)[0].T

    found = min(np.abs(got - solved(damping)).max() for damping in (1e-4, 1e-3, 1e-2, 1e-1, 1.0))
    return found / np.abs(got).max()


@pytest.fixture
def chosen(monkeypatch):
    """The subnets that pruning has come to."""
    found = []

    def spy(model, subnet, *args, **kwargs):
        found.append(subnet)
        return shrink(model, subnet, *args, **kwargs)

    monkeypatch.setattr(pruning, "shrink", spy)
    return found


def test_refit_is_the_least_squares_solution(tiny_model):
    """`down` of the first block on the dense inputs, solved from the inputs themselves."""
    model = tiny_model("LlamaForCausalLM", mlp_bias=False)
    dense = copy.deepcopy(model)
    x, y = captured(dense, "model.layers.0.mlp.down_proj")
    pycompress.apply(model, SubnetSearch(0.8, round_to=8), IDS, progress=False)
    up, small = model.model.layers[0].mlp.up_proj.weight, dense.model.layers[0].mlp.up_proj.weight
    kept = [int((small == row).all(1).nonzero()) for row in up]
    start = dense.model.layers[0].mlp.down_proj.weight.detach().double().numpy()[:, kept]
    got = model.model.layers[0].mlp.down_proj.weight.detach().double().numpy()

    assert distance_to_ridge(got, x[:, kept], y, start) < 1e-4
    assert np.abs(got - start).max() > 1e-2 * np.abs(got).max()


@pytest.mark.parametrize(
    ("role", "path"),
    [
        ("q", "model.layers.1.self_attn.q_proj"),
        ("v", "model.layers.1.self_attn.v_proj"),
        ("up", "model.layers.1.mlp.up_proj"),
    ],
)
def test_every_linear_aims_at_what_its_rows_gave(tiny_model, chosen, role, path):
    """Refitted on the inputs that the pruned model gives it, to the dense model's outputs at the rows that stay."""
    dense, model = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    sizes = {"parts": ("mlp", "attention"), "round_to": 8, "allocation": "uniform"}
    config = SubnetSearch(0.6, sequential=True, refit="block", **sizes)
    pycompress.apply(model, config, IDS, progress=False)
    block = int(path.split(".")[2])
    rows = geometry(dense, block).rows(role, chosen[0].blocks[block])
    assert len(rows) < len(dense.get_submodule(path).weight)
    # The softmax scale of whole heads is in the queries.
    width = model.model.layers[block].self_attn.head_dim
    fold = math.sqrt(width / 16) if role == "q" else 1.0
    y = fold * captured(dense, path)[1][:, rows]
    x, _ = captured(model, path)
    got, start, bias = (
        tensor.detach().double().numpy()
        for tensor in (
            model.get_submodule(path).weight,
            dense.get_submodule(path).weight[rows],
            model.get_submodule(path).bias,
        )
    )
    assert distance_to_ridge(got, x, y - bias, fold * start) < 5e-4  # float32 sums, damping of 1e-4
    assert np.abs(got - fold * start).max() > 1e-2 * np.abs(got).max()


def test_every_linear_refitted_brings_the_outputs_nearer(tiny_model):
    dense = tiny_model("Qwen3ForCausalLM", num_hidden_layers=4)
    with torch.inference_mode():
        expected = dense(IDS).logits
    errors = {}
    for refit in ("readers", "block"):
        model = tiny_model("Qwen3ForCausalLM", num_hidden_layers=4)
        config = SubnetSearch(0.6, parts=("mlp", "attention"), round_to=8, sequential=True, refit=refit)
        pycompress.apply(model, config, IDS, progress=False)
        with torch.inference_mode():
            errors[refit] = float((model(IDS).logits - expected).norm())
    assert errors["block"] < errors["readers"]


@pytest.mark.parametrize("importance", ["elimination", "phi"])
def test_queries_and_values_lose_channels_of_their_own(tiny_model, chosen, importance):
    """Two rotary pairs of the queries and keys do nothing, and other channels of the values, of each head others."""
    model = tiny_model("LlamaForCausalLM", num_attention_heads=4, num_key_value_heads=2)
    pairs, channels = [1, 6, 9, 14], ([0, 4, 10, 11], [1, 2, 9, 15])
    with torch.no_grad():
        for block in model.model.layers:
            for role, heads in (("q", 4), ("k", 2), ("v", 2)):
                linear = block.self_attn.get_submodule(f"{role}_proj")
                for head in range(heads):
                    gone = torch.tensor(pairs if role != "v" else channels[head]) + 16 * head
                    linear.weight[gone] = 0
                    linear.bias[gone] = 0
        expected = model(IDS).logits
    config = SubnetSearch(0.75, parts="attention", round_to=4, importance=importance, allocation="uniform")
    total = weights_of(model)
    share = sum(
        block.self_attn.get_submodule(f"{r}_proj").weight.numel() for block in model.model.layers for r in "qkvo"
    )
    config = dataclasses.replace(config, keep=1 - 0.25 * share / total)
    pycompress.apply(model, config, IDS, progress=False)
    for kept in chosen[0].blocks:
        assert kept.qk.tolist() == [sorted(set(range(16)) - set(pairs))]
        assert kept.vo.tolist() == [sorted(set(range(16)) - set(gone)) for gone in channels]
    with torch.inference_mode():
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-3, atol=1e-3)


EIGHT_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.mark.parametrize("parts", [("mlp", "kv_heads"), ("kv_heads",)], ids=str)
@pytest.mark.parametrize("method", [Magnitude, Random, Wanda, Taylor, FLAP, SubnetSearch])
def test_whole_key_value_heads_go(tiny_model, chosen, tmp_path, method, parts):
    """What is left gives what the dense model does with the columns of o and down at zero that read what is gone."""
    dense, model = tiny_model("LlamaForCausalLM", **EIGHT_HEADS), tiny_model("LlamaForCausalLM", **EIGHT_HEADS)
    total = weights_of(dense)
    settings = {"reform": "none", "allocation": "uniform"}
    config = method(0.84, parts=parts, round_to=8, **(settings if method is SubnetSearch else {}))
    pycompress.apply(model, config, IDS, progress=False)
    assert 0.84 * total - 2 * 3 * 64 * 8 <= weights_of(model) <= 0.84 * total or parts == ("kv_heads",)
    with torch.no_grad():
        for kept, old, new in zip(chosen[0].blocks, dense.model.layers, model.model.layers, strict=True):
            heads = range(4) if kept.kv_heads is None else kept.kv_heads.tolist()
            assert len(new.self_attn.q_proj.weight) == 2 * len(new.self_attn.k_proj.weight) == 2 * 8 * len(heads)
            for head in set(range(4)) - set(heads):
                old.self_attn.o_proj.weight[:, 16 * head : 16 * (head + 1)] = 0
            if kept.mlp is not None:
                gone = sorted(set(range(96)) - set(kept.mlp.tolist()))
                old.mlp.down_proj.weight[:, gone] = 0
            for reader in ("self_attn.o_proj", "mlp.down_proj"):
                # FLAP's means are in the biases.
                old.get_submodule(reader).bias.copy_(new.get_submodule(reader).bias)
        assert any(kept.kv_heads is not None for kept in chosen[0].blocks)
        logits = model(IDS).logits
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path)
        assert torch.equal(type(model).from_pretrained(tmp_path).eval()(IDS).logits, logits)


def test_a_key_value_head_counts_all_of_its_rows_and_columns(tiny_model, chosen):
    """Magnitude keeps the heads whose weights, those of their queries included, have the largest sums of squares."""
    model = tiny_model("LlamaForCausalLM", **EIGHT_HEADS)
    with torch.no_grad():
        scale = torch.tensor([1.0, 0.9, 1.1, 0.8]).repeat_interleave(16)
        model.model.layers[1].self_attn.o_proj.weight.mul_(scale)
    attention = [block.self_attn for block in model.model.layers]
    expected = []
    for block in attention:
        q, k, v = (block.get_submodule(f"{role}_proj").weight.detach().double().square().sum(1) for role in "qkv")
        o = block.o_proj.weight.detach().double().square().sum(0)
        expected.append((sum(part.view(4, -1).sum(1) for part in (q, k, v, o))).numpy())
    pycompress.apply(model, Magnitude(0.85, parts="kv_heads"), progress=False)
    for kept, sums in zip(chosen[0].blocks, expected, strict=True):
        assert kept.kv_heads.tolist() == sorted(np.argsort(sums)[-len(kept.kv_heads) :])
        assert 0 < len(kept.kv_heads) < 4


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
    inputs, _ = captured(dense, "model.layers.0.mlp.down_proj")
    pycompress.apply(model, FLAP(0.7, round_to=8), IDS, progress=False)
    rows = dense.model.layers[0].mlp.up_proj.weight
    kept = [int((rows == row).all(1).nonzero()) for row in model.model.layers[0].mlp.up_proj.weight]
    gone = [channel for channel in range(len(rows)) if channel not in kept]
    mean = torch.from_numpy(inputs.mean(0))[gone]
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

    monkeypatch.setattr(pruning, "refit_reader", fails)
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, SubnetSearch(0.8, round_to=8), IDS, progress=False)
    assert same(state(model), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("recipe", ["search", "sequential", "every linear"])
def test_an_interrupted_run_goes_on_to_the_same_bits(tiny_model, monkeypatch, tmp_path, recipe):
    whole = tiny_model("LlamaForCausalLM")
    pycompress.apply(whole, METHODS[recipe], IDS, progress=False)
    step = "refit_reader" if recipe == "search" else "refit_linears"
    original, calls = getattr(pruning, step), []

    def stops(*args, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(*args, **settings)

    model = tiny_model("LlamaForCausalLM")
    monkeypatch.setattr(pruning, step, stops)
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, METHODS[recipe], IDS, checkpoint=tmp_path, progress=False)
    assert calls
    monkeypatch.setattr(pruning, step, original)
    monkeypatch.setattr(pruning.Pruning, "choose", lambda self: pytest.fail("the subnet is chosen again"))
    pycompress.apply(model, METHODS[recipe], IDS, checkpoint=tmp_path, progress=False)
    assert same(state(model), state(whole))


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (FLAP(0.8, round_to=8), FLAP(0.6, round_to=8)),
        (LayerDrop(0.9), LayerDrop(0.5)),
        (SubnetSearch(0.8, round_to=8), SubnetSearch(0.8, round_to=8, candidates=3)),
    ],
    ids=["another keep", "another depth", "a search"],
)
def test_what_is_known_of_the_dense_model_is_not_measured_again(tiny_model, monkeypatch, tmp_path, first, then):
    whole, model = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    pycompress.apply(whole, then, IDS, progress=False)
    pycompress.apply(tiny_model("LlamaForCausalLM"), first, IDS, checkpoint=tmp_path, progress=False)
    for owner, measures in ((Stream, "statistics"), (pruning, "block_influence")):
        monkeypatch.setattr(owner, measures, lambda *args, **settings: pytest.fail("it is measured again"))
    pycompress.apply(model, then, IDS, checkpoint=tmp_path, progress=False)
    assert same(state(model), state(whole))


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_the_report_counts_blocks_that_are_gone_wherever_they_were(tiny_model, monkeypatch, gone):
    def influence(stream):
        return torch.tensor([float(block != gone) for block in range(3)])

    monkeypatch.setattr(pruning, "block_influence", influence)
    for recipe, keep in ([LayerDrop(0.7)], 2 / 3), ([LayerDrop(0.7), Magnitude(0.8, round_to=8)], 2 / 3 * 0.8):
        model = tiny_model("LlamaForCausalLM", num_hidden_layers=3)
        dense = weights_of(model)
        report = pycompress.apply(model, recipe, IDS, progress=False)
        assert report.targets.before == 4 * dense
        assert report.targets.after == 4 * weights_of(model) <= keep * 4 * dense + 1
        assert sum(row.format == "dropped" for row in report.rows) == 7


def test_a_structural_method_below_another(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=3)
    dense = weights_of(model)
    recipe = [LayerDrop(0.7), SubnetSearch(0.8, round_to=8), SWSC(0.5)]
    report = pycompress.apply(model, recipe, IDS, checkpoint=tmp_path / "run", progress=False)
    assert len(model.model.layers) == 2
    assert report.targets.before == 4 * dense
    assert report.targets.after <= 0.5 * 0.8 * 2 / 3 * report.targets.before + 1
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
    rare = SearchSettings(population=6, mutations=3, crossovers=2, parents=2, positions=1.0)
    config = SubnetSearch(0.8, round_to=8, candidates=12, masks=masks, search=rare)
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


def test_search_scores_what_is_then_built(tiny_model):
    model = tiny_model("LlamaForCausalLM", intermediate_size=128)
    # Of one generation: its candidates are far from one another.
    config = SubnetSearch(0.6, round_to=8, candidates=12, search=SearchSettings(population=12, positions=1.0))
    (result,) = pycompress.apply(model, config, IDS, progress=False).searches
    with torch.inference_mode():
        built = math.exp(model(input_ids=IDS, labels=IDS).loss)
    others = [entry.perplexity for entry in result.history if entry.digest != result.best.digest]
    assert abs(math.log(built / result.perplexity)) < 0.2 * abs(math.log(max(others) / result.perplexity))


def test_few_candidates_still_make_generations(tiny_model):
    config = SubnetSearch(0.8, round_to=8, candidates=16, search=SearchSettings(positions=1.0))
    model = tiny_model("LlamaForCausalLM", num_hidden_layers=4, intermediate_size=256)
    (result,) = pycompress.apply(model, config, IDS, progress=False).searches
    assert len(result.history) <= 16
    assert {entry.generation for entry in result.history} >= {0, 1, 2}


def test_settings_are_checked():
    for wrong in ({"keep": 0}, {"parts": ("mlp", "norms")}, {"round_to": 0}, {"targets": ("q",)}, {"candidates": -1}):
        with pytest.raises(ValueError, match="SubnetSearch"):
            SubnetSearch(**({"keep": 0.5} | wrong))
    with pytest.raises(ValueError, match="elimination"):
        SubnetSearch(importance="phi", allocation="loss")
    with pytest.raises(ValueError, match="candidates"):
        SubnetSearch(uniform=True, candidates=3)
    for wrong in ({}, {"sequential": True, "reform": "admm"}, {"sequential": True, "reform": "none"}):
        with pytest.raises(ValueError, match="needs sequential=True"):
            SubnetSearch(refit="block", **wrong)
    with pytest.raises(ValueError, match="one of the two"):
        Wanda(parts=("attention", "kv_heads"))
    with pytest.raises(ValueError, match="kv_heads"):
        SubnetSearch(parts=("mlp", "kv_heads"), candidates=3)
    assert dataclasses.asdict(SubnetSearch(parts="mlp"))["parts"] == ("mlp",)


def test_a_size_that_cannot_be_reached_says_what_can(tiny_model):
    with pytest.raises(ValueError, match="keeps at least"):
        pycompress.apply(tiny_model("LlamaForCausalLM"), Magnitude(0.05, round_to=8), progress=False)


@pytest.mark.parametrize(
    "config",
    [
        pycompress.SubnetSearch(0.7, parts=("mlp", "attention")),
        pycompress.SubnetSearch(0.7, parts=("mlp", "kv_heads")),
        pycompress.SubnetSearch(0.7, sequential=True, refit="block"),
        pycompress.SubnetSearch(0.7, importance="phi", allocation="uniform"),
        pycompress.SubnetSearch(0.7, reform="admm"),
        pycompress.FLAP(0.7),
        pycompress.Wanda(0.7),
        pycompress.Taylor(0.7),
        pycompress.SliceGPT(0.8),
        pycompress.PruneNet(0.7),
        pycompress.Prune("sparsegpt", sparsity=0.5),
        pycompress.Prune("wanda", "2:4"),
        pycompress.RTN(4, group_size=16),
    ],
    ids=str,
)
@pytest.mark.parametrize("zero", ["self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"])
def test_matrices_of_zeros_are_ordinary(config, zero, tiny_model):
    """Blocks that were added to a model begin with zeros, and give what reads them inputs of zeros."""
    model = tiny_model("LlamaForCausalLM", attention_bias=False, mlp_bias=False)
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{zero}").weight.zero_()
    ids = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(1))
    pycompress.apply(model, config, ids, progress=False)
    assert all(
        bool(torch.isfinite(tensor).all()) for tensor in model.state_dict().values() if tensor.is_floating_point()
    )
    assert bool(torch.isfinite(model(ids).logits).all())
