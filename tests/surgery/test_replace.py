"""replace.py: the module that takes a packed weight computes what the unpacked weight would."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import pycompress
from pycompress.architectures import model as architectures
from pycompress.formats.packed import Rounded
from pycompress.hub import record
from pycompress.nn.linear import KernelLinear, SharedLinear
from pycompress.nn.weights import dense_weight
from pycompress.surgery.replace import Undo, replace, use_dense_kernel

Q = "model.layers.0.self_attn.q_proj"


def _set_dense(model, name, dense):
    module = model.get_submodule(name)
    with torch.no_grad():
        module.weight.copy_(dense.T if isinstance(module, Conv1D) else dense)


def test_a_compressed_model_computes_what_its_dense_twin_does(tiny_model, compress_by_hand, architecture, token_ids):
    model = tiny_model(architecture)
    twin = copy.deepcopy(model)
    for name, made in compress_by_hand(model).items():
        _set_dense(twin, name, made.dense)
    with torch.no_grad():
        logits, expected = model(token_ids).logits, twin(token_ids).logits
        assert not torch.allclose(expected, tiny_model(architecture)(token_ids).logits, rtol=0.1)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("share", ["output", "input"])
@pytest.mark.parametrize(("clusters", "rank"), [(5, 7), (0, 7), (9, 0)])
@pytest.mark.parametrize("pivot", [False, True])
def test_a_replaced_module_equals_f_linear_with_the_dense_weight(
    tiny_model, pack_by_hand, share, clusters, rank, pivot
):
    model = tiny_model("GPT2LMHeadModel")
    name = "transformer.h.1.mlp.c_fc"
    made = pack_by_hand(dense_weight(model.get_submodule(name)), share, clusters, rank, pivot)
    bias = model.get_submodule(name).bias
    replace(model, name, made.packed)
    x = torch.randn(3, 5, 64)
    y = model.get_submodule(name)(x)
    torch.testing.assert_close(y, F.linear(x, made.dense, bias), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.packed.unpack(), made.dense, rtol=1e-4, atol=1e-5)


def test_dense_weight_multiplies_as_the_module_does(tiny_model, architecture):
    model = tiny_model(architecture)
    for linear in architectures.linears(model)[:8]:
        module = model.get_submodule(linear.name)
        weight = dense_weight(module)
        x = torch.randn(3, weight.shape[1])
        assert weight.is_contiguous()
        assert not weight.requires_grad
        torch.testing.assert_close(F.linear(x, weight, module.bias), module(x))


def test_replace_keeps_dtype_bias_grad_and_mode(tiny_model, pack_by_hand):
    model = tiny_model("LlamaForCausalLM").to(torch.bfloat16).train()
    old = model.get_submodule(Q)
    old.weight.requires_grad_(False)
    replace(model, Q, pack_by_hand(dense_weight(old).float(), "output", 5, 7).packed)
    new = model.get_submodule(Q)
    assert isinstance(new, SharedLinear)
    assert new.training
    assert new.bias is old.bias
    assert new.weight.dtype == new.factor.dtype == torch.bfloat16
    assert new.labels.dtype == torch.int16
    assert not new.weight.requires_grad
    assert not new.factor.requires_grad
    assert new.bias.requires_grad
    assert (new.in_features, new.out_features) == (64, 64)


def test_rounded_values_stay_in_an_ordinary_linear(tiny_model):
    for class_name in ("LlamaForCausalLM", "GPT2LMHeadModel"):
        model = tiny_model(class_name)
        name = architectures.linears(model)[-1].name
        module = model.get_submodule(name)
        values = dense_weight(module).mul(8).round().div(8)
        replace(model, name, Rounded(values, bits=3, scales=64))
        assert model.get_submodule(name) is module
        assert torch.equal(dense_weight(module), values)
        assert record.compressed_modules(model) == {
            name: {"format": "rounded", "bits": 3, "scales": 64, "shape": list(values.shape)}
        }


@pytest.mark.parametrize("class_name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_undo_puts_the_model_back(tiny_model, compress_by_hand, tmp_path, class_name):
    model = tiny_model(class_name)
    before = {name: (parameter, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    undo = Undo(model)
    rounded, *others = [linear.name for linear in architectures.linears(model)]
    for name in (rounded, *others):
        undo.note(name)
    values = torch.zeros_like(dense_weight(model.get_submodule(rounded)))
    replace(model, rounded, Rounded(values, bits=3, scales=64))
    compress_by_hand(model, others)
    undo.all()
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is kept and torch.equal(kept, value) for name, (kept, value) in before.items())
    assert record.compressed_modules(model) == {}
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in (tmp_path / "config.json").read_text()


def test_replace_records_each_spec_on_the_model(tiny_model, compress_by_hand):
    model = tiny_model("Qwen3ForCausalLM")
    assert record.compressed_modules(model) == {}
    made = compress_by_hand(model)
    assert record.compressed_modules(model) == {name: made[name].packed.spec() for name in made}


def test_models_of_one_config_object_keep_their_own_records(tiny_model, pack_by_hand, tmp_path):
    first = tiny_model("LlamaForCausalLM")
    second = type(first)(first.config).eval()
    weight = dense_weight(first.get_submodule(Q))
    replace(first, Q, pack_by_hand(weight, "output", 5, 7).packed)
    assert record.compressed_modules(second) == {}
    replace(second, Q, pack_by_hand(weight, "input", 3, 2).packed)
    assert record.compressed_modules(first)[Q]["clusters"] == 5
    first.save_pretrained(tmp_path)
    loaded = type(first).from_pretrained(tmp_path)
    assert record.compressed_modules(loaded) == record.compressed_modules(first)


def test_a_compressed_model_is_free_to_cast(tiny_model, compress_by_hand):
    model = tiny_model("LlamaForCausalLM")
    compress_by_hand(model)
    model.half().float().to(torch.bfloat16)
    labels = [tensor for name, tensor in model.named_buffers() if name.endswith("labels")]
    assert labels
    assert all(tensor.dtype == torch.int16 for tensor in labels)


def _compressed(model, packed):
    replace(model, Q, packed)
    return Q


def _rounded(model, packed):
    replace(model, Q, Rounded(torch.zeros(64, 64), 3, 64))
    return Q


def _tied(model, packed):
    model.model.layers[0].self_attn.k_proj = model.model.layers[0].self_attn.q_proj
    return Q


def _hooked(model, packed):
    model.get_submodule(Q).register_forward_hook(lambda *args: None)
    return Q


def _dispatched(model, packed):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model.get_submodule(Q), hooks.ModelHook())
    return Q


def _other_class(model, packed):
    model.model.layers[0].self_attn.q_proj = type("Linear4bit", (nn.Linear,), {})(64, 64)
    return Q


def _quantized(model, packed):
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    return Q


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_compressed, "is compressed already"),
        (_rounded, "is compressed already"),
        (_tied, r"q_proj\.weight is tied to model\.layers\.0\.self_attn\.k_proj\.weight"),
        (_hooked, "has hooks"),
        (_dispatched, "remove_hook_from_submodules"),
        (_other_class, r"Linear4bit is neither torch\.nn\.Linear nor transformers' Conv1D"),
        (_quantized, r"quantized with bitsandbytes.*del model\.config\.quantization_config"),
        (lambda model, packed: "model.layers.0.self_attn.query", "LlamaForCausalLM has no module"),
        (lambda model, packed: "model.layers.0.mlp.up_proj", r"up_proj is \[96, 64\], its packed weight \[64, 64\]"),
        (lambda model, packed: "model.norm", "LlamaRMSNorm is neither"),
    ],
)
def test_replace_refuses(tiny_model, pack_by_hand, spoil, message):
    model = tiny_model("LlamaForCausalLM")
    packed = pack_by_hand(dense_weight(model.get_submodule(Q)), "output", 5, 7).packed
    name = spoil(model, packed)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        replace(model, name, packed)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in after)


def test_a_tied_head_is_refused(tiny_model, pack_by_hand):
    model = tiny_model("Gemma3ForCausalLM")
    packed = pack_by_hand(dense_weight(model.lm_head), "output", 5, 7).packed
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied to model\.embed_tokens\.weight"):
        replace(model, "lm_head", packed)


@pytest.mark.parametrize("share", ["output", "input"])
def test_a_packed_weight_of_the_dense_shape_is_refused(tiny_model, pack_by_hand, share):
    """Its file would load into the dense model without a word where pycompress is not imported."""
    for class_name, name in [("LlamaForCausalLM", Q), ("GPT2LMHeadModel", "transformer.h.0.attn.c_proj")]:
        model = tiny_model(class_name)
        packed = pack_by_hand(dense_weight(model.get_submodule(name)), share, 40, 24).packed
        with pytest.raises(ValueError, match="take at least the bytes of the dense"):
            replace(model, name, packed)


def test_a_model_of_another_quantizer_is_refused_until_its_record_is_dropped(tiny_model, pack_by_hand):
    from transformers import GPTQConfig
    from transformers.quantizers import HfQuantizer

    class Other(HfQuantizer):
        is_serializable = is_trainable = True

    model = tiny_model("LlamaForCausalLM")
    model.config.quantization_config = GPTQConfig(bits=4)
    model.hf_quantizer = Other(model.config.quantization_config)
    packed = pack_by_hand(dense_weight(model.get_submodule(Q)), "output", 5, 7).packed
    with pytest.raises(ValueError, match=r"quantized with gptq.*hf_quantizer\.remove_quantization_config\(model\)"):
        replace(model, Q, packed)
    model.hf_quantizer.remove_quantization_config(model)
    replace(model, Q, packed)


def test_the_dense_kernel_gives_torchs_logits_and_gradients(tiny_model, architecture, token_ids):
    dense, ours = tiny_model(architecture), tiny_model(architecture)
    linears = sum(type(module) is nn.Linear for module in dense.modules())
    assert use_dense_kernel(ours) == linears
    expected, got = (model(input_ids=token_ids).logits for model in (dense, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for logits in (expected, got):
        logits.square().mean().backward()
    for (name, parameter), (_, other) in zip(dense.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert use_dense_kernel(ours, enabled=False) == linears
    assert torch.equal(ours(input_ids=token_ids).logits, expected)


def test_a_model_on_the_dense_kernel_saves_and_compresses_as_before(tiny_model, token_ids, tmp_path):
    model, dense = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    use_dense_kernel(model)
    model.save_pretrained(tmp_path / "saved")
    again = type(model).from_pretrained(tmp_path / "saved")
    assert not any(isinstance(module, KernelLinear) for module in again.modules())
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), dense.state_dict().values(), strict=True))
    for each in (model, dense):
        pycompress.apply(each, [pycompress.Magnitude(0.8, round_to=8), pycompress.RTN(8)], progress=False)
    expected, got = (each(input_ids=token_ids).logits for each in (dense, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
