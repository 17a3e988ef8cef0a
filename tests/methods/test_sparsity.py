"""Prune: which weights become zero, what the others compensate for, and that zeros stay zeros."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

import pycompress
from pycompress import Magnitude, Prune, SubnetSearch, TrajectoryChannels, Wanda
from pycompress import recipe as recipes
from pycompress.architectures import model as architectures
from pycompress.formats.packed import Bitmap, Sparse24, pack_zeros, rebuild
from pycompress.hub import record
from pycompress.methods._sparsegpt import sparsegpt
from pycompress.methods.registry import METHODS, Statistics
from pycompress.nn.linear import BitmapLinear, Sparse24Linear, ZerosLinear
from pycompress.nn.weights import dense_weight
from pycompress.trajectory import TrajectoryTracker

IDS = torch.randint(3, 97, (4, 24), generator=torch.Generator().manual_seed(1))
N, K = 24, 256


@pytest.fixture(scope="module")
def matrix():
    """A weight `[24, 256]`, correlated inputs `[600, 256]` of unlike sizes, and their statistics."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator)
    mixing = torch.randn(K, K, generator=generator) / 8 + torch.eye(K)
    inputs = torch.randn(600, K, generator=generator) @ mixing * torch.rand(K, generator=generator).add(0.1)
    return weight, inputs, Statistics(inputs.T @ inputs / 600, 600)


def compressed(weight, statistics, config, budget=None, **given):
    return METHODS[Prune].compress(weight, statistics, config, budget, None, **given).unpack()


def loops_mask(scores, zeros_of, pattern):
    """Where zeros belong, found by sorting one row, one group or the matrix with Python's own sort."""
    rows = scores.double().tolist()
    gone = set()
    if isinstance(pattern, tuple):
        kept, of = pattern
        for i, row in enumerate(rows):
            for first in range(0, len(row), of):
                gone |= {(i, j) for j in sorted(range(first, first + of), key=row.__getitem__)[: of - kept]}
    elif pattern == "rows":
        for i, row in enumerate(rows):
            gone |= {(i, j) for j in sorted(range(len(row)), key=row.__getitem__)[: round(zeros_of * len(row))]}
    else:
        places = [(i, j) for i in range(len(rows)) for j in range(len(rows[0]))]
        gone |= set(sorted(places, key=lambda p: rows[p[0]][p[1]])[: round(zeros_of * len(places))])
    return torch.tensor([[(i, j) in gone for j in range(len(rows[0]))] for i in range(len(rows))])


@pytest.mark.parametrize(
    ("config", "pattern"),
    [
        (Prune("magnitude", sparsity=0.3), "matrix"),
        (Prune("magnitude", "2:4"), (2, 4)),
        (Prune("magnitude", "1:16"), (1, 16)),
        (Prune("wanda", sparsity=0.6), "rows"),
        (Prune("wanda", "4:8"), (4, 8)),
    ],
)
def test_the_weights_of_least_score_are_zero_and_the_others_as_they_were(matrix, config, pattern):
    weight, inputs, statistics = matrix
    scores = weight.double().abs()
    if config.score == "wanda":
        scores = scores * inputs.double().square().mean(0).sqrt()
    mask = loops_mask(scores, config.zeros, pattern)
    assert torch.equal(compressed(weight, statistics, config), weight.masked_fill(mask, 0))


def test_ties_do_not_change_how_many_weights_go(matrix):
    tied = torch.ones(N, K)
    for config in (Prune("magnitude", sparsity=0.25), Prune("wanda", sparsity=0.25), Prune("magnitude", "1:4")):
        found = compressed(tied, replace(matrix[2], gram=torch.eye(K)), config)
        assert int((found == 0).sum()) == round(config.zeros * N * K)


def test_the_rate_is_a_threshold_in_standard_deviations(matrix):
    weight = matrix[0]
    deviation = weight.double().abs().flatten().var(correction=1).sqrt()
    expected = weight.masked_fill(weight.double().abs() < 1.4 * deviation, 0)
    assert torch.equal(compressed(weight, None, Prune("magnitude", rate=1.4)), expected)
    # Of Gaussian weights erf(rate * sqrt(1 - 2 / pi) / sqrt(2)) go.
    share = float((expected == 0).float().mean())
    assert share == pytest.approx(math.erf(1.4 * math.sqrt(1 - 2 / math.pi) / math.sqrt(2)), abs=0.02)


def damped(gram):
    wide = gram.double()
    return wide + 1e-2 * wide.diagonal().mean() * torch.eye(len(wide), dtype=torch.float64)


def recursion(weight, gram, chosen):
    """The published recursion in float64, one weight at a time: column j leaves, and the columns after it take the
    update that is optimal for them, `-w_j / [H⁻¹]_jj · [H⁻¹]_j`, with `H` the Gram matrix of the columns still open.

    `chosen(rest, j, price)`: which rows lose column j, given the weights as they are and `[H⁻¹]_jj` of open columns.
    """
    rest, open_gram = weight.double().clone(), damped(gram)
    for j in range(rest.shape[1]):
        inverted = torch.linalg.inv(open_gram[j:, j:])
        gone = chosen(rest, j)
        update = rest[:, j, None] / inverted[0, 0] * inverted[0]
        rest[:, j:] -= update * gone[:, None]
        rest[gone, j] = 0
    return rest


def prices(gram):
    """`[H⁻¹]_jj` of each column among those from j on."""
    wide = damped(gram)
    return torch.stack([torch.linalg.inv(wide[j:, j:])[0, 0] for j in range(len(wide))])


def test_sparsegpt_is_the_published_recursion_unstructured(matrix):
    weight, _, statistics = matrix
    price, masks = prices(statistics.gram), {}

    def chosen(rest, j):
        if j % 128 == 0:
            costs = rest[:, j : j + 128].square() / price[j : j + 128]
            masks[j // 128] = loops_mask(costs, 0.5, "matrix")
        return masks[j // 128][:, j % 128]

    expected = recursion(weight, statistics.gram, chosen)
    found = sparsegpt(weight, statistics.gram, 0.5)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize("group", [(2, 4), (1, 3)])
def test_sparsegpt_is_the_published_recursion_in_groups_the_largest_inputs_first(matrix, group):
    weight, inputs, _ = matrix
    columns = K // group[1] * group[1]
    weight, inputs = weight[:, :columns], inputs[:, :columns]
    found = sparsegpt(weight, inputs.T @ inputs / len(inputs), 1 - group[0] / group[1], group)
    energy = inputs.double().square().sum(0)
    starts = sorted(range(0, columns, group[1]), key=lambda start: -float(energy[start : start + group[1]].sum()))
    assert starts != sorted(starts)
    order = [start + place for start in starts for place in range(group[1])]
    weight, inputs = weight[:, order], inputs[:, order]
    gram = inputs.T @ inputs / len(inputs)
    price, masks = prices(gram), {}

    def chosen(rest, j):
        if j % group[1] == 0:
            costs = rest[:, j : j + group[1]].square() / price[j : j + group[1]]
            masks[j // group[1]] = loops_mask(costs, None, group)
        return masks[j // group[1]][:, j % group[1]]

    expected = recursion(weight, gram, chosen)
    torch.testing.assert_close(found[:, order].double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(found[:, order] == 0, expected == 0)


def test_one_removed_column_moves_the_others_to_the_least_squares_solution(matrix):
    """The closed form: with the first column gone, the others are the regression of the dense outputs on them."""
    weight, _, statistics = matrix
    gram = damped(statistics.gram)
    expected = torch.linalg.solve(gram[1:, 1:], (weight.double() @ gram)[:, 1:].T).T
    found = recursion(weight, statistics.gram, lambda rest, j: torch.full((N,), j == 0))
    torch.testing.assert_close(found[:, 1:], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_on_the_calibration_inputs_sparsegpt_errs_less_than_wanda_and_that_less_than_magnitude(matrix, pattern):
    weight, inputs, statistics = matrix
    size = {"sparsity": 0.5} if pattern == "unstructured" else {}
    errors = {}
    for score in ("sparsegpt", "wanda", "magnitude"):
        found = compressed(weight, statistics, Prune(score, pattern, **size))
        errors[score] = float((F.linear(inputs.double(), (found - weight).double())).square().sum())
    assert errors["sparsegpt"] <= errors["wanda"] <= errors["magnitude"]


def test_dead_inputs_go_first_and_move_nothing(matrix):
    weight, inputs, _ = matrix
    inputs = inputs.clone()
    inputs[:, ::2] = 0
    for score in ("wanda", "sparsegpt"):
        statistics = Statistics(inputs.T @ inputs / 600, 600)
        found = compressed(weight, statistics, Prune(score, sparsity=0.5))
        assert float(F.linear(inputs, found - weight).abs().max()) < 1e-3


def test_spec_and_tensors_rebuild_the_packed_weight(matrix):
    for packed in (
        pack_zeros(matrix[0].relu()),
        METHODS[Prune].compress(matrix[0], None, Prune("magnitude", "2:4"), None),
    ):
        again = rebuild(packed.spec(), packed.tensors())
        assert type(again) is type(packed)
        assert again.spec() == packed.spec()
        assert torch.equal(again.unpack(), packed.unpack())
        assert packed.nbytes == sum(tensor.numpy().nbytes for tensor in packed.tensors().values())


def test_bytes_are_those_of_the_formats():
    half = torch.ones(16, 64, dtype=torch.bfloat16)
    half[:, ::2] = 0
    assert pack_zeros(half, of_four=True).nbytes == 16 * 64 * 2 * 0.5625
    assert pack_zeros(half).nbytes == 16 * 32 * 2 + 16 * 8 + 2 * 4
    assert isinstance(pack_zeros(half[:, :60], of_four=True), Bitmap)  # 2:4 wants columns in multiples of 8
    assert str(pack_zeros(half)) == "50% zeros, run dense: bitmap pays from 70% zeros on the CPU"
    assert str(pack_zeros(half, of_four=True)) == "2:4 packed"
    half[:, 1::4] = 0
    assert str(pack_zeros(half)) == "bitmap, 75% zeros"


KINDS = {
    "2:4": (Prune("magnitude", "2:4"), Sparse24Linear),
    "dense": (Prune("magnitude", sparsity=0.5), ZerosLinear),
    "bitmap": (Prune("magnitude", sparsity=0.8), BitmapLinear),
}


def zeros_of(model):
    """Where the weights are zero, by name, from what a file would hold."""
    found = {}
    for name, spec in record.compressed_modules(model).items():
        layer = model.get_submodule(name)
        state = layer.state_dict()
        tensors = {part: state[part] for part in ("weight", "positions", "bitmap", "offsets") if part in state}
        found[name] = rebuild(spec, tensors).unpack() == 0
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_what_the_masked_dense_one_does_with_its_gradients(tiny_model, kind):
    recipe, layer = KINDS[kind]
    model = tiny_model("LlamaForCausalLM")
    name = "model.layers.1.mlp.down_proj"
    dense = copy.deepcopy(model.get_submodule(name)).double()
    report = pycompress.apply(model, replace(recipe, targets=("down",)), progress=False)
    packed = model.get_submodule(name)
    assert type(packed) is layer
    mask = zeros_of(model)[name]
    assert bool((mask.float().mean() - recipe.zeros).abs() < 1e-3)
    assert next(row for row in report.rows if row.name == name).after == sum(
        t.numel() * t.element_size() for part, t in packed.state_dict().items() if part != "bias"
    )
    x = torch.randn(2, 3, 96, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    with torch.no_grad():
        dense.weight.masked_fill_(mask, 0)
    y, expected = packed(x), dense(wide)
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(packed.bias.grad.double(), dense.bias.grad, rtol=1e-3, atol=1e-2)
    kept = dense.weight.grad.masked_fill(mask, 0)
    with torch.no_grad():
        packed.weight.copy_(packed.weight.grad)  # read the gradient of the values as the layer would store it
    if kind == "dense":
        assert bool((packed.weight.grad[mask] == 0).all())
        torch.testing.assert_close(packed.weight.double(), kept, rtol=1e-3, atol=1e-2)
    else:
        state = {key: tensor for key, tensor in packed.state_dict().items() if key != "bias"}
        spec = record.compressed_modules(model)[name]
        torch.testing.assert_close(rebuild(spec, state).unpack().double(), kept, rtol=1e-3, atol=1e-2)


OPTIMIZERS = {
    "AdamW with decay": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-2, momentum=0.9, weight_decay=1e-2),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_after_an_epoch_of_fine_tuning_every_zero_is_exactly_zero(tiny_model, tmp_path, kind, optimizer):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, KINDS[kind][0], progress=False)
    before, weights = zeros_of(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    step = OPTIMIZERS[optimizer](model.parameters())
    for ids in IDS:
        step.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        step.step()
    after = zeros_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(not torch.equal(weights[f"{name}.weight"], model.get_parameter(f"{name}.weight")) for name in before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.slow
def test_recovery_trains_the_values_keeps_the_zeros_and_refuses_adapters(tiny_model):
    for kind, (recipe, _) in KINDS.items():
        model = tiny_model("Qwen2ForCausalLM").bfloat16()
        pycompress.apply(model, recipe, progress=False)
        before = zeros_of(model)
        values = {name: model.get_parameter(f"{name}.weight").detach().clone() for name in before}
        for how in ({"method": "factors"}, {"method": "full", "keep_zeros": True}):
            result = pycompress.recover(
                model, IDS, tokens=4 * 24, window=24, batch_size=2, lr=1e-2, weight_decay=0.1, progress=False, **how
            )
            assert len(result.losses) == 2
            moved = {name for name in before if not torch.equal(model.get_parameter(f"{name}.weight"), values[name])}
            assert moved == set(before)
            after = zeros_of(model)
            assert all(torch.equal(before[name], after[name]) for name in before), kind
        with pytest.raises(ValueError, match="every linear of the blocks is packed or rounded"):
            pycompress.recover(model, IDS, tokens=24, window=24, method="lora", progress=False)
        with pytest.raises(ValueError, match="is packed, and LoRA cannot be merged into it"):
            pycompress.recover(model, IDS, tokens=24, window=24, method="lora", lora_targets="q", progress=False)


def test_a_weight_that_training_rounds_to_zero_saves_and_loads(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, KINDS["dense"][0], progress=False)
    name = "model.layers.0.mlp.up_proj"
    with torch.no_grad():
        weight = model.get_parameter(f"{name}.weight")
        weight[0] = 0
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_parameter(f"{name}.weight"), weight)
    assert record.compressed_modules(again)[name]["kept"] == int(weight.count_nonzero())


def test_state_dicts_go_from_one_pruned_model_to_another(tiny_model):
    models = [tiny_model("LlamaForCausalLM", seed=seed) for seed in (0, 0)]
    for model in models:
        pycompress.apply(model, KINDS["dense"][0], progress=False)
    with torch.no_grad():
        for parameter in models[0].parameters():
            parameter.mul_(2)
    models[1].load_state_dict(models[0].state_dict())
    found = [dict(model.named_parameters()) for model in models]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize(
    ("kind", "part", "spoil", "message"),
    [
        ("2:4", "positions", lambda t: t.fill_(0), "positions must be pairs of two columns of four"),
        ("2:4", "positions", None, r"lack .*positions"),
        ("bitmap", "bitmap", lambda t: t.fill_(255), "keeps 1229 values, but its bitmap has"),
        ("bitmap", "offsets", lambda t: t.add_(1), "bits or other offsets"),
        ("dense", "bitmap", None, r"lack .*bitmap"),
    ],
)
def test_damaged_files_are_refused(tiny_model, tmp_path, kind, part, spoil, message):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, KINDS[kind][0], progress=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = f"model.layers.0.mlp.up_proj.{part}"
    if spoil is None:
        del tensors[name]
    else:
        spoil(tensors[name])
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_saved_pruned_models_reload_and_generate_in_a_new_process(tiny_model, tmp_path, save_expected, reload_all):
    for kind, (recipe, _) in KINDS.items():
        model = tiny_model("Gemma3ForCausalLM")
        pycompress.apply(model, recipe, progress=False)
        save_expected(model, tmp_path / "models" / kind)
        # Saved again after loading, it is the same file.
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / kind)
        model.save_pretrained(tmp_path / "again" / kind)
        files = [tmp_path / folder / kind / "model.safetensors" for folder in ("models", "again")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert reload_all(tmp_path / "models", "with") == {kind: [] for kind in KINDS}
    without = reload_all(tmp_path / "models", "without")
    assert all("mismatch" in str(outcome) for outcome in without.values()), without


def test_after_a_search_of_channels_what_is_left_gets_zeros(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    report = pycompress.apply(model, [SubnetSearch(keep=0.8), Prune("sparsegpt", "2:4")], IDS, progress=False)
    assert report.targets.keep < 0.8 * 0.6
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "sparsegpt"])
def test_a_global_share_of_zeros_is_one_budget_over_all_targets(tiny_model, score):
    model = tiny_model("LlamaForCausalLM")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-3)
    dense = {
        linear.name: dense_weight(model.get_submodule(linear.name)).clone() for linear in architectures.linears(model)
    }
    pycompress.apply(model, Prune(score, sparsity=0.5, scope="global"), IDS, progress=False)
    zeros = zeros_of(model)
    total = sum(mask.numel() for mask in zeros.values())
    assert sum(int(mask.sum()) for mask in zeros.values()) / total == pytest.approx(0.5, abs=0.01)
    shares = [float(mask.float().mean()) for mask in zeros.values()]
    assert max(shares) - min(shares) > 0.1
    if score == "magnitude":
        # One threshold on |W|, but for the 256 sizes that a matrix may have.
        threshold = torch.cat([weight.abs().flatten() for weight in dense.values()]).quantile(0.5)
        for name, mask in zeros.items():
            expected = float((dense[name].abs() < threshold).float().mean())
            assert float(mask.float().mean()) == pytest.approx(expected, abs=1.5 / 256)


def test_a_global_rate_is_one_threshold_over_all_targets(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    dense = {
        linear.name: dense_weight(model.get_submodule(linear.name)).clone() for linear in architectures.linears(model)
    }
    pycompress.apply(model, Prune("magnitude", rate=0.8, scope="global"), progress=False)
    every = torch.cat([weight.double().abs().flatten() for weight in dense.values()])
    for name, mask in zeros_of(model).items():
        assert torch.equal(mask, dense[name].double().abs() < 0.8 * every.std())


@pytest.fixture
def followed(tiny_model, tmp_path):
    """A model trained for three steps, its tracker, and the folder the tracker was saved in."""
    model = tiny_model("GPT2LMHeadModel")
    tracker = TrajectoryTracker()
    step = torch.optim.SGD(model.parameters(), lr=0.5)
    for ids in IDS[:3]:
        step.zero_grad()
        model(ids[None], labels=ids[None]).loss.backward()
        step.step()
        tracker.update(model)
    tracker.save(tmp_path / "followed")
    return model, tracker, str(tmp_path / "followed")


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_importance_along_training_decides_which_weights_go(followed, scope):
    model, tracker, folder = followed
    importance = tracker.importance()
    recipe = Prune("trajectory", rate=1.0, scope=scope, trajectory=folder)
    weights = {
        linear.name: model.get_submodule(linear.name).weight.detach().T for linear in architectures.linears(model)
    }
    weights = {name: weight.double().clone() for name, weight in weights.items()}
    every = torch.cat([weight.abs().flatten() for weight in weights.values()])
    pycompress.apply(model, recipe, progress=False)
    for name, mask in zeros_of(model).items():
        deviation = weights[name].abs().std() if scope == "layer" else every.std()
        assert torch.equal(mask, importance[name].T.double() < deviation)
        assert not torch.equal(mask, weights[name].abs() < deviation)


def test_a_share_of_zeros_by_importance_along_training(followed):
    model, tracker, folder = followed
    importance = tracker.importance()
    pycompress.apply(model, Prune("trajectory", sparsity=0.3, trajectory=folder), progress=False)
    for name, mask in zeros_of(model).items():
        assert torch.equal(mask, loops_mask(importance[name].T, 0.3, "matrix"))


def test_channels_go_by_importance_along_training(followed):
    model, tracker, folder = followed
    importance = tracker.importance()
    width = 96
    expected = []
    for block in range(2):
        up, down = (importance[f"transformer.h.{block}.mlp.{name}"].double() for name in ("c_fc", "c_proj"))
        scores = up.square().sum(0) + down.square().sum(1)
        expected.append((scores, dense_weight(model.get_submodule(f"transformer.h.{block}.mlp.c_fc")).clone()))
    pycompress.apply(model, Prune("trajectory", "channels", sparsity=0.3, trajectory=folder), progress=False)
    for block, (scores, weight) in enumerate(expected):
        left = dense_weight(model.get_submodule(f"transformer.h.{block}.mlp.c_fc"))
        assert len(left) < width
        kept = scores.argsort(descending=True)[: len(left)].sort().values
        assert torch.equal(left, weight[kept])


def test_matrices_that_were_not_followed_are_named_before_anything_changes(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    tracker = TrajectoryTracker(targets="*.q_proj")
    tracker.update(model)
    tracker.save(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    recipe = Prune("trajectory", sparsity=0.5, trajectory=str(tmp_path))
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj was not followed: .* has 2 other matrices"):
        pycompress.apply(model, recipe, progress=False)
    other = tiny_model("LlamaForCausalLM", hidden_size=32)
    with pytest.raises(ValueError, match=r"q_proj is \[32, 32\] and was \[64, 64\]"):
        pycompress.apply(other, replace(recipe, targets=("q",)), progress=False)
    with pytest.raises(ValueError, match="holds no trajectory"):
        pycompress.apply(model, replace(recipe, trajectory=str(tmp_path / "nowhere")), progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_channels_are_the_structural_method_of_the_score():
    assert recipes.parse(Prune("magnitude", "channels", sparsity=0.2)) == [Magnitude(0.8)]
    assert recipes.parse([Prune("wanda", "channels", sparsity=0.3)]) == [Wanda(0.7)]
    found = recipes.parse(Prune("trajectory", "channels", sparsity=0.5, trajectory="folder"))
    assert found == [TrajectoryChannels(0.5, trajectory="folder")]
    plain = Prune("wanda", "2:4")
    assert recipes.parse(plain) == [plain]


def test_recipes_go_through_yaml(tmp_path):
    made = [Prune("sparsegpt", "2:4", targets=("q",)), Prune("trajectory", rate=1.4, trajectory="x", targets=("up",))]
    recipes.save(made, tmp_path / "recipe.yaml")
    assert recipes.parse(tmp_path / "recipe.yaml") == made
    (tmp_path / "unquoted.yaml").write_text("method: Prune\nscore: wanda\npattern: 2:4\n")
    assert recipes.parse(tmp_path / "unquoted.yaml") == [Prune("wanda", "2:4")]
    assert Prune.size(0.5, yaml.safe_load("{method: Prune, pattern: 1:16}")) == {}


def test_a_killed_run_goes_on_to_the_same_bits(tiny_model, tmp_path, monkeypatch):
    recipe = Prune("sparsegpt", sparsity=0.6, scope="global")
    expected = tiny_model("LlamaForCausalLM")
    pycompress.apply(expected, recipe, IDS, progress=False)
    model = tiny_model("LlamaForCausalLM")
    real, calls = METHODS[Prune].compress, []

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) > 9:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setitem(METHODS, Prune, replace(METHODS[Prune], compress=killed))
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, recipe, IDS, checkpoint=tmp_path, progress=False)
    assert not record.compressed_modules(model)
    monkeypatch.setitem(METHODS, Prune, replace(METHODS[Prune], compress=real))
    pycompress.apply(model, recipe, IDS, checkpoint=tmp_path, progress=False)
    found = model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.state_dict().items())


def test_runs_of_other_sizes_share_their_curves(tiny_model, tmp_path):
    for sparsity in (0.5, 0.7):
        recipe = Prune("wanda", sparsity=sparsity, scope="global")
        pycompress.apply(tiny_model("LlamaForCausalLM"), recipe, IDS, checkpoint=tmp_path, progress=False)
    curves = {file.name.split("-")[1] for file in tmp_path.glob("curves-*.json")}
    assert len(curves) == 1
    assert json.loads(next(tmp_path.glob("curves-*.json")).read_text())["description"]["energy"]


def test_a_grid_fills_the_share_of_zeros_in():
    assert Prune.size(0.8, {"method": "Prune"}) == {"sparsity": 0.2}
    assert Prune.size(0.8, {"method": "Prune", "rate": 1.0}) == {}
    assert Prune.size(0.8, {"method": "Prune", "pattern": "2:4"}) == {}
    assert Magnitude.size(0.8, {"method": "Magnitude"}) == {"keep": 0.8}
    assert Magnitude.size(0.8, {"method": "Magnitude", "keep": 0.5}) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "needs sparsity, the share of zeros, or rate"),
        ({"sparsity": 0.5, "rate": 1.0, "score": "magnitude"}, "one of the two"),
        ({"sparsity": 1.0}, r"Prune\.sparsity must be in \(0, 1\), got 1\.0"),
        ({"sparsity": "half"}, r"Prune\.sparsity must be in \(0, 1\), got 'half'"),
        ({"rate": 1.0}, 'goes with score="magnitude" or "trajectory"'),
        ({"rate": -1.0, "score": "magnitude"}, r"Prune\.rate must be in \(0, inf\), got -1\.0"),
        ({"score": "obs", "sparsity": 0.5}, "Prune.score must be one of"),
        ({"pattern": "blocks", "sparsity": 0.5}, 'Prune.pattern must be "unstructured", "channels" or "N:M"'),
        ({"pattern": "4:4"}, "0 < N < M; got '4:4'"),
        ({"pattern": "2:4", "sparsity": 0.6}, "says how many of 4 weights stay; leave out sparsity"),
        ({"pattern": "2:4", "scope": "global"}, "leave out sparsity, rate and scope"),
        ({"pattern": "channels", "sparsity": 0.5}, 'sparsegpt" changes single weights and has no channels'),
        ({"pattern": "channels", "sparsity": 0.5, "score": "wanda", "targets": ("q",)}, "Wanda narrows whole blocks"),
        ({"score": "trajectory", "sparsity": 0.5}, 'Prune.trajectory goes with score="trajectory"'),
        ({"trajectory": "x", "sparsity": 0.5}, 'Prune.trajectory goes with score="trajectory"'),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Prune(**settings)


def test_a_matrix_whose_rows_the_pattern_does_not_divide_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"q_proj: the pattern 2:7 needs inputs in multiples of 7, got 64"):
        pycompress.apply(tiny_model("LlamaForCausalLM"), Prune("magnitude", "2:7"), progress=False)


def test_a_pruned_layer_is_not_pruned_again(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, Prune("magnitude", sparsity=0.5), progress=False)
    with pytest.raises(ValueError, match="is compressed already"):
        pycompress.apply(model, Prune("magnitude", sparsity=0.6), progress=False)


def test_layers_take_the_kind_that_their_zeros_and_device_pay_for(matrix):
    assert isinstance(pack_zeros(matrix[0]), Bitmap)
    assert isinstance(pack_zeros(matrix[0].masked_fill(loops_mask(matrix[0], None, (2, 4)), 0), True), Sparse24)
