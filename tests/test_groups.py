"""groups.py: what it says of an architecture is what the model is and does."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pycompress import groups


def test_every_architecture_has_a_tiny_model(every_architecture):
    assert set(every_architecture) == set(groups.ARCHITECTURES)


def test_linears_are_all_the_matrices_of_the_blocks(tiny_model, architecture):
    model = tiny_model(architecture)
    path = groups.architecture_of(model).blocks
    matrices = {
        name
        for name, module in model.named_modules()
        if name.startswith(path + ".") and isinstance(module, nn.Linear | Conv1D)
    }
    named = [linear.name for linear in groups.linears(model)]
    assert len(named) == len(set(named))
    assert set(named) == matrices


def _record_calls(model, names, token_ids):
    """Names in order of execution, with the input each got."""
    calls = []
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: calls.append((name, args[0], output))
        )
        for name in names
    ]
    with torch.no_grad():
        model(token_ids)
    for handle in handles:
        handle.remove()
    return calls


def test_linears_come_in_order_of_execution(tiny_model, architecture, token_ids):
    model = tiny_model(architecture)
    named = [linear.name for linear in groups.linears(model)]
    assert [name for name, _, _ in _record_calls(model, named, token_ids)] == named


def test_linears_of_a_stage_read_one_input_and_others_do_not(tiny_model, architecture, token_ids):
    model = tiny_model(architecture)
    description = groups.architecture_of(model)
    names = [linear.name for linear in groups.linears(model)]
    inputs = {name: x for name, x, _ in _record_calls(model, names, token_ids)}
    of_role = {role: inputs[f"{description.blocks}.0.{description.paths[role]}"] for role in description.roles}
    for stage in description.stages:
        for role, x in of_role.items():
            same = x.shape == of_role[stage.roles[0]].shape and torch.equal(x, of_role[stage.roles[0]])
            assert same == (role in stage.roles), (stage.roles, role)


def test_norms_stand_where_the_stages_say(tiny_model, architecture, token_ids):
    model = tiny_model(architecture)
    description = groups.architecture_of(model)
    block = f"{description.blocks}.0."
    norms = [block + norm for stage in description.stages for norm in (stage.norm_before, stage.norm_after) if norm]
    linears = [block + path for path in description.paths.values()]
    calls = {name: (x, y) for name, x, y in _record_calls(model, norms + linears, token_ids)}
    for stage in description.stages:
        x, y = calls[block + description.paths[stage.roles[-1]]]
        if stage.norm_before:
            assert torch.equal(calls[block + stage.norm_before][1], x)
        if stage.norm_after:
            assert torch.equal(calls[block + stage.norm_after][0], y)


def test_named_parts_exist(tiny_model, architecture):
    model = tiny_model(architecture)
    description = groups.architecture_of(model)
    assert model.get_submodule(description.embedding) is model.get_input_embeddings()
    assert model.get_submodule(description.head) is model.get_output_embeddings()
    model.get_submodule(description.final_norm)
    for part in (description.position_embedding, *description.embedding_projections):
        assert part is None or isinstance(model.get_submodule(part), nn.Linear | nn.Embedding)
    for norm in description.head_norms:
        groups.blocks(model)[0].get_submodule(norm)
    fields = (description.heads, description.kv_heads, description.intermediate)
    flags = (description.parallel_residual, description.norms_first)
    assert all(hasattr(model.config, field) for field in (*fields, *flags) if field)


def test_norm_kind_tells_what_a_zero_weight_does(tiny_model, architecture):
    model = tiny_model(architecture)
    description = groups.architecture_of(model)
    norm = model.get_submodule(description.final_norm)
    for parameter in norm.parameters():
        nn.init.zeros_(parameter)
    assert isinstance(norm, nn.LayerNorm) == (description.norm_kind == "layer")
    assert norm(torch.randn(3, 64)).any() == (description.norm_kind == "rms_plus_one")


def test_coupled_sizes_agree(tiny_model, architecture):
    model = tiny_model(architecture)
    description = groups.architecture_of(model)
    heads = getattr(model.config, description.heads)
    kv_heads = getattr(model.config, description.kv_heads) if description.kv_heads else heads
    parts = {f.role: len(f.parts) for f in description.fused}
    columns = {unit.unit: _width(model, description, unit.readers[0], 1) for unit in description.coupled}
    for writer in description.coupled[1].writers:
        assert _width(model, description, writer, 0) == parts.get(writer, 1) * columns["mlp channel"]
    head_size = columns["attention head"] // heads
    if "qkv" in parts:
        assert _width(model, description, "qkv", 0) == (heads + 2 * kv_heads) * head_size
    else:
        assert [_width(model, description, role, 0) for role in "qkv"] == [
            heads * head_size,
            kv_heads * head_size,
            kv_heads * head_size,
        ]


def _width(model, description, role, dim):
    module = model.get_submodule(f"{description.blocks}.0.{description.paths[role]}")
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    return weight.shape[dim]


@pytest.mark.parametrize(("class_name", "per_head"), [("GPTNeoXForCausalLM", True), ("GPT2LMHeadModel", False)])
def test_layout_of_fused_qkv_tells_the_rows_that_values_come_from(tiny_model, token_ids, class_name, per_head):
    model = tiny_model(class_name)
    description = groups.architecture_of(model)
    qkv = model.get_submodule(f"{description.blocks}.0.{description.paths['qkv']}")
    o = f"{description.blocks}.0.{description.paths['o']}"
    heads = getattr(model.config, description.heads)
    rows = torch.arange(192).view(heads, 3, -1)[:, 2] if per_head else torch.arange(192).view(3, heads, -1)[2]
    with torch.no_grad():
        (qkv.weight.T if isinstance(qkv, Conv1D) else qkv.weight)[rows.flatten()] = 0
        qkv.bias[rows.flatten()] = 0
    assert description.fused[0].layout == ("per_head" if per_head else "concatenated")
    assert not _record_calls(model, [o], token_ids)[0][1].any()


def test_a_subclass_has_the_architecture_of_its_parent(tiny_model):
    model = tiny_model("LlamaForCausalLM")
    model.__class__ = type("MyLlama", (type(model),), {})
    assert groups.architecture_of(model).class_name == "LlamaForCausalLM"


def test_an_unknown_architecture_is_named_with_what_to_do():
    class FooForCausalLM(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"no architecture 'FooForCausalLM'; supported: LlamaForCausalLM.*groups\.py"):
        groups.architecture_of(FooForCausalLM())


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (("q",), ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        ("down", ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]),
        (("k", "*.1.*.k_proj", "q"), [f"model.layers.{i}.self_attn.{r}_proj" for i in (0, 1) for r in "qk"]),
        (["model.layers.1.mlp.*"], [f"model.layers.1.mlp.{r}_proj" for r in ("gate", "up", "down")]),
    ],
)
def test_select_takes_roles_and_patterns_in_order_of_execution(tiny_model, targets, expected):
    assert [linear.name for linear in groups.select(tiny_model("LlamaForCausalLM"), targets)] == expected


def test_select_without_targets_takes_every_linear_of_the_blocks(tiny_model, architecture):
    model = tiny_model(architecture)
    assert groups.select(model, None) == groups.linears(model)


@pytest.mark.parametrize(
    ("class_name", "targets", "message"),
    [
        ("LlamaForCausalLM", ("q", "query"), r"'query' names no linear of Llama.*roles: q, k, v, o, gate, up, down"),
        ("GPT2LMHeadModel", ("q",), r"roles: qkv, o, up, down; qkv holds q, k, v in one matrix"),
        ("LlamaForCausalLM", ("lm_head",), "'lm_head' names no linear"),
        ("LlamaForCausalLM", (), "targets is empty"),
    ],
)
def test_select_refuses_a_target_that_names_nothing(tiny_model, class_name, targets, message):
    with pytest.raises(ValueError, match=message):
        groups.select(tiny_model(class_name), targets)
