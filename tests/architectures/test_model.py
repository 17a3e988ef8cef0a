"""groups.py: what it says of an architecture is what the model is and does."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from pycompress.architectures import geometry, supported
from pycompress.architectures import model as architectures
from pycompress.architectures.subnet import Kept


def test_every_architecture_has_a_tiny_model(every_architecture):
    assert set(every_architecture) == set(supported.ARCHITECTURES)


def test_linears_are_all_the_matrices_of_the_blocks(tiny_model, architecture):
    model = tiny_model(architecture)
    path = architectures.architecture_of(model).blocks
    matrices = {
        name
        for name, module in model.named_modules()
        if name.startswith(path + ".") and isinstance(module, nn.Linear | Conv1D)
    }
    named = [linear.name for linear in architectures.linears(model)]
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
    named = [linear.name for linear in architectures.linears(model)]
    assert [name for name, _, _ in _record_calls(model, named, token_ids)] == named


def test_linears_of_a_stage_read_one_input_and_others_do_not(tiny_model, architecture, token_ids):
    model = tiny_model(architecture)
    description = architectures.architecture_of(model)
    names = [linear.name for linear in architectures.linears(model)]
    inputs = {name: x for name, x, _ in _record_calls(model, names, token_ids)}
    of_role = {role: inputs[f"{description.blocks}.0.{description.paths[role]}"] for role in description.roles}
    for stage in description.stages:
        for role, x in of_role.items():
            same = x.shape == of_role[stage.roles[0]].shape and torch.equal(x, of_role[stage.roles[0]])
            assert same == (role in stage.roles), (stage.roles, role)


def test_norms_stand_where_the_stages_say(tiny_model, architecture, token_ids):
    model = tiny_model(architecture)
    description = architectures.architecture_of(model)
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
    description = architectures.architecture_of(model)
    assert model.get_submodule(description.embedding) is model.get_input_embeddings()
    assert model.get_submodule(description.head) is model.get_output_embeddings()
    model.get_submodule(description.final_norm)
    projection = description.output_projection
    assert projection is None or isinstance(model.get_submodule(projection), nn.Linear)
    for norm in description.head_norms:
        architectures.blocks(model)[0].get_submodule(norm)
    fields = (description.heads, description.kv_heads, description.intermediate)
    flags = (description.parallel_residual, description.norms_first)
    assert all(hasattr(model.config, field) for field in (*fields, *flags) if field)


def test_norm_kind_tells_what_a_zero_weight_does(tiny_model, architecture):
    model = tiny_model(architecture)
    description = architectures.architecture_of(model)
    norm = model.get_submodule(description.final_norm)
    for parameter in norm.parameters():
        nn.init.zeros_(parameter)
    assert isinstance(norm, nn.LayerNorm) == (description.norm_kind == "layer")
    assert norm(torch.randn(3, 64)).any() == (description.norm_kind == "rms_plus_one")


def test_coupled_sizes_agree(tiny_model, architecture):
    model = tiny_model(architecture)
    description = architectures.architecture_of(model)
    heads = getattr(model.config, description.heads)
    kv_heads = getattr(model.config, description.kv_heads) if description.kv_heads else heads
    parts = {f.role: len(f.parts) for f in description.fused}
    for writer in {"gate", "up", "gate_up"} & set(description.roles):
        assert _width(model, description, writer, 0) == parts.get(writer, 1) * _width(model, description, "down", 1)
    head_size = _width(model, description, "o", 1) // heads
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
    description = architectures.architecture_of(model)
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
    assert architectures.architecture_of(model).class_name == "LlamaForCausalLM"


def test_an_unknown_architecture_is_named_with_what_to_do():
    class FooForCausalLM(nn.Module):
        pass

    with pytest.raises(
        ValueError, match=r"no architecture 'FooForCausalLM'; supported: LlamaForCausalLM.*supported\.py"
    ):
        architectures.architecture_of(FooForCausalLM())


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
    assert [linear.name for linear in architectures.select(tiny_model("LlamaForCausalLM"), targets)] == expected


def test_select_without_targets_takes_every_linear_of_the_blocks(tiny_model, architecture):
    model = tiny_model(architecture)
    assert architectures.select(model, None) == architectures.linears(model)


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
        architectures.select(tiny_model(class_name), targets)


# heads, kv_heads, width, rotary: by each class's own config.
SIZES = {
    "LlamaForCausalLM": (4, 2, 16, 16),
    "MistralForCausalLM": (4, 2, 24, 24),
    "Qwen2ForCausalLM": (4, 2, 16, 16),
    "Qwen3ForCausalLM": (4, 2, 32, 32),
    "Gemma3ForCausalLM": (4, 2, 32, 32),
    "OPTForCausalLM": (4, 4, 16, 0),
    "GPTNeoXForCausalLM": (4, 4, 16, 4),
    "GPT2LMHeadModel": (4, 4, 16, 0),
    "Phi3ForCausalLM": (4, 2, 16, 16),
}


def test_geometry_tells_the_sizes_of_a_block(tiny_model, architecture):
    block = architectures.geometry(tiny_model(architecture), 1)
    assert (block.heads, block.kv_heads, block.width, block.rotary) == SIZES[architecture]
    assert (block.mlp, block.hidden) == (96, 64)


def test_shapes_and_parameters_of_all_that_is_kept_are_those_of_the_linears(tiny_model, architecture):
    model = tiny_model(architecture)
    description = architectures.architecture_of(model)
    block = architectures.geometry(model, 0)
    shapes = {role: (_width(model, description, role, 0), _width(model, description, role, 1)) for role in block.roles}
    assert block.shapes(Kept()) == shapes
    assert block.parameters(Kept()) == sum(rows * columns for rows, columns in shapes.values())


KEPT = Kept(mlp=[1, 4], qk=[[0, 1, 8, 9]], vo=[[2, 3, 4, 15]], kv_heads=[1])


@pytest.mark.parametrize(
    ("class_name", "role", "rows"),
    [
        ("LlamaForCausalLM", "q", [*(32, 33, 40, 41), *(48, 49, 56, 57)]),
        ("LlamaForCausalLM", "k", [16, 17, 24, 25]),
        ("LlamaForCausalLM", "v", [18, 19, 20, 31]),
        ("LlamaForCausalLM", "gate", [1, 4]),
        ("OPTForCausalLM", "q", [16, 17, 24, 25]),
        ("GPT2LMHeadModel", "k", [64 + 16, 64 + 17, 64 + 24, 64 + 25]),
        ("GPT2LMHeadModel", "qkv", [*(16, 17, 24, 25), *(80, 81, 88, 89), *(146, 147, 148, 159)]),
        ("Phi3ForCausalLM", "v", [96 + 18, 96 + 19, 96 + 20, 96 + 31]),
        ("Phi3ForCausalLM", "up", [97, 100]),
        ("Phi3ForCausalLM", "gate_up", [1, 4, 97, 100]),
    ],
)
def test_rows_of_what_is_kept(tiny_model, class_name, role, rows):
    assert architectures.geometry(tiny_model(class_name), 0).rows(role, KEPT).tolist() == rows


def test_rows_of_heads_that_lie_side_by_side(tiny_model):
    block = architectures.geometry(tiny_model("GPTNeoXForCausalLM"), 0)
    kept = Kept(qk=[[1, 3]], vo=[[0, 5]] * 2, kv_heads=[0, 2])
    assert block.rows("qkv", kept).tolist() == [1, 3, 17, 19, 32, 37, 97, 99, 113, 115, 128, 133]
    assert block.rows("v", kept).tolist() == [32, 37, 128, 133]
    assert block.columns("o", kept).tolist() == [0, 5, 32, 37]
    assert block.holder("v") == "qkv"


def test_columns_of_what_is_kept(tiny_model):
    block = architectures.geometry(tiny_model("LlamaForCausalLM"), 0)
    assert block.columns("o", KEPT).tolist() == [34, 35, 36, 47, 50, 51, 52, 63]
    assert block.columns("down", KEPT).tolist() == [1, 4]


def test_units_of_a_partly_rotated_head(tiny_model):
    block = architectures.geometry(tiny_model("GPTNeoXForCausalLM"), 0)
    assert block.qk_units.tolist() == [[0, 2], [1, 3]]
    assert block.passed.tolist() == list(range(4, 16))
    assert [block.rotated(width) for width in (16, 14, 8, 4, 2)] == [4, 4, 2, 2, 2]
    plain = architectures.geometry(tiny_model("GPT2LMHeadModel"), 0)
    assert plain.qk_units.flatten().tolist() == list(range(16))
    assert len(plain.passed) == 0


@pytest.mark.parametrize(
    ("mlp", "fraction", "width"),
    [
        (11008, 0.5, 5504),
        (11008, 0.333, 3648),
        (11008, 1e-6, 64),
        (11008, 1.0, 11008),
        (256, 0.6, 128),
        (255, 0.5, 128),
        (255, 0.99, 255),
        (100, 0.99, 96),
        (30, 0.5, 15),
    ],
)
def test_mlp_widths_are_multiples_that_kernels_like(mlp, fraction, width):
    block = geometry.Geometry(4, 4, 64, 64, mlp, 64, ("q", "k", "v", "o", "up", "down"))
    assert block.mlp_width(fraction) == width


@pytest.mark.parametrize(("width", "fraction", "kept"), [(128, 0.7, 88), (128, 0.01, 8), (24, 0.5, 12), (16, 0.99, 16)])
def test_head_widths_are_even(width, fraction, kept):
    block = geometry.Geometry(4, 4, width, width, 256, 64, ("q", "k", "v", "o", "up", "down"))
    assert block.head_width(fraction) == kept
    assert block.rotated(kept) == kept


def test_rounding_refuses_what_it_cannot_do():
    block = geometry.Geometry(4, 4, 64, 64, 256, 64, ("q", "k", "v", "o", "up", "down"))
    assert block.mlp_width(0.5, round_to=100) == 100
    for fraction in (0, 1.1, -1):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            block.mlp_width(fraction)
    with pytest.raises(ValueError, match="even number, got round_to=3"):
        block.head_width(0.5, round_to=3)


@pytest.mark.parametrize(
    ("class_name", "fields", "message"),
    [
        ("LlamaForCausalLM", {"mlp": [96]}, "mlp keeps index 96, the block has 96"),
        ("LlamaForCausalLM", {"kv_heads": [0, 2]}, "kv_heads keeps index 2, the block has 2"),
        ("LlamaForCausalLM", {"qk": [[0, 1]], "vo": [[0, 1]] * 2}, r"rotary pair \(j, j \+ 8\) without the other"),
        ("LlamaForCausalLM", {"qk": [[0, 8]] * 2, "vo": [[0, 1]] * 2}, "qk has 2 rows; give 1, since the rotary"),
        ("LlamaForCausalLM", {"qk": [[0, 8]], "vo": [[0, 1]]}, "vo has 1 rows; give one a kept key-value head, 2"),
        ("GPTNeoXForCausalLM", {"qk": [[4, 8]], "vo": [[0, 1]] * 4}, "qk keeps no channel that rotates"),
        ("GPT2LMHeadModel", {"qk": [[0, 8]] * 3, "vo": [[0, 1]] * 4}, "qk has 3 rows; give 1 or 4"),
        ("LlamaForCausalLM", {"qk": [[0, 8]]}, "qk keeps 2 of 16 channels and vo all of them"),
        ("LlamaForCausalLM", {"vo": [[0, 1]] * 2}, "vo keeps 2 of 16 channels and qk all of them"),
    ],
)
def test_geometry_refuses_what_a_block_cannot_keep(tiny_model, class_name, fields, message):
    with pytest.raises(ValueError, match=message):
        architectures.geometry(tiny_model(class_name), 0).check(Kept(**fields))


def test_a_role_that_a_block_has_not_is_refused(tiny_model):
    with pytest.raises(ValueError, match="the block has no 'gate'; it has q, k, v, o, up, down"):
        architectures.geometry(tiny_model("GPT2LMHeadModel"), 0).rows("gate", Kept())
