"""SliceGPT: bases against numpy, sliced blocks against the dense ones in float64, sizes, undo, resume, refusals."""

import copy
import json
import pickle
import shutil

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pycompress
from pycompress import RTN, SWSC, SliceGPT, SubnetSearch, Wanda
from pycompress.architectures.model import blocks
from pycompress.architectures.supported import ARCHITECTURES
from pycompress.calibration.stream import Stream
from pycompress.hub import config as hub
from pycompress.methods import slicegpt
from pycompress.nn.blocks import SlicedBlock
from pycompress.nn.linear import SharedLinear
from pycompress.structural import slicing
from pycompress.surgery.rotate import Basis, install, sliced_block

IDS = torch.randint(3, 97, (12, 24), generator=torch.Generator().manual_seed(1))


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def random_basis(class_name, hidden, width, seed, slant=0.0):
    """A random rotation, sliced; `slant`: how far the encoder is from the decoder."""
    generator = torch.Generator().manual_seed(seed)
    whole = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator, dtype=torch.float64)).Q
    if ARCHITECTURES[class_name].norm_kind == "layer":
        ones = torch.ones(hidden, 1, dtype=torch.float64)
        whole = torch.linalg.qr(torch.cat([ones, whole[:, 1:]], 1)).Q.roll(-1, 1)
    decoder, rest = whole[:, :width], whole[:, width : hidden - 1]
    slope = torch.randn(rest.shape[1], width, generator=generator, dtype=torch.float64)
    encoder = decoder + slant * rest @ slope
    if ARCHITECTURES[class_name].norm_kind == "layer":
        encoder = encoder - encoder.mean(0)
    return Basis(decoder.float(), encoder.float())


def weights_in(model):
    """Numbers in the matrices of the decoder blocks, whatever they belong to."""
    return sum(p.numel() for block in blocks(model) for p in block.parameters() if p.ndim == 2)


def symmetric(size, seed, rank):
    points = np.random.default_rng(seed).normal(size=(rank, size)) * np.geomspace(1, 30, size)
    return points.T @ points / rank


def test_the_published_basis_is_the_first_eigenvectors():
    covariance = symmetric(24, 0, 60)
    decoder, encoder = slicegpt.principal(torch.from_numpy(covariance), 9)
    vectors = np.linalg.eigh(covariance)[1][:, -9:]
    np.testing.assert_allclose(decoder.double() @ encoder.double().T, vectors @ vectors.T, atol=1e-6)
    for column, vector in zip(decoder.T.numpy(), vectors.T[::-1], strict=True):
        assert abs(column @ vector) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("mean_free", [False, True])
def test_the_projection_is_the_best_in_the_metric_of_the_gradients(mean_free):
    size, width = 24, 9
    covariance, gradients = symmetric(size, 0, 60), symmetric(size, 1, 5)
    decoder, encoder = slicegpt.principal(
        torch.from_numpy(covariance), width, torch.from_numpy(gradients), mean_free=mean_free
    )
    center = np.eye(size) - mean_free / size
    covariance = center @ covariance @ center
    metric = center @ (gradients / np.mean(np.diag(gradients)) + slicegpt.DAMPING * np.eye(size)) @ center
    root = scipy.linalg.sqrtm(metric + (np.eye(size) - center)).real
    vectors = np.linalg.eigh(root @ covariance @ root)[1][:, -width:]
    expected = np.linalg.solve(root, vectors @ vectors.T @ root)
    np.testing.assert_allclose(decoder.double() @ encoder.double().T, expected, atol=1e-4)
    np.testing.assert_allclose(decoder.T @ decoder, np.eye(width), atol=1e-5)
    np.testing.assert_allclose(encoder.T @ decoder, np.eye(width), atol=1e-4)
    if mean_free:
        assert max(decoder.sum(0).abs().max(), encoder.sum(0).abs().max()) < 1e-4


def test_whole_rotations_change_nothing(deep_model, architecture, token_ids):
    model = deep_model(architecture)
    expected = logits_of(model, token_ids)
    dense = blocks(model)
    made, entry = [], None
    for index, block in enumerate(dense):
        leave = random_basis(architecture, 64, 64, 2 * index) if index < 3 else None
        parallel = architecture == "GPTNeoXForCausalLM"
        middle = entry if parallel else random_basis(architecture, 64, 64, 2 * index + 1)
        made.append(sliced_block(model, block, (entry, middle, leave)))
        entry = leave
    undo = install(model, made, [None, *[64] * 7, None])
    assert all(isinstance(block, SlicedBlock) for block in blocks(model))
    torch.testing.assert_close(logits_of(model, token_ids), expected, rtol=1e-4, atol=1e-4)
    undo()
    assert blocks(model) == dense


def test_keep_one_leaves_the_model_as_it_is(tiny_model, architecture):
    model, dense = tiny_model(architecture), tiny_model(architecture)
    report = pycompress.apply(model, SliceGPT(1.0), IDS, progress=False)
    assert same(state(model), state(dense))
    assert report.targets.keep == report.decoder.keep == 1.0
    assert torch.equal(logits_of(model), logits_of(dense))


def dense_halves(block, attention, norm, arguments, keywords, entry, project):
    """In float64, what a dense block gives when its residual stream is projected between attention and MLP."""
    seen = []
    handle = block.get_submodule(norm).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    whole = block(entry, *arguments, **keywords)
    handle.remove()
    middle = project(seen[0].view_as(entry))
    handle = block.get_submodule(attention).register_forward_hook(
        lambda module, args, output: (torch.zeros_like(output[0]), output[1])
    )
    out = block(middle, *arguments, **keywords)
    handle.remove()
    return whole, out


def test_a_sliced_block_computes_the_projected_dense_one(deep_model, architecture, token_ids):
    model = deep_model(architecture)
    parts = ARCHITECTURES[architecture]
    parallel = architecture == "GPTNeoXForCausalLM"
    entry, middle, leave = (random_basis(architecture, 64, width, width, 0.1) for width in (40, 33, 48))
    made = sliced_block(model, blocks(model)[1], (entry, entry if parallel else middle, leave))
    hidden = torch.randn(2, 13, 40, generator=torch.Generator().manual_seed(0))
    stream = Stream.open(model, blocks(model), [{"input_ids": token_ids}])
    arguments, keywords = stream.arguments[0][1]
    with torch.no_grad():
        found = made(hidden, *arguments, **keywords)

    wide = copy.deepcopy(model).double()
    stream = Stream.open(wide, blocks(wide), [{"input_ids": token_ids}])
    arguments, keywords = stream.arguments[0][1]

    def project(x):
        return x @ middle.encoder.double() @ middle.decoder.double().T

    with torch.no_grad():
        entered = hidden.double() @ entry.decoder.double().T
        norm = parts.stages[2].norm_before
        whole, halves = dense_halves(blocks(wide)[1], parts.attention, norm, arguments, keywords, entered, project)
        expected = (whole if parallel else halves) @ leave.encoder.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_bases_are_the_principal_directions_of_what_the_sliced_network_gives(tiny_model):
    dense = tiny_model("LlamaForCausalLM")
    model = copy.deepcopy(dense)
    pycompress.apply(model, SliceGPT(0.8, weighting="none"), IDS, progress=False)
    first = blocks(model)[0]
    width = first.shortcuts[0].out_features

    block, seen = blocks(dense.double())[0], []
    handle = block.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    logits_of(dense)
    handle.remove()
    x = seen[0].flatten(0, 1)
    vectors = np.linalg.eigh((x.T @ x).numpy())[1][:, -width:]
    weight = first.shortcuts[0].weight.detach().double().numpy()
    np.testing.assert_allclose(weight.T @ weight, vectors @ vectors.T, atol=1e-5)

    middle = x @ torch.from_numpy(vectors @ vectors.T)
    with torch.no_grad():
        out = middle + block.mlp(block.post_attention_layernorm(middle))
    after = np.linalg.eigh((out.T @ out).numpy())[1][:, -width:]
    turn = first.shortcuts[1].weight.detach().double().numpy()
    angles = np.linalg.svd(turn, compute_uv=False)
    np.testing.assert_allclose(angles, np.linalg.svd(after.T @ vectors, compute_uv=False), atol=1e-5)


def test_slicing_what_the_loss_is_least_sensitive_to_changes_the_loss_less(tiny_model):
    dense = tiny_model("OPTForCausalLM")
    expected = logits_of(dense)
    errors = {}
    for weighting in ("loss", "none"):
        model = copy.deepcopy(dense)
        pycompress.apply(model, SliceGPT(0.8, weighting=weighting), IDS, progress=False)
        errors[weighting] = float((logits_of(model) - expected).norm())
    assert errors["loss"] < 0.9 * errors["none"]


def test_kept_parameters_are_counted_with_the_products(tiny_model, architecture):
    model = tiny_model(architecture)
    dense = weights_in(model)
    report = pycompress.apply(model, SliceGPT(0.8, round_to=1, weighting="none"), IDS, progress=False)
    assert report.targets.keep == pytest.approx(weights_in(model) / dense)
    assert 0.77 < report.targets.keep <= 0.8
    assert str(report).count("shortcuts.") == sum(p.startswith("shortcuts") for p in _products(model))


def _products(model):
    named = ((name, module) for block in blocks(model) for name, module in block.named_modules())
    return [name for name, module in named if isinstance(module, torch.nn.Linear)]


def test_the_widest_stream_that_fits_is_taken(deep_model):
    """Parameters of four Llama blocks: 64 wide, 64 query, 32 key and value channels, 96 MLP channels."""
    model = deep_model("LlamaForCausalLM")
    dense = 4 * 64 * (64 + 32 + 32 + 64 + 3 * 96)

    def kept(d):
        first = 64 * 128 + 64 * d + 64 * d + d * 3 * 96 + d * d
        between = d * (128 + 64 + 3 * 96) + 2 * d * d
        last = d * 128 + 64 * d + d * d + d * 192 + 96 * 64 + d * 64
        return first + 2 * between + last

    width = max(d for d in range(4, 64, 4) if kept(d) <= 0.8 * dense)
    pycompress.apply(model, SliceGPT(0.8, round_to=4), IDS, progress=False)
    assert blocks(model)[1].shortcuts[0].weight.shape == (width, width)
    assert weights_in(model) == kept(width)


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "OPTForCausalLM"])
def test_padding_counts_for_nothing(tiny_model, class_name):
    plain, padded = tiny_model(class_name), tiny_model(class_name)
    pycompress.apply(plain, SliceGPT(0.8), [row[None] for row in IDS[:4]], progress=False)
    ids = torch.cat([IDS[:4], torch.zeros(4, 5, dtype=torch.long)], 1)
    batch = {"input_ids": ids, "attention_mask": torch.cat([torch.ones(4, 24), torch.zeros(4, 5)], 1).long()}
    pycompress.apply(
        padded, SliceGPT(0.8), [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)], progress=False
    )
    torch.testing.assert_close(logits_of(padded), logits_of(plain), rtol=1e-2, atol=1e-2)


def test_an_interruption_leaves_the_model_as_it_was(tiny_model, monkeypatch):
    model = tiny_model("Gemma3ForCausalLM")
    before, config, dense = state(model), model.config.to_dict(), blocks(model)
    original, calls = slicing.principal, []

    def stops(*args, **kwargs):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(slicing, "principal", stops)
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, SliceGPT(0.8), IDS, progress=False)
    assert same(state(model), before)
    assert blocks(model) == dense
    assert model.config.to_dict() == config
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("first", [[], [SubnetSearch(0.9, round_to=8)]])
def test_an_error_after_slicing_undoes_it(tiny_model, monkeypatch, first):
    model = tiny_model("Qwen3ForCausalLM")
    before, config, dense = state(model), model.config.to_dict(), blocks(model)

    def fails(*args):
        raise RuntimeError("no")

    monkeypatch.setattr("pycompress.packing.packing.put", fails)
    with pytest.raises(RuntimeError, match="no"):
        pycompress.apply(model, [*first, SliceGPT(0.9), RTN(8)], IDS, progress=False)
    assert same(state(model), before)
    assert blocks(model) == dense
    assert model.config.to_dict() == config
    assert not hasattr(model, "hf_quantizer")


def test_an_interrupted_run_goes_on_to_the_same_bits(tiny_model, monkeypatch, tmp_path):
    whole, model = (tiny_model("LlamaForCausalLM", num_hidden_layers=3) for _ in range(2))
    pycompress.apply(whole, SliceGPT(0.8), IDS, progress=False)
    original, calls = slicing.principal, []

    def stops(*args, **kwargs):
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    monkeypatch.setattr(slicing, "principal", stops)
    with pytest.raises(KeyboardInterrupt):
        pycompress.apply(model, SliceGPT(0.8), IDS, checkpoint=tmp_path, progress=False)
    pycompress.apply(model, SliceGPT(0.8), IDS, checkpoint=tmp_path, progress=False)
    assert len(calls) == 4 + 5 - 2  # the first block's two bases are on file
    assert same(state(model), state(whole))


@pytest.mark.parametrize(
    "recipe",
    [
        [SliceGPT(0.8), SWSC(0.5)],
        [SubnetSearch(0.8, round_to=8), SliceGPT(0.9)],
        [Wanda(0.8, uniform=True), SliceGPT(0.9)],
    ],
    ids=["then SWSC", "after a search", "after uniform pruning"],
)
@pytest.mark.parametrize("class_name", ["GPT2LMHeadModel", "Gemma3ForCausalLM", "Qwen2ForCausalLM"])
def test_it_combines_with_other_methods(tiny_model, class_name, recipe, tmp_path):
    model = tiny_model(class_name)
    dense = weights_in(model)
    report = pycompress.apply(model, recipe, IDS, progress=False)
    if any(isinstance(config, SWSC) for config in recipe):
        assert report.targets.keep < 0.8  # the products are not packed
        assert any(isinstance(module, SharedLinear) for module in model.modules())
    else:
        assert report.targets.keep == pytest.approx(weights_in(model) / dense)
        assert report.targets.keep <= np.prod([config.keep for config in recipe])
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.fixture(scope="module")
def saved(tmp_path_factory, deep_model, every_architecture, save_expected):
    """Every architecture sliced and saved, one directory each."""
    root = tmp_path_factory.mktemp("sliced")
    for class_name in every_architecture:
        model = deep_model(class_name)
        pycompress.apply(model, SliceGPT(0.8, weighting="none"), IDS, progress=False)
        save_expected(model, root / class_name)
    return root


@pytest.mark.slow
def test_a_new_process_restores_every_model_and_generates_the_same(saved, reload_all, every_architecture):
    assert reload_all(saved, "with") == {class_name: [] for class_name in every_architecture}


@pytest.mark.slow
def test_without_pycompress_no_sliced_model_loads(saved, reload_all, every_architecture):
    outcome = reload_all(saved, "without")
    assert set(outcome) == set(every_architecture)
    assert [name for name, found in outcome.items() if "mismatch" not in found] == []


def test_a_loaded_model_saves_again(saved, architecture, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(saved / architecture)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    assert same(state(again), state(model))


DAMAGED = {
    "widths": (lambda sliced: sliced["widths"].pop(), "two a block and one"),
    "blocks": (lambda sliced: sliced.update(widths=[None, 8, None]), "3 widths .* builds 4 blocks, which have 9"),
    "architecture": (lambda sliced: sliced.update(architecture="Other"), "is a sliced 'Other', .* knows Llama"),
    "too wide": (
        lambda sliced: sliced["widths"].__setitem__(1, 10**9),
        "is 1000000000 wide, but the whole model's is 64",
    ),
    "types": (lambda sliced: sliced["widths"].__setitem__(1, True), "integers of at least 1 or null"),
    "fields": (lambda sliced: sliced.update(more=1), "has the fields architecture, widths; got"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_config_is_refused(saved, case, tmp_path):
    damage, message = DAMAGED[case]
    shutil.copytree(saved / "LlamaForCausalLM", tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    damage(config["quantization_config"]["sliced"])
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_missing_product_is_refused(saved, tmp_path):
    shutil.copytree(saved / "LlamaForCausalLM", tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.shortcuts.0.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model.layers.1.shortcuts.0.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_a_sliced_model_is_copied_and_pickled(tiny_model, architecture):
    model = tiny_model(architecture)
    pycompress.apply(model, SliceGPT(0.8), IDS, progress=False)
    block = blocks(model)[0]
    again = pickle.loads(pickle.dumps(block))
    assert type(again) is type(block)
    assert same(state(again), state(block))
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))


def test_a_sliced_model_trains_with_gradient_checkpointing(tiny_model, architecture):
    model = tiny_model(architecture)
    pycompress.apply(model, SliceGPT(0.8), IDS, progress=False)
    model.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        torch.manual_seed(0)
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if "shortcuts" in name})
    assert gradients[0].keys()
    assert all(bool(gradient.any()) for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_hidden_states_are_recorded_as_of_the_dense_class(tiny_model, architecture):
    model = tiny_model(architecture)
    pycompress.apply(model, SliceGPT(0.8), IDS, progress=False)
    with torch.no_grad():
        hidden = model(IDS, output_hidden_states=True).hidden_states
    assert [state.shape[-1] for state in hidden[:2]] == [64, blocks(model)[0].shortcuts[1].out_features]
    assert len(hidden) == 3


REFUSED = {
    "before pruning": ([SliceGPT(0.8), Wanda(0.8)], "Wanda takes no sliced blocks; put SliceGPT after it"),
    "twice": ([SliceGPT(0.9), SliceGPT(0.9)], "takes no sliced blocks"),
    "after packing": ([RTN(8), SliceGPT(0.8)], "put SliceGPT first"),
    "too small": (SliceGPT(0.05), "keeps at least 0.348 .* at 8 of 64 directions, got keep=0.05"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_recipes(tiny_model, case):
    recipe, message = REFUSED[case]
    model = tiny_model("LlamaForCausalLM")
    before = state(model)
    with pytest.raises(ValueError, match=message):
        pycompress.apply(model, recipe, IDS, progress=False)
    assert same(state(model), before)


def test_refused_settings():
    with pytest.raises(ValueError, match="takes no targets"):
        SliceGPT(0.8, targets=("q",))
    with pytest.raises(ValueError, match="weighting must be one of 'loss', 'none'"):
        SliceGPT(0.8, weighting="inputs")
    with pytest.raises(ValueError, match="round_to must be an integer of at least 1"):
        SliceGPT(0.8, round_to=0)


def test_refused_models(tiny_model):
    with pytest.raises(ValueError, match=r"needs calibration="):
        pycompress.apply(tiny_model("LlamaForCausalLM"), SliceGPT(0.8), progress=False)
    after = tiny_model("OPTForCausalLM", do_layer_norm_before=False, word_embed_proj_dim=64)
    with pytest.raises(ValueError, match="do_layer_norm_before is false"):
        pycompress.apply(after, SliceGPT(0.8), IDS, progress=False)
    bare = tiny_model("OPTForCausalLM", _remove_final_layer_norm=True)
    with pytest.raises(ValueError, match="final_layer_norm is missing"):
        pycompress.apply(bare, SliceGPT(0.8), IDS, progress=False)
    crossed = tiny_model("GPT2LMHeadModel", add_cross_attention=True)
    with pytest.raises(ValueError, match=r"crossattention.* is no part of a GPT2LMHeadModel block"):
        pycompress.apply(crossed, SliceGPT(0.8), IDS, progress=False)


def test_a_sliced_model_is_not_sliced_or_pruned_again(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, SliceGPT(0.8), IDS, progress=False)
    sliced, before = blocks(model), hub.PycompressConfig.to_dict(model.config.quantization_config)
    with pytest.raises(ValueError, match="sliced already"):
        pycompress.apply(model, SliceGPT(0.8), IDS, progress=False)
    with pytest.raises(ValueError, match="blocks are sliced"):
        pycompress.apply(model, Wanda(0.8, round_to=8), IDS, progress=False)
    assert blocks(model) == sliced
    assert hub.PycompressConfig.to_dict(model.config.quantization_config) == before


def test_no_bias_is_lost_where_linears_have_none(tiny_model):
    """GPT-NeoX without attention biases: the norm's bias becomes the linear's."""
    model = tiny_model("GPTNeoXForCausalLM", attention_bias=False)
    expected = logits_of(model)
    report = pycompress.apply(model, SliceGPT(0.99, round_to=1), IDS, progress=False)
    assert report.targets.keep <= 0.99
    assert blocks(model)[1].attention.query_key_value.bias is not None
    assert float((logits_of(model) - expected).norm() / expected.norm()) < 0.2
