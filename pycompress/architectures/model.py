"""A model as its description says it: its blocks, their linears in order of execution, their channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pycompress.architectures.description import Architecture
from pycompress.architectures.geometry import Geometry
from pycompress.architectures.supported import ARCHITECTURES, VISION_LANGUAGE

OUTSIDE = -1


class BlockLinear(NamedTuple):
    """A linear of a decoder block: its full module name, the block's index, its role.

    Of a linear outside the decoder blocks the index is `OUTSIDE`, the role empty.
    """

    name: str
    block: int
    role: str


# The submodule of an attention that keeps some channels of the rotary embedding.
KEPT_ROTARY = "kept_rotary"


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
        f"unwrap the model if it is a compiled or wrapped one of these, or describe its class in "
        f"pycompress/architectures/supported.py (see CONTRIBUTING.md)"
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
    parts = ("blocks", "embedding", "final_norm", "rotary")
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
