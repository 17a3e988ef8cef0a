"""What pycompress knows of each architecture: where its parts are, which linears share an input, what is coupled.

Data and lookups only. Paths of parts are relative to the model, paths of linears and norms to their block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import NamedTuple

from torch import nn


@dataclass(frozen=True)
class Stage:
    """Linears that read one input, by role. `norm_before` gives that input, `norm_after` follows their output."""

    roles: tuple[str, ...]
    norm_before: str | None = None
    norm_after: str | None = None


@dataclass(frozen=True)
class Fused:
    """A linear whose output rows hold several projections.

    `layout="concatenated"`: all rows of the first part, then of the next. `layout="per_head"`: the parts of the first
    head, then those of the next.
    """

    role: str
    parts: tuple[str, ...]
    layout: str


@dataclass(frozen=True)
class Coupled:
    """Units that are removed together: from the rows of `writers` (norms on them too) and the columns of `readers`."""

    unit: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Architecture:
    """One causal LM class.

    `stages` lists the linears of a block in order of execution. `norm_kind` is `layer` (LayerNorm), `rms` (RMSNorm) or
    `rms_plus_one` (RMSNorm scaled by 1 + weight). `heads`, `kv_heads` and `intermediate` are names of config fields
    (`kv_heads=None`: one key-value head a head). `parallel_residual` and `norms_first` name config flags: when the
    first is true, attention and MLP both read the block's input; when the second is false, each norm follows the
    residual sum and there is no final norm.
    """

    class_name: str
    blocks: str
    embedding: str
    final_norm: str
    head: str
    paths: Mapping[str, str]
    stages: tuple[Stage, ...]
    coupled: tuple[Coupled, ...]
    norm_kind: str
    intermediate: str
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_norms: tuple[str, ...] = ()
    fused: tuple[Fused, ...] = ()
    position_embedding: str | None = None
    embedding_projections: tuple[str, ...] = ()
    parallel_residual: str | None = None
    norms_first: str | None = None

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for stage in self.stages for role in stage.roles)


class BlockLinear(NamedTuple):
    """A linear of a decoder block: its full module name, the block's index, its role."""

    name: str
    block: int
    role: str


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
HEADS = Coupled("attention head", writers=("q", "k", "v"), readers=("o",))
FUSED_HEADS = Coupled("attention head", writers=("qkv",), readers=("o",))
GATED_CHANNELS = Coupled("mlp channel", writers=("gate", "up"), readers=("down",))
FUSED_GATED_CHANNELS = Coupled("mlp channel", writers=("gate_up",), readers=("down",))
PLAIN_CHANNELS = Coupled("mlp channel", writers=("up",), readers=("down",))


def _gated(
    class_name: str,
    norm_kind: str = "rms",
    stages: tuple[Stage, ...] = GATED_STAGES,
    head_norms: tuple[str, ...] = (),
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
        coupled=(HEADS, GATED_CHANNELS),
        norm_kind=norm_kind,
        intermediate="intermediate_size",
        head_norms=head_norms,
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
    coupled=(HEADS, PLAIN_CHANNELS),
    norm_kind="layer",
    intermediate="ffn_dim",
    kv_heads=None,
    position_embedding="model.decoder.embed_positions",
    embedding_projections=("model.decoder.project_in", "model.decoder.project_out"),
    norms_first="do_layer_norm_before",
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
    coupled=(FUSED_HEADS, PLAIN_CHANNELS),
    norm_kind="layer",
    intermediate="intermediate_size",
    kv_heads=None,
    fused=(Fused("qkv", ("q", "k", "v"), "per_head"),),
    parallel_residual="use_parallel_residual",
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
    coupled=(FUSED_HEADS, PLAIN_CHANNELS),
    norm_kind="layer",
    intermediate="n_inner",
    heads="n_head",
    kv_heads=None,
    fused=(Fused("qkv", ("q", "k", "v"), "concatenated"),),
    position_embedding="transformer.wpe",
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
    coupled=(FUSED_HEADS, FUSED_GATED_CHANNELS),
    norm_kind="rms",
    intermediate="intermediate_size",
    fused=(Fused("qkv", ("q", "k", "v"), "concatenated"), Fused("gate_up", ("gate", "up"), "concatenated")),
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


def architecture_of(model: nn.Module) -> Architecture:
    """The description of `model`'s class, or of the first known class it derives from.

    Raises `ValueError` for any other class, naming the supported ones.
    """
    for ancestor in type(model).__mro__:
        if ancestor.__name__ in ARCHITECTURES:
            return ARCHITECTURES[ancestor.__name__]
    raise ValueError(
        f"pycompress knows no architecture {type(model).__name__!r}; supported: {', '.join(ARCHITECTURES)}; "
        f"unwrap the model if it is a compiled or wrapped one of these, or describe its class in pycompress/groups.py "
        f"(see CONTRIBUTING.md)"
    )


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, first to last. Block `i` is called `f"{architecture_of(model).blocks}.{i}"`."""
    return list(model.get_submodule(architecture_of(model).blocks).children())


def linears(model: nn.Module) -> list[BlockLinear]:
    """Every linear of the decoder blocks, in order of execution."""
    architecture = architecture_of(model)
    return [
        BlockLinear(f"{architecture.blocks}.{block}.{architecture.paths[role]}", block, role)
        for block in range(len(blocks(model)))
        for role in architecture.roles
    ]


def select(model: nn.Module, targets: Sequence[str] | None) -> list[BlockLinear]:
    """The block linears that `targets` name, in order of execution.

    A target is a role (`"q"`) or a shell pattern over full module names (`"model.layers.0.*"`); `None` takes all.
    Raises `ValueError` for a target that names nothing.
    """
    candidates = linears(model)
    if targets is None:
        return candidates
    targets = (targets,) if isinstance(targets, str) else targets
    chosen: set[str] = set()
    for target in targets:
        matched = {linear.name for linear in candidates if target == linear.role or fnmatchcase(linear.name, target)}
        if not matched:
            raise ValueError(_names_nothing(model, target, candidates))
        chosen |= matched
    if not chosen:
        raise ValueError("targets is empty; leave it None to take every linear of the decoder blocks")
    return [linear for linear in candidates if linear.name in chosen]


def _names_nothing(model: nn.Module, target: str, candidates: list[BlockLinear]) -> str:
    architecture = architecture_of(model)
    fused = "".join(f"; {f.role} holds {', '.join(f.parts)} in one matrix" for f in architecture.fused)
    return (
        f"target {target!r} names no linear of {architecture.class_name}; roles: {', '.join(architecture.roles)}"
        f"{fused}; or give a pattern over module names, such as {candidates[0].name!r}"
    )
