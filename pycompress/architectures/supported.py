"""What pycompress knows of each model class: tables only.

Paths of parts are relative to the model, paths of linears and norms to their block.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from pycompress.architectures.description import Architecture, Fused, Stage

GATED_PATHS = MappingProxyType(
    {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
)
GATED_STAGES = (
    Stage(("q", "k", "v"), norm_before="input_layernorm"),
    Stage(("o",)),
    Stage(("gate", "up"), norm_before="post_attention_layernorm"),
    Stage(("down",)),
)


def _gated(
    class_name: str,
    norm_kind: str = "rms",
    stages: tuple[Stage, ...] = GATED_STAGES,
    head_norms: tuple[str, ...] = (),
    fixed_scale: bool = False,
) -> Architecture:
    """Llama's layout, which most families keep."""
    return Architecture(
        class_name=class_name,
        blocks="model.layers",
        embedding="model.embed_tokens",
        final_norm="model.norm",
        head="lm_head",
        paths=GATED_PATHS,
        stages=stages,
        norm_kind=norm_kind,
        intermediate="intermediate_size",
        sizes=MappingProxyType({"self_attn.head_dim": "width", "mlp.intermediate_size": "mlp"}),
        head_norms=head_norms,
        fixed_scale=fixed_scale,
        rotary="model.rotary_emb",
    )


HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")

GEMMA3 = _gated(
    "Gemma3ForCausalLM",
    norm_kind="rms_plus_one",
    stages=(
        Stage(("q", "k", "v"), norm_before="input_layernorm"),
        Stage(("o",), norm_after="post_attention_layernorm"),
        Stage(("gate", "up"), norm_before="pre_feedforward_layernorm"),
        Stage(("down",), norm_after="post_feedforward_layernorm"),
    ),
    head_norms=HEAD_NORMS,
    fixed_scale=True,
)

OPT = Architecture(
    class_name="OPTForCausalLM",
    blocks="model.decoder.layers",
    embedding="model.decoder.embed_tokens",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    paths=MappingProxyType(
        {
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "o": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        }
    ),
    stages=(
        Stage(("q", "k", "v"), norm_before="self_attn_layer_norm"),
        Stage(("o",)),
        Stage(("up",), norm_before="final_layer_norm"),
        Stage(("down",)),
    ),
    norm_kind="layer",
    intermediate="ffn_dim",
    sizes=MappingProxyType(
        {"self_attn.head_dim": "width", "self_attn.num_heads": "heads", "self_attn.embed_dim": "inner"}
    ),
    kv_heads=None,
    output_projection="model.decoder.project_out",
    norms_first="do_layer_norm_before",
    mlp=("fc1", "activation_fn", "fc2"),
    dropouts=("dropout", "dropout"),
)

GPT_NEOX = Architecture(
    class_name="GPTNeoXForCausalLM",
    blocks="gpt_neox.layers",
    embedding="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    paths=MappingProxyType(
        {
            "qkv": "attention.query_key_value",
            "o": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        }
    ),
    stages=(
        Stage(("qkv",), norm_before="input_layernorm"),
        Stage(("o",)),
        Stage(("up",), norm_before="post_attention_layernorm"),
        Stage(("down",)),
    ),
    norm_kind="layer",
    intermediate="intermediate_size",
    kv_heads=None,
    sizes=MappingProxyType({"attention.head_size": "width", "attention.rotary_ndims": "rotary"}),
    rotary="gpt_neox.rotary_emb",
    fused=(Fused("qkv", ("q", "k", "v"), "per_head"),),
    parallel_residual="use_parallel_residual",
    dropouts=("post_attention_dropout", "post_mlp_dropout"),
)

GPT2 = Architecture(
    class_name="GPT2LMHeadModel",
    blocks="transformer.h",
    embedding="transformer.wte",
    final_norm="transformer.ln_f",
    head="lm_head",
    paths=MappingProxyType({"qkv": "attn.c_attn", "o": "attn.c_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}),
    stages=(
        Stage(("qkv",), norm_before="ln_1"),
        Stage(("o",)),
        Stage(("up",), norm_before="ln_2"),
        Stage(("down",)),
    ),
    norm_kind="layer",
    intermediate="n_inner",
    heads="n_head",
    kv_heads=None,
    sizes=MappingProxyType(
        {"attn.head_dim": "width", "attn.num_heads": "heads", "attn.embed_dim": "inner", "attn.split_size": "inner"}
    ),
    scale_by_width="scale_attn_weights",
    scale_by_index="scale_attn_by_inverse_layer_idx",
    fused=(Fused("qkv", ("q", "k", "v"), "concatenated"),),
)

PHI3 = Architecture(
    class_name="Phi3ForCausalLM",
    blocks="model.layers",
    embedding="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    paths=MappingProxyType(
        {
            "qkv": "self_attn.qkv_proj",
            "o": "self_attn.o_proj",
            "gate_up": "mlp.gate_up_proj",
            "down": "mlp.down_proj",
        }
    ),
    stages=(
        Stage(("qkv",), norm_before="input_layernorm"),
        Stage(("o",)),
        Stage(("gate_up",), norm_before="post_attention_layernorm"),
        Stage(("down",)),
    ),
    norm_kind="rms",
    intermediate="intermediate_size",
    sizes=MappingProxyType({"self_attn.head_dim": "width", "self_attn.num_key_value_heads": "kv_heads"}),
    heads_from_config=True,
    rotary="model.rotary_emb",
    fused=(Fused("qkv", ("q", "k", "v"), "concatenated"), Fused("gate_up", ("gate", "up"), "concatenated")),
    dropouts=("resid_attn_dropout", "resid_mlp_dropout"),
)

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        architecture.class_name: architecture
        for architecture in (
            _gated("LlamaForCausalLM"),
            _gated("MistralForCausalLM"),
            _gated("Qwen2ForCausalLM"),
            _gated("Qwen3ForCausalLM", head_norms=HEAD_NORMS),
            GEMMA3,
            OPT,
            GPT_NEOX,
            GPT2,
            PHI3,
        )
    }
)


# Classes with a language model of any known architecture beside a vision tower, and where it is.
VISION_LANGUAGE: Mapping[str, str] = MappingProxyType(
    {
        "Gemma3ForConditionalGeneration": "model.language_model",
        "LlavaForConditionalGeneration": "model.language_model",
    }
)
