"""What pycompress knows of each architecture: where its parts are, which linears share an input, what is coupled.

Data and lookups only. Paths of parts are relative to the model, paths of linears and norms to their block.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pycompress.subnet import Kept


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


class Branch(NamedTuple):
    """One of the two branches a block adds to its residual stream: a norm, modules that run one after the other, where
    there is one a norm after them, and dropout. `readers`: roles of the linears that read the norm; `writer`: the last.
    """

    norm: str
    readers: tuple[str, ...]
    modules: tuple[str, ...]
    writer: str
    norm_after: str | None
    dropout: str | None


@dataclass(frozen=True)
class Architecture:
    """One causal LM class.

    `stages` lists the linears of a block in order of execution. `norm_kind` is `layer` (LayerNorm), `rms` (RMSNorm) or
    `rms_plus_one` (RMSNorm scaled by 1 + weight). `heads`, `kv_heads` and `intermediate` are names of config fields
    (`kv_heads=None`: one key-value head a head). `sizes` maps attributes of a block's modules to the field of
    `Geometry` that they hold; `heads_from_config`: the attention reads how many heads it has from the config.
    `head_norms` are those of queries and keys, over a head's channels; `rotary` is the path of the rotary embedding.
    `mlp` lists the modules that make up a block's MLP, in order; `dropouts` are a block's two modules, or its
    probability, of dropout after attention and MLP, where these have none of their own.

    The softmax scale is the head width to the power -1/2 unless `fixed_scale`; `scale_by_width` names a config flag
    that must be true for that, `scale_by_index` one that divides by the block's number too. `beside`: the language
    model is a part of this class, beside others such as a vision tower. `parallel_residual` and
    `norms_first` name config flags: when the first is true, attention and MLP both read the block's input; when the
    second is false, each norm follows the residual sum and there is no final norm.
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
    sizes: Mapping[str, str]
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    heads_from_config: bool = False
    head_norms: tuple[str, ...] = ()
    fixed_scale: bool = False
    scale_by_width: str | None = None
    scale_by_index: str | None = None
    rotary: str | None = None
    fused: tuple[Fused, ...] = ()
    position_embedding: str | None = None
    embedding_projections: tuple[str, ...] = ()
    parallel_residual: str | None = None
    norms_first: str | None = None
    mlp: tuple[str, ...] = ("mlp",)
    dropouts: tuple[str | None, str | None] = (None, None)
    beside: bool = False

    def parallel(self, config: Any) -> bool:
        """Whether attention and MLP of a model with this config read the same residual stream."""
        return self.parallel_residual is not None and bool(getattr(config, self.parallel_residual))

    @property
    def branches(self) -> tuple[Branch, Branch]:
        """Attention and MLP, which write to the residual stream."""
        reads, writes = self.stages[::2], self.stages[1::2]
        modules = ((self.attention,), self.mlp)
        found = [
            Branch(str(read.norm_before), read.roles, run, write.roles[0], write.norm_after, dropout)
            for read, write, run, dropout in zip(reads, writes, modules, self.dropouts, strict=True)
        ]
        return found[0], found[1]

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(role for stage in self.stages for role in stage.roles)

    @property
    def attention(self) -> str:
        """Path of a block's attention."""
        return self.paths["o"].rpartition(".")[0]


@dataclass(frozen=True)
class Geometry:
    """The channels of one block, and which rows and columns of its linears they are.

    `heads` query heads read `kv_heads` key-value heads, each `width` channels wide; the first `rotary` channels of a
    head rotate in pairs `(j, j + rotary / 2)`. `mlp` channels, `hidden` inputs. Roles are q, k, v, o, gate, up, down in
    every architecture: where one linear holds several (`holder`), rows are rows of that linear.
    """

    heads: int
    kv_heads: int
    width: int
    rotary: int
    mlp: int
    hidden: int
    roles: tuple[str, ...]
    fused: tuple[Fused, ...] = ()

    def holder(self, role: str) -> str:
        """The linear of the architecture that holds `role`: "qkv" for "q" where the three are fused."""
        holders = [fused.role for fused in self.fused if role in fused.parts]
        if not holders and role not in self.roles:
            raise ValueError(f"the block has no {role!r}; it has {', '.join(self.part_roles)}")
        return holders[0] if holders else role

    def channel_rows(self, role: str) -> Tensor:
        """The row of each channel in the linear that holds `role`.

        `[heads, width]` for q, `[kv_heads, width]` for k and v, `[mlp]` for gate and up.
        """
        fused = next((fused for fused in self.fused if role in fused.parts), None)
        shape = self._channels(role)
        if fused is None:
            self.holder(role)
            return torch.arange(math.prod(shape)).view(shape)
        before = fused.parts[: fused.parts.index(role)]
        if fused.layout == "per_head":
            head = torch.arange(self.heads * len(fused.parts) * self.width).view(self.heads, -1, self.width)
            return head[:, len(before)]
        start = sum(math.prod(self._channels(part)) for part in before)
        return torch.arange(start, start + math.prod(shape)).view(shape)

    def channel_columns(self, role: str) -> Tensor:
        """The column of each channel: `[heads, width]` for o, `[mlp]` for down."""
        shape = self._channels(role)
        return torch.arange(math.prod(shape)).view(shape)

    @property
    def inner(self) -> int:
        """Channels that o reads: of all heads together."""
        return self.heads * self.width

    @property
    def qk_units(self) -> Tensor:
        """Channels of a query or key head that are kept or removed together.

        Pairs `[rotary / 2, 2]`, or single channels `[width, 1]` without rotary embeddings. Channels from `rotary` on
        do not rotate and are single ones too (`passed`).
        """
        if not self.rotary:
            return torch.arange(self.width)[:, None]
        half = self.rotary // 2
        return torch.stack([torch.arange(half), torch.arange(half, self.rotary)], 1)

    @property
    def passed(self) -> Tensor:
        """Channels of a query or key head that a rotary embedding passes through unrotated, `[width - rotary]`."""
        return torch.arange(self.rotary or self.width, self.width)

    def rows(self, role: str, kept: Kept) -> Tensor:
        """Rows of the linear `role` that stay, in their new order; of a fused linear's part, or of all of it."""
        fused = next((fused for fused in self.fused if role == fused.role), None)
        if fused is None:
            return self._select(role, self.channel_rows(role), kept).flatten()
        parts = [self._select(part, self.channel_rows(part), kept) for part in fused.parts]
        if fused.layout == "per_head":
            return torch.cat(parts, dim=-1).flatten()
        return torch.cat([part.flatten() for part in parts])

    def columns(self, role: str, kept: Kept) -> Tensor:
        """Columns of o or down that stay, in their new order."""
        return self._select(role, self.channel_columns(role), kept).flatten()

    def shapes(self, kept: Kept) -> dict[str, tuple[int, int]]:
        """`(N, K)` of each linear of the block once it is shrunk, by the architecture's own roles."""
        found = {}
        for role in self.roles:
            reads = role in ("o", "down")
            size = len(self.columns(role, kept) if reads else self.rows(role, kept))
            found[role] = (self.hidden, size) if reads else (size, self.hidden)
        return found

    def parameters(self, kept: Kept) -> int:
        """Weights of the block's linears that stay, biases apart."""
        return sum(rows * columns for rows, columns in self.shapes(kept).values())

    def mlp_width(self, fraction: float, round_to: int | None = None) -> int:
        """MLP channels to keep for about `fraction` of them: a multiple of `round_to`, or all.

        By default 64, 8 or 1: the largest of which there are at least four.
        """
        return _rounded(self.mlp, fraction, round_to or _step(self.mlp, (64, 8, 1)))

    def head_width(self, fraction: float, round_to: int | None = None) -> int:
        """Channels of a head to keep for about `fraction` of them: a multiple of `round_to`, or all.

        By default 8 or 2: the largest of which there are at least four. Raises `ValueError` for an odd `round_to`.
        """
        step = round_to or _step(self.width, (8, 2))
        if step % 2:
            raise ValueError(f"the width of heads is rounded to an even number, got round_to={step}")
        return _rounded(self.width, fraction, step)

    def kv_head_count(self, fraction: float) -> int:
        """Key-value heads to keep for about `fraction` of them."""
        return _rounded(self.kv_heads, fraction, 1)

    def rotated(self, width: int) -> int:
        """How many of `width` kept channels of a head should rotate: as large a part as of all; pairs, at least one."""
        if not self.rotary:
            return 0
        pairs = min(max(1, round(width / self.width * self.rotary / 2)), width // 2)
        fewest = width - (self.width - self.rotary)
        return max(2 * pairs, fewest + fewest % 2)

    def kept(self, kept: Kept) -> Geometry:
        """The geometry of the block that is left."""
        qk = None if kept.qk is None else kept.qk[0]
        return replace(
            self,
            heads=len(self._heads("q", kept)),
            kv_heads=len(self._heads("k", kept)),
            width=self.width if qk is None else len(qk),
            rotary=self.rotary if qk is None else int((qk < self.rotary).sum()),
            mlp=self.mlp if kept.mlp is None else len(kept.mlp),
        )

    def check(self, kept: Kept) -> None:
        """Raise `ValueError` for indices that this block does not have, or that cannot be kept without others."""
        for name, size in (("mlp", self.mlp), ("qk", self.width), ("vo", self.width), ("kv_heads", self.kv_heads)):
            index = getattr(kept, name)
            if index is not None and int(index.max()) >= size:
                raise ValueError(f"{name} keeps index {int(index.max())}, the block has {size}")
        heads = self.kv_heads if kept.kv_heads is None else len(kept.kv_heads)
        if kept.vo is not None and len(kept.vo) != heads:
            raise ValueError(f"vo has {len(kept.vo)} rows; give one a kept key-value head, {heads}")
        if kept.qk is not None and len(kept.qk) not in ({1} if self.rotary else {1, heads}):
            why = "1, since the rotary embedding is one for all heads" if self.rotary else f"1 or {heads}"
            raise ValueError(f"qk has {len(kept.qk)} rows; give {why}")
        if (kept.qk is None) != (kept.vo is None):
            given, other = ("qk", "vo") if kept.vo is None else ("vo", "qk")
            index = kept.qk if kept.vo is None else kept.vo
            if index is not None and index.shape[1] != self.width:
                raise ValueError(
                    f"{given} keeps {index.shape[1]} of {self.width} channels and {other} all of them; the heads of a "
                    f"block have one width, so keep as many of each"
                )
        if kept.qk is not None and self.rotary:
            rotated = kept.qk[0][kept.qk[0] < self.rotary]
            low, high = rotated[rotated < self.rotary // 2], rotated[rotated >= self.rotary // 2]
            if not torch.equal(low + self.rotary // 2, high):
                raise ValueError(
                    f"qk keeps channel j of a rotary pair (j, j + {self.rotary // 2}) without the other, got "
                    f"{rotated.tolist()}; keep or remove both"
                )
            if len(low) == 0:
                raise ValueError("qk keeps no channel that rotates; keep at least one pair")

    @property
    def part_roles(self) -> list[str]:
        """Roles of the block, those that a fused linear holds in its place."""
        fused = {fused.role: fused.parts for fused in self.fused}
        return [part for role in self.roles for part in fused.get(role, (role,))]

    def _channels(self, role: str) -> tuple[int, ...]:
        if role in ("gate", "up", "down"):
            return (self.mlp,)
        return (self.heads if role in ("q", "o") else self.kv_heads, self.width)

    def _heads(self, role: str, kept: Kept) -> Tensor:
        """The heads of `role` that stay: with a key-value head go the query heads that read it."""
        group = self.heads // self.kv_heads if role in ("q", "o") else 1
        kv_heads = torch.arange(self.kv_heads) if kept.kv_heads is None else kept.kv_heads
        return (kv_heads[:, None] * group + torch.arange(group)).flatten()

    def _select(self, role: str, index: Tensor, kept: Kept) -> Tensor:
        """Of `index`, one entry a channel, the entries of the channels that stay."""
        if role in ("gate", "up", "down"):
            return index if kept.mlp is None else index[kept.mlp]
        index = index[self._heads(role, kept)]
        channels = kept.qk if role in ("q", "k") else kept.vo
        if channels is None:
            return index
        rows = channels.repeat_interleave(len(index) // len(channels), 0)
        return index.gather(1, rows)


def _step(size: int, steps: tuple[int, ...]) -> int:
    return next((step for step in steps if size >= 4 * step), steps[-1])


def _rounded(size: int, fraction: float, step: int) -> int:
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction of channels to keep must be in (0, 1], got {fraction}")
    nearest = max(1, round(size * fraction / step)) * step
    return size if fraction == 1 else min(nearest, size)


OUTSIDE = -1


class BlockLinear(NamedTuple):
    """A linear of a decoder block: its full module name, the block's index, its role.

    Of a linear outside the decoder blocks the index is `OUTSIDE`, the role empty.
    """

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
        coupled=(HEADS, GATED_CHANNELS),
        norm_kind=norm_kind,
        intermediate="intermediate_size",
        sizes=MappingProxyType({"self_attn.head_dim": "width", "mlp.intermediate_size": "mlp"}),
        head_norms=head_norms,
        fixed_scale=fixed_scale,
        rotary="model.rotary_emb",
    )


# The submodule of an attention that keeps some channels of the rotary embedding.
KEPT_ROTARY = "kept_rotary"

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
    coupled=(HEADS, PLAIN_CHANNELS),
    norm_kind="layer",
    intermediate="ffn_dim",
    sizes=MappingProxyType(
        {"self_attn.head_dim": "width", "self_attn.num_heads": "heads", "self_attn.embed_dim": "inner"}
    ),
    kv_heads=None,
    position_embedding="model.decoder.embed_positions",
    embedding_projections=("model.decoder.project_in", "model.decoder.project_out"),
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
    coupled=(FUSED_HEADS, PLAIN_CHANNELS),
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
    coupled=(FUSED_HEADS, PLAIN_CHANNELS),
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


def architecture_of(model: nn.Module) -> Architecture:
    """The description of `model`'s class, or of the first known class it derives from.

    That of a vision-language model describes its language model. Raises `ValueError` for any other class, naming the
    supported ones.
    """
    for ancestor in type(model).__mro__:
        if ancestor.__name__ in ARCHITECTURES:
            return ARCHITECTURES[ancestor.__name__]
        if ancestor.__name__ in VISION_LANGUAGE:
            return _beside_vision(model, VISION_LANGUAGE[ancestor.__name__])
    known = ", ".join([*ARCHITECTURES, *VISION_LANGUAGE])
    raise ValueError(
        f"pycompress knows no architecture {type(model).__name__!r}; supported: {known}; "
        f"unwrap the model if it is a compiled or wrapped one of these, or describe its class in pycompress/groups.py "
        f"(see CONTRIBUTING.md)"
    )


def _beside_vision(model: nn.Module, path: str) -> Architecture:
    """The architecture of the language model at `path`, its parts as `model` calls them."""
    held = type(model.get_submodule(path)).__name__
    alone = ARCHITECTURES.get(f"{held.removesuffix('Model').removesuffix('Text')}ForCausalLM")
    if alone is None:
        raise ValueError(
            f"{type(model).__name__} holds a language model {held}; pycompress knows those of "
            f"{', '.join(ARCHITECTURES)}"
        )
    parts = ("blocks", "embedding", "final_norm", "rotary", "position_embedding")
    moved = {part: getattr(alone, part) for part in parts if getattr(alone, part) is not None}
    moved = {part: f"{path}.{name.partition('.')[2]}" for part, name in moved.items()}
    return replace(alone, class_name=type(model).__name__, beside=True, **moved)


def is_of(architecture: Architecture, model: nn.Module) -> bool:
    """Whether the model, with its head or without, has a config of this architecture's class."""
    return isinstance(model.config, getattr(transformers, architecture.class_name).config_class)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks, first to last. Block `i` is called `f"{architecture_of(model).blocks}.{i}"`."""
    return list(model.get_submodule(architecture_of(model).blocks).children())


def geometry(model: nn.Module, block: int) -> Geometry:
    """The channels of block `block`, from the shapes of its linears as they are now."""
    return block_geometry(architecture_of(model), blocks(model)[block], len(rotary_channels(model, block)))


def block_geometry(architecture: Architecture, block: nn.Module, rotary: int) -> Geometry:
    """The channels of a block of the architecture, `rotary` of a head's rotating, from the shapes of its linears."""
    shapes = {role: shape_of(block.get_submodule(path)) for role, path in architecture.paths.items()}
    width = next(_attribute(block, path) for path, size in architecture.sizes.items() if size == "width")
    heads = shapes["o"][1] // width
    kv_heads = (shapes["qkv"][0] // width - heads) // 2 if "qkv" in shapes else shapes["k"][0] // width
    return Geometry(
        heads=heads,
        kv_heads=kv_heads,
        width=width,
        rotary=rotary,
        mlp=shapes["down"][1],
        hidden=shapes["o"][0],
        roles=architecture.roles,
        fused=architecture.fused,
    )


def shape_of(module: nn.Module) -> tuple[int, int]:
    """`(N, K)` of a linear, of a `Conv1D` or of a packed one."""
    if isinstance(module, Conv1D):
        return module.nf, module.nx
    return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]


def _attribute(block: nn.Module, path: str) -> int:
    parent, _, name = path.rpartition(".")
    return int(getattr(block.get_submodule(parent), name))


def rotary_channels(model: nn.Module, block: int) -> Tensor:
    """Channels of the model's rotary embedding that the heads of a block rotate by; empty without one."""
    architecture = architecture_of(model)
    if architecture.rotary is None:
        return torch.arange(0)
    attention = blocks(model)[block].get_submodule(architecture.attention)
    if hasattr(attention, KEPT_ROTARY):
        return attention.get_submodule(KEPT_ROTARY).get_buffer("channels").long().cpu()
    return torch.arange(2 * len(frequencies(model.get_submodule(architecture.rotary), model.config, block)))


def frequencies(embedding: nn.Module, config: Any, block: int) -> Tensor:
    """Angles a token, `[rotary / 2]`, by which a model's rotary embedding turns the heads of a block."""
    types = getattr(config, "layer_types", None)
    own = f"{types[block]}_inv_freq" if types else ""
    return embedding.get_buffer(own if hasattr(embedding, own) else "inv_freq")


def linears(model: nn.Module) -> list[BlockLinear]:
    """Every linear of the decoder blocks, in order of execution."""
    architecture = architecture_of(model)
    return [
        BlockLinear(f"{architecture.blocks}.{block}.{architecture.paths[role]}", block, role)
        for block in range(len(blocks(model)))
        for role in architecture.roles
    ]


def outside(model: nn.Module) -> list[BlockLinear]:
    """Of a vision-language model the linears outside the decoder blocks, but for the head, as they are registered."""
    architecture = architecture_of(model)
    if not architecture.beside:
        return []
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    apart = (f"{architecture.blocks}.", architecture.head)
    return [BlockLinear(name, OUTSIDE, "") for name in names if not name.startswith(apart)]


def select(model: nn.Module, targets: Sequence[str] | None) -> list[BlockLinear]:
    """The linears that `targets` name, in order of execution.

    A target is a role (`"q"`) or a shell pattern over full module names (`"model.layers.0.*"`); `None` takes all of the
    decoder blocks. Of a vision-language model patterns name those outside the blocks too, which come first. Raises
    `ValueError` for a target that names nothing.
    """
    candidates = linears(model)
    if targets is None:
        return candidates
    candidates = outside(model) + candidates
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
        f"{fused}; or give a pattern over module names, such as {candidates[-1].name!r}"
    )
