"""A shrunk model is saved and loaded as any other: by transformers alone where its config can say what was kept."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from pycompress.architectures import model as architectures
from pycompress.architectures.model import KEPT_ROTARY
from pycompress.hub import record, skeleton
from pycompress.surgery.shrink import shrink

pytestmark = pytest.mark.slow

DERIVED_WIDTH = {"OPTForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM"}
CASES = ["all", "depth", "alike_mlp", "alike_heads", "alike"]
NOT_PLAIN = {(name, case) for name in DERIVED_WIDTH for case in ("alike_heads", "alike")} | {
    ("Phi3ForCausalLM", "alike")
}


def _is_plain(class_name, case):
    return case != "all" and (class_name, case) not in NOT_PLAIN


@pytest.fixture(scope="module")
def saved(tmp_path_factory, deep_model, draw, every_architecture, save_expected) -> Path:
    """Every architecture shrunk in every way and saved, one directory each, with its logits and what it generates."""
    root = tmp_path_factory.mktemp("shrunk")
    for class_name in every_architecture:
        for case in CASES:
            model = deep_model(class_name)
            shrink(model, draw(model, case))
            save_expected(model, root / f"{class_name}-{case}")
    return root


def _logits(model, token_ids):
    with torch.no_grad():
        return model(token_ids).logits


@pytest.mark.slow
def test_a_new_process_restores_every_model_bit_for_bit_and_generates_the_same(saved, reload_all):
    outcome = reload_all(saved, "with")
    assert set(outcome) == {directory.name for directory in saved.iterdir()}
    assert {name: found for name, found in outcome.items() if found} == {}


@pytest.mark.slow
def test_where_pycompress_is_not_installed_plain_models_load_and_others_never_do(saved, every_architecture, reload_all):
    outcome = reload_all(saved, "without")
    plain = {f"{name}-{case}" for name in every_architecture for case in CASES if _is_plain(name, case)}
    assert len(plain) == 4 * 9 - 7
    for name, found in outcome.items():
        if name in plain:
            assert found == [], name
        else:
            assert "mismatch" in found, (name, found)


@pytest.mark.parametrize("case", CASES)
def test_a_plain_config_mentions_nothing_of_pycompress(saved, architecture, case):
    config = json.loads((saved / f"{architecture}-{case}" / "config.json").read_text())
    assert ("quantization_config" not in config) == _is_plain(architecture, case)


@pytest.mark.parametrize("case", ["all", "alike"])
def test_a_loaded_model_saves_again(saved, architecture, case, tmp_path, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / f"{architecture}-{case}")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(_logits(again, token_ids), _logits(model, token_ids))


@pytest.mark.parametrize("case", ["all", "alike"])
def test_a_loaded_model_is_a_geometry_of_its_own(saved, deep_model, draw, architecture, case):
    dense = deep_model(architecture)
    subnet = draw(dense, case)
    model = AutoModelForCausalLM.from_pretrained(saved / f"{architecture}-{case}")
    for new, block in enumerate(subnet.kept_blocks):
        assert architectures.geometry(model, new) == architectures.geometry(dense, block).kept(subnet.blocks[block])


def test_the_parts_without_the_head_load_too(saved, architecture, token_ids):
    directory = saved / f"{architecture}-all"
    whole, base = AutoModelForCausalLM.from_pretrained(directory), AutoModel.from_pretrained(directory)
    with torch.no_grad():
        hidden = whole(token_ids, output_hidden_states=True).hidden_states[-1]
        if architecture != "OPTForCausalLM":  # its last hidden state is projected
            assert torch.equal(base(token_ids).last_hidden_state, hidden)


@pytest.mark.parametrize("case", ["all", "alike"])
def test_a_loaded_model_trains(saved, architecture, case, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / f"{architecture}-{case}").train()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = model(token_ids, labels=token_ids).loss
    first.backward()
    optimizer.step()
    assert model.eval()(token_ids, labels=token_ids).loss < first
    frozen = [name for name, old in before.items() if torch.equal(old, model.get_parameter(name))]
    assert not [name for name in frozen if "k_proj.bias" not in name]  # a constant in all logits changes no softmax


@pytest.mark.parametrize("case", ["all", "alike"])
def test_copies_and_casts_compute_the_same(saved, architecture, case, token_ids):
    model = AutoModelForCausalLM.from_pretrained(saved / f"{architecture}-{case}")
    twin = copy.deepcopy(model)
    expected = _logits(model, token_ids)
    assert torch.equal(_logits(twin, token_ids), expected)
    twin.to(torch.float64)
    torch.testing.assert_close(_logits(twin, token_ids).float(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max())
    half = AutoModelForCausalLM.from_pretrained(saved / f"{architecture}-{case}", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    kept = [tensor for name, tensor in half.named_buffers() if KEPT_ROTARY in name]
    assert all(tensor.dtype == torch.int32 for tensor in kept)
    assert _logits(half, token_ids).isfinite().all()


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "Phi3ForCausalLM"])
def test_torch_compile_takes_the_whole_graph(saved, token_ids, class_name):
    model = AutoModelForCausalLM.from_pretrained(saved / f"{class_name}-all")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(_logits(compiled, token_ids), _logits(model, token_ids), rtol=1e-5, atol=1e-5)


def test_device_map_auto_and_disk_offload_compute_the_same(saved, token_ids, tmp_path):
    pytest.importorskip("accelerate")
    directory = saved / "LlamaForCausalLM-all"
    expected = load_file(directory / "expected")["logits"]
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(directory, device_map="auto"), token_ids), expected)
    others = ("model.embed_tokens", "model.layers.1", "model.layers.2", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers.0": "disk"} | dict.fromkeys(others, "cpu")
    offloaded = AutoModelForCausalLM.from_pretrained(directory, device_map=places, offload_folder=tmp_path)
    assert offloaded.model.layers[0].self_attn.q_proj.weight.is_meta
    assert torch.equal(_logits(offloaded, token_ids), expected)


@pytest.mark.parametrize("case", ["all", "alike"])
def test_packed_modules_go_on_top(deep_model, draw, compress_by_hand, architecture, case, tmp_path, token_ids):
    model = deep_model(architecture)
    shrink(model, draw(model, case))
    compress_by_hand(
        model, [linear.name for linear in architectures.linears(model) if linear.role in ("o", "down", "up")]
    )
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert record.compressed_modules(loaded) == record.compressed_modules(model) != {}
    assert torch.equal(_logits(loaded, token_ids), _logits(model, token_ids))


def test_a_bias_that_the_class_has_not_is_saved(deep_model, draw, tmp_path, token_ids):
    model = deep_model("MistralForCausalLM")
    before = _logits(model, token_ids)
    name = "model.layers.2.mlp.down_proj"
    weight = model.get_submodule(name).weight
    shrink(model, draw(model, "depth"), {name: (weight, torch.ones(64))})
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[1].mlp.down_proj.bias, torch.ones(64))
    assert loaded.model.layers[0].mlp.down_proj.bias is None
    assert torch.equal(_logits(loaded, token_ids), _logits(model, token_ids))
    assert not torch.allclose(_logits(loaded, token_ids), before)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda b: b.pop("mlp"), "has the fields architecture, biases, heads, kv_heads, width, rotary, mlp; got"),
        (lambda b: b.update(architecture="Foo"), "is a shrunk 'Foo', this pycompress knows Llama"),
        (lambda b: b["mlp"].pop(), "must hold one size a block"),
        (lambda b: b["width"].__setitem__(0, 0), "width of blocks must be a list of integers"),
        (lambda b: [b[size].pop() for size in skeleton.SIZES], r"sizes of 2 blocks, but LlamaForCausalLM builds 3"),
        (lambda b: b["mlp"].__setitem__(0, 41), r"mlp\S+ mismatch: .* in the saved files"),
        (lambda b: b["mlp"].__setitem__(0, 10**7), "block 0 has mlp 10000000, but the whole model has 96"),
        (lambda b: b["heads"].__setitem__(0, 3), "block 0 has 3 heads, 1 kv_heads"),
        (lambda b: b["rotary"].__setitem__(0, 5), "rotary even and within the width"),
        (lambda b: b["mlp"].__setitem__(0, True), "mlp of blocks must be a list of integers"),
        (lambda b: b["mlp"].__setitem__(0, 40.0), "mlp of blocks must be a list of integers"),
        (lambda b: b.update(mlp={"0": 40}), "mlp of blocks must be a list of integers"),
        (lambda b: b.update(biases=["down"]), "biases of blocks must be, for some of the roles q, k"),
        (lambda b: b.update(biases={"down": [9]}), "lists of blocks below 3"),
        (lambda b: b.update(architecture=["LlamaForCausalLM"]), "is a shrunk"),
        (lambda b: b.update(architecture="GPT2LMHeadModel"), "was a GPT2LMHeadModel, but builds LlamaForCausalLM"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(saved, tmp_path, edit, message):
    source = saved / "LlamaForCausalLM-all"
    config = json.loads((source / "config.json").read_text())
    edit(config["quantization_config"]["blocks"])
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises((ValueError, RuntimeError), match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(("channels", "message"), [(None, "lack .*kept_rotary.channels"), (-1, "pairs of channels")])
def test_missing_or_damaged_rotary_channels_are_refused(saved, tmp_path, channels, message):
    source = saved / "LlamaForCausalLM-all"
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.0.self_attn.{KEPT_ROTARY}.channels"
    if channels is None:
        del tensors[name]
    else:
        tensors[name][0] = channels
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)
