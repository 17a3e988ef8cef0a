"""What is to be said of a causal LM class: where its parts are, which linears share an input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


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
    `head_norms` are those of queries and keys, over a head's channels; `rotary` is the path of the rotary embedding,
    `output_projection` that of a linear between the final norm and the head.
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
    output_projection: str | None = None
    parallel_residual: str | None = None
    norms_first: str | None = None
    mlp: tuple[str, ...] = ("mlp",)
    dropouts: tuple[str | None, str | None] = (None, None)
    beside: bool = False

    def parallel(self, config: Any) -> bool:
        """Whether attention and MLP of a model with this config read the same residual stream."""
        return self.parallel_residual is not None and bool(getattr(config, self.parallel_residual))

    @property
    def norm_offset(self) -> float:
        """What a norm adds to its weight before it scales by it."""
        return 1.0 if self.norm_kind == "rms_plus_one" else 0.0

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
