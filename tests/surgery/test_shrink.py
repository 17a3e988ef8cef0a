"""shrink.py: a shrunk model computes what the dense one does without the contributions of what was removed."""

import copy

import pytest
import torch

from pycompress.architectures import model as architectures
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.surgery.shrink import plain_config, shrink


def zeroed(model, subnet):
    """A copy of the dense model whose removed channels are masked where they are computed, by the classes' layouts."""
    model = copy.deepcopy(model)
    for index, (block, kept) in enumerate(zip(architectures.blocks(model), subnet.blocks, strict=True)):
        if kept is None:
            block.register_forward_hook(_skip, with_kwargs=True)
            continue
        sizes = architectures.geometry(model, index)
        group = sizes.heads // sizes.kv_heads
        qk = torch.zeros(sizes.kv_heads, sizes.width)
        vo = torch.zeros(sizes.kv_heads, sizes.width)
        heads = range(sizes.kv_heads) if kept.kv_heads is None else kept.kv_heads.tolist()
        for row, head in enumerate(heads):
            qk[head, slice(None) if kept.qk is None else kept.qk[row % len(kept.qk)]] = 1
            vo[head, slice(None) if kept.vo is None else kept.vo[row]] = 1
        mlp = torch.zeros(sizes.mlp)
        mlp[slice(None) if kept.mlp is None else kept.mlp] = 1
        q, ones = qk.repeat_interleave(group, 0), torch.ones_like(qk)
        paths = architectures.architecture_of(model).paths
        if "q" in paths:
            _mask_output(block.get_submodule(paths["q"]), q.flatten())
            _mask_output(block.get_submodule(paths["k"]), qk.flatten())
        elif "query_key_value" in paths["qkv"]:
            _mask_output(block.get_submodule(paths["qkv"]), torch.stack([qk, qk, ones], 1).flatten())
        else:
            _mask_output(block.get_submodule(paths["qkv"]), torch.cat([q.flatten(), qk.flatten(), ones.flatten()]))
        _mask_input(block.get_submodule(paths["o"]), vo.repeat_interleave(group, 0).flatten())
        _mask_input(block.get_submodule(paths["down"]), mlp)
    return model


def _skip(module, args, kwargs, output):
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def _mask_output(module, mask):
    module.register_forward_hook(lambda module, args, output: output * mask)


def _mask_input(module, mask):
    module.register_forward_pre_hook(lambda module, args: (args[0] * mask,))


def _logits(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def _assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("plain", [False, None])
def test_a_shrunk_model_is_the_dense_one_without_what_was_removed(
    deep_model, draw, architecture, token_ids, shrink_case, plain
):
    model = deep_model(architecture)
    subnet = draw(model, shrink_case)
    expected = _logits(zeroed(model, subnet), token_ids)
    before = _logits(model, token_ids)
    assert not torch.allclose(before, expected, rtol=0.1)
    shrink(model, subnet, plain=plain)
    _assert_same(_logits(model, token_ids), expected)


def test_the_scale_of_a_block_that_moves_up_stays(deep_model, draw, token_ids):
    flags = {"scale_attn_by_inverse_layer_idx": True, "scale_attn_weights": False}
    for changes in (flags, flags | {"scale_attn_weights": True}, {"scale_attn_weights": False}):
        model = deep_model("GPT2LMHeadModel", **changes)
        subnet = draw(model, "all")
        expected = _logits(zeroed(model, subnet), token_ids)
        shrink(model, subnet)
        _assert_same(_logits(model, token_ids), expected)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("rope", ["default", "linear", "llama3", "yarn"])
def test_kept_pairs_rotate_by_their_own_frequencies(deep_model, draw, token_ids, rope, plain):
    parameters = {"rope_type": rope, "rope_theta": 500.0}
    if rope != "default":
        parameters["factor"] = 4.0
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    if rope == "yarn":
        parameters |= {"original_max_position_embeddings": 16}
    model = deep_model("LlamaForCausalLM", rope_parameters=parameters)
    subnet = draw(model, "alike")
    expected = _logits(zeroed(model, subnet), token_ids)
    shrink(model, subnet, plain=plain)
    _assert_same(_logits(model, token_ids), expected)
    if plain:
        frequencies = model.model.rotary_emb.inv_freq
        dense = deep_model("LlamaForCausalLM", rope_parameters=parameters).model.rotary_emb.inv_freq
        kept = dense[subnet.blocks[0].qk[0, :4]]
        assert torch.equal(frequencies, kept) if rope == "default" else torch.allclose(frequencies, kept, rtol=2e-7)


@pytest.mark.parametrize("plain", [False, True])
def test_each_kind_of_block_keeps_its_own_rotary_pairs(deep_model, token_ids, plain):
    model = deep_model("Gemma3ForCausalLM")
    pairs = [[0, 2, 5, 9], [1, 7, 8, 15]] * 2
    vo = [[0, 1, 2, 3, 4, 9, 11, 30]] * 2
    subnet = Subnet(tuple(Kept(qk=[low + [j + 16 for j in low]], vo=vo) for low in pairs))
    expected = _logits(zeroed(model, subnet), token_ids)
    shrink(model, subnet, plain=plain)
    assert architectures.geometry(model, 3).width == 8
    _assert_same(_logits(model, token_ids), expected)


@pytest.mark.parametrize("case", ["all", "alike"])
def test_eager_attention_computes_the_same(deep_model, draw, architecture, token_ids, case):
    model = deep_model(architecture)
    shrink(model, draw(model, case))
    expected = _logits(model, token_ids)
    model.set_attn_implementation("eager")
    _assert_same(_logits(model, token_ids), expected)


@pytest.mark.parametrize("plain", [False, None])
def test_shrinking_twice_is_shrinking_once(deep_model, architecture, token_ids, plain):
    exact = {"rms_norm_eps": 1e-12} if architecture in ("Qwen3ForCausalLM", "Gemma3ForCausalLM") else {}
    model = deep_model(architecture, **exact)
    sizes = architectures.geometry(model, 0)
    low = [0, 1, 3, 4] if sizes.rotary == sizes.width else [0, 1]
    rest = [5, 6, 9, 12] if sizes.rotary != sizes.width else []
    first = low + [j + sizes.rotary // 2 for j in low] + rest if sizes.rotary else [0, 1, 3, 4, 8, 9, 11, 12]
    second = [1, 3, 5, 7] if sizes.rotary else [2, 3, 5, 6]
    once = [first[i] for i in second]
    vo, heads = [[0, 2, 4, 6, 8, 10, 12, 14]], sizes.kv_heads
    before = Kept(mlp=range(0, 96, 2), qk=[first], vo=vo * heads)
    then = Kept(mlp=range(0, 48, 3), qk=[second], vo=[[0, 1, 6, 7]] * heads)
    both = Kept(mlp=range(0, 96, 6), qk=[once], vo=[[0, 2, 12, 14]] * heads)
    expected = _logits(zeroed(model, Subnet((both, None, both, both))), token_ids)
    shrink(model, Subnet((before,) * 4), plain=plain)
    shrink(model, Subnet((then, None, then, then)), plain=plain)
    _assert_same(_logits(model, token_ids), expected)


def test_sizes_of_each_block_become_a_plain_config_where_they_can(deep_model, draw, architecture, token_ids):
    model, twin = deep_model(architecture), deep_model(architecture)
    for case in ("alike_mlp", "alike") if architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM") else ("alike_mlp",):
        shrink(model, draw(model, case), plain=False)
        assert hasattr(model, "hf_quantizer")
        shrink(model, Subnet.whole(3), plain=True)
        assert not hasattr(model, "hf_quantizer")
        shrink(twin, draw(twin, case), plain=True)
        assert model.config.to_dict() == twin.config.to_dict()
        assert torch.equal(_logits(model, token_ids), _logits(twin, token_ids))
        model, twin = deep_model(architecture), deep_model(architecture)


def test_given_weights_take_the_place_of_slices(deep_model, token_ids):
    model = deep_model("LlamaForCausalLM")
    kept = Kept(mlp=range(10))
    down, gate = "model.layers.1.mlp.down_proj", "model.layers.1.mlp.gate_proj"
    twin = zeroed(model, Subnet((kept,) * 4))
    weight, bias, rows = torch.randn(64, 10), torch.randn(64), torch.randn(10, 64)
    with torch.no_grad():
        twin.get_submodule(down).weight[:, :10] = weight
        twin.get_submodule(down).bias.copy_(bias)
        twin.get_submodule(gate).weight[:10] = rows
    shrink(model, Subnet((kept,) * 4), {down: (weight, bias), gate: (rows, None)})
    _assert_same(_logits(model, token_ids), _logits(twin, token_ids))


@pytest.mark.parametrize("class_name", ["Qwen3ForCausalLM", "Gemma3ForCausalLM"])
def test_given_norms_are_taken_as_they_are_but_for_the_softmax_scale(deep_model, draw, class_name):
    model = deep_model(class_name)
    name = "model.layers.0.self_attn."
    given = {f"{name}{norm}": (torch.randn(8), None) for norm in ("q_norm", "k_norm")}
    shrink(model, draw(model, "alike"), given)
    fold = 0.5 if class_name == "Qwen3ForCausalLM" else 1.0  # (8 / 32) ** 0.5
    torch.testing.assert_close(model.get_submodule(f"{name}q_norm").weight, given[f"{name}q_norm"][0] * fold)
    assert torch.equal(model.get_submodule(f"{name}k_norm").weight, given[f"{name}k_norm"][0])


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_shrinking_keeps_dtype_grad_mode_and_what_is_whole(deep_model, draw, class_name):
    model = deep_model(class_name).to(torch.bfloat16).train()
    for parameter in architectures.blocks(model)[0].parameters():
        parameter.requires_grad_(False)
    norm = next(m for m in architectures.blocks(model)[2].modules() if "Norm" in type(m).__name__)
    shrink(model, draw(model, "all"))
    first, second, _ = architectures.blocks(model)
    assert all(module.training for module in model.modules())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in first.parameters())
    assert all(parameter.requires_grad for parameter in second.parameters())
    assert norm.weight in set(second.parameters())
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_matrices_that_stay_whole_are_the_same_tensors(deep_model, draw, architecture):
    model = deep_model(architecture)
    o, down = (architectures.architecture_of(model).paths[role] for role in ("o", "down"))
    before = architectures.blocks(model)
    shrink(model, draw(model, "mlp"))
    for index, (old, new) in enumerate(zip(before, architectures.blocks(model), strict=True)):
        assert new.get_submodule(o).weight is old.get_submodule(o).weight
        assert (new.get_submodule(down).weight is old.get_submodule(down).weight) == (index == 1)


@pytest.mark.parametrize("plain", [False, None])
def test_undo_puts_the_very_model_back(deep_model, draw, architecture, token_ids, tmp_path, plain):
    model = deep_model(architecture)
    config, before = model.config, dict(model.named_modules())
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    shown, expected = config.to_dict(), _logits(model, token_ids)
    undo = shrink(model, draw(model, "alike"), plain=plain)
    inside = shrink(model, Subnet.whole(3), plain=plain)
    inside()
    undo()
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())
    assert all(torch.equal(parameter, values[name]) for name, parameter in model.named_parameters())
    assert model.config is config
    assert config.to_dict() == shown
    assert all(module.config is config for module in model.modules() if hasattr(module, "config"))
    assert torch.equal(_logits(model, token_ids), expected)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_an_error_leaves_the_model_as_it_was(deep_model, draw, token_ids, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    model = deep_model("LlamaForCausalLM")
    before, config, expected = dict(model.named_modules()), model.config, _logits(model, token_ids)
    for part in ("resize", "record_blocks"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pycompress.surgery.shrink.{part}", fail)
            with pytest.raises(KeyboardInterrupt):
                shrink(model, draw(model, "all"))
        after = dict(model.named_modules())
        assert after.keys() == before.keys()
        assert all(after[name] is module for name, module in before.items())
        assert model.config is config
        assert not hasattr(model, "hf_quantizer")
    assert torch.equal(_logits(model, token_ids), expected)


def test_models_of_one_config_object_stay_apart(deep_model, draw, token_ids):
    first = deep_model("LlamaForCausalLM")
    second = type(first)(first.config).eval()
    expected = _logits(second, token_ids)
    shrink(first, draw(first, "alike"))
    assert second.config.num_hidden_layers == 4
    assert torch.equal(_logits(second, token_ids), expected)


def _packed(model, compress):
    compress(model, ["model.layers.0.self_attn.q_proj"])


def _hooked(model, compress):
    model.model.layers[1].mlp.register_forward_hook(lambda *args: None)


def _tied(model, compress):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def _on_meta(model, compress):
    model.model.layers[2].to("meta")


def _quantized(model, compress):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_packed, "has packed modules; shrink the dense model first"),
        (_hooked, r"model\.layers\.1\.mlp has hooks"),
        (_tied, r"layers\.1\.mlp\.up_proj\.weight is tied to model\.layers\.0\.mlp\.up_proj\.weight"),
        (_on_meta, r"model\.layers\.2 is on the meta device"),
        (_quantized, "quantized with bitsandbytes"),
    ],
)
def test_models_that_cannot_be_shrunk_are_refused(deep_model, compress_by_hand, spoil, message):
    model = deep_model("LlamaForCausalLM")
    spoil(model, compress_by_hand)
    with pytest.raises(ValueError, match=message):
        shrink(model, Subnet.whole(4))


DOWN = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("blocks", "weights", "message"),
    [
        ((Kept(),) * 3, {}, "the subnet has 3 blocks, the model 4"),
        ((Kept(), Kept(mlp=[96]), Kept(), Kept()), {}, "block 1: mlp keeps index 96"),
        ((Kept(),) * 4, {"lm_head": (torch.ones(97, 64), None)}, "weights name 'lm_head', which is no linear"),
        ((Kept(), None, Kept(), Kept()), {DOWN: (torch.ones(64, 96), None)}, "no linear or head norm of a kept block"),
        ((Kept(mlp=[0]),) * 4, {DOWN: (torch.ones(64, 96), None)}, r"is \[64, 1\] in the subnet, .* \[64, 96\]"),
        ((Kept(),) * 4, {DOWN: (torch.ones(64, 96), torch.ones(96))}, r"has 64 outputs, its given bias is \[96\]"),
    ],
)
def test_subnets_and_weights_that_do_not_fit_are_refused(deep_model, blocks, weights, message):
    with pytest.raises(ValueError, match=message):
        shrink(deep_model("LlamaForCausalLM"), Subnet(blocks), weights)


@pytest.mark.parametrize(
    ("class_name", "case", "message"),
    [
        ("LlamaForCausalLM", "all", "the blocks differ in heads, kv_heads, width, rotary, mlp"),
        ("OPTForCausalLM", "alike", r"OPTConfig has no field for the width of heads, so q cannot be \[32, 64\]"),
        ("GPT2LMHeadModel", "alike_heads", r"GPT2Config has no field .* qkv cannot be \[48, 64\]; keep all heads"),
        ("GPTNeoXForCausalLM", "alike", "keep all heads and all of their channels"),
        ("Phi3ForCausalLM", "alike", "Phi3Config refuses these sizes"),
    ],
)
def test_what_a_config_cannot_say_is_refused_with_the_reason(deep_model, draw, class_name, case, message):
    model = deep_model(class_name)
    subnet = draw(model, case)
    with pytest.raises(ValueError, match=message):
        plain_config(model, subnet)
    with pytest.raises(ValueError, match=message):
        shrink(model, subnet, plain=True)


def test_other_pairs_in_each_block_are_no_plain_config(deep_model):
    model = deep_model("LlamaForCausalLM")
    blocks = tuple(Kept(qk=[[j, j + 8]], vo=[[0, 1]] * 2) for j in range(4))
    with pytest.raises(ValueError, match="the blocks keep different rotary pairs"):
        plain_config(model, Subnet(blocks))


def test_frequencies_that_follow_the_text_are_no_plain_config(deep_model, draw):
    model = deep_model("LlamaForCausalLM", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="dynamic rotary frequencies depend on the length"):
        plain_config(model, draw(model, "alike"))
    assert plain_config(model, draw(model, "alike_heads")).rope_parameters["rope_type"] == "dynamic"


def test_a_bias_that_the_class_has_not_is_no_plain_config(deep_model, draw):
    model = deep_model("MistralForCausalLM")
    weights = {DOWN.replace("1", "2"): (torch.ones(64, 96), torch.ones(64))}
    with pytest.raises(ValueError, match="mistral has no biases on down"):
        shrink(model, draw(model, "depth"), weights, plain=True)
