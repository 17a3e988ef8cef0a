"""Gives the modules of a decoder block other sizes: what shrinking, slicing and loading have in common."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.architectures.description import Architecture
from pycompress.architectures.geometry import Geometry
from pycompress.architectures.model import KEPT_ROTARY, shape_of
from pycompress.architectures.subnet import Kept
from pycompress.nn.blocks import GainlessNorm, KeptRotary, sliced_class


def resize(
    block: nn.Module,
    architecture: Architecture,
    config: Any,
    geometry: Geometry,
    *,
    index: int,
    rotary: int,
    biases: Collection[str] = (),
) -> None:
    """Make the modules of `block`, the `index`-th of its model, those of `geometry`.

    Linears and norms of another size are replaced by empty ones on the meta device; the others stay. `rotary`: channels
    of the model's rotary embedding; where the block keeps fewer, its attention gets a `KeptRotary`, empty too.
    `biases`: roles that get a bias where they have none.
    """
    for role, shape in geometry.shapes(Kept()).items():
        path = architecture.paths[role]
        module = block.get_submodule(path)
        bias = module.bias is not None or role in biases
        if module.weight.shape != _stored(module, shape) or bias != (module.bias is not None):
            block.set_submodule(path, _empty(module, shape, bias))
    for path in architecture.head_norms:
        norm = block.get_submodule(path)
        weight = norm.get_parameter("weight")
        if len(weight) != geometry.width:
            empty = torch.empty(geometry.width, dtype=weight.dtype, device="meta")
            norm.register_parameter("weight", nn.Parameter(empty, requires_grad=weight.requires_grad))
    for path, size in architecture.sizes.items():
        parent, _, name = path.rpartition(".")
        if hasattr(block.get_submodule(parent), name):
            setattr(block.get_submodule(parent), name, getattr(geometry, size))
    attention: Any = block.get_submodule(architecture.attention)
    attention.scaling = softmax_scale(architecture, config, attention.scaling, geometry.width, index)
    if architecture.heads_from_config and getattr(config, architecture.heads) != geometry.heads:
        attention.config = OwnConfig(config, **{architecture.heads: geometry.heads})
    _select_rotary(attention, None if rotary == geometry.rotary else geometry.rotary, rotary)


def slice_block(
    block: nn.Module, architecture: Architecture, widths: Sequence[int | None], *, parallel: bool = False
) -> None:
    """Make `block` a `SlicedBlock` whose residual stream has these widths where attention reads it, where the MLP does,
    and where it leaves the block; None: the hidden size, in the model's own coordinates.

    In a `parallel` block the first two are one. Linears of another size, shortcuts and projections are empty, on the
    meta device. A linear gets a bias where the norm before it, which loses its gain and bias, has one.
    """
    made: Any = block
    o = block.get_submodule(architecture.paths["o"])
    hidden, like = shape_of(o)[0], o.get_parameter("weight")
    shortcuts, projections = nn.ModuleList(), nn.ModuleList()
    for number, branch in enumerate(architecture.branches):
        before, after = widths[number], widths[2 if parallel else number + 1]
        if before is not None:
            norm: Any = block.get_submodule(branch.norm)
            for role in branch.readers:
                biased = getattr(norm, "bias", None) is not None
                _resize_linear(block, architecture.paths[role], inputs=before, biased=biased)
            eps = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
            block.set_submodule(branch.norm, GainlessNorm(hidden, eps).train(norm.training))
        if after is not None and branch.norm_after is None:
            _resize_linear(block, architecture.paths[branch.writer], outputs=after)
        projected = after is not None and branch.norm_after is not None
        projections.append(_product(hidden, after or hidden, like) if projected else nn.Identity())
        same = (before is None and after is None) or (parallel and number == 0)
        shortcuts.append(nn.Identity() if same else _product(before or hidden, after or hidden, like))
    block_class: Any = type(block)
    made.__class__ = sliced_class(block_class, architecture.class_name)
    made.parallel, made.shortcuts, made.projections = parallel, shortcuts.train(block.training), projections


def softmax_scale(architecture: Architecture, config: Any, scale: float, width: int, index: int) -> float:
    """What the attention of block `index` multiplies its logits with when its heads are `width` wide.

    `scale`: what it does now.
    """
    if architecture.fixed_scale:
        return scale
    by_width = architecture.scale_by_width is None or getattr(config, architecture.scale_by_width)
    by_index = architecture.scale_by_index is not None and getattr(config, architecture.scale_by_index)
    return (width**-0.5 if by_width else 1.0) / (float(index + 1) if by_index else 1.0)


def scaled_norm(architecture: Architecture, weight: Tensor, factor: float) -> Tensor:
    """The weight of one of the architecture's norms whose output is `factor` times as large."""
    if abs(factor - 1) < 1e-12:
        return weight
    offset = architecture.norm_offset
    return ((weight.double() + offset) * factor - offset).to(weight.dtype)


def keep_rotary(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Forward pre-hook of an attention with a `KeptRotary`."""
    kept = attention.get_submodule(KEPT_ROTARY)
    return args, kwargs | {"position_embeddings": kept(*kwargs["position_embeddings"])}


class OwnConfig:
    """A model's config, some fields apart, for a module that reads its sizes from there."""

    def __init__(self, shared: Any, **own: Any) -> None:
        self.shared = shared
        self.__dict__.update(own)

    def __getattr__(self, name: str) -> Any:
        if name == "shared" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.shared, name)


def _select_rotary(attention: nn.Module, kept: int | None, rotary: int) -> None:
    for key, hook in list(attention._forward_pre_hooks.items()):
        if hook is keep_rotary:
            delattr(attention, KEPT_ROTARY)
            del attention._forward_pre_hooks[key], attention._forward_pre_hooks_with_kwargs[key]
    if kept is not None:
        setattr(attention, KEPT_ROTARY, KeptRotary(kept, rotary, device="meta"))
        attention.register_forward_pre_hook(keep_rotary, with_kwargs=True)


def _resize_linear(
    block: nn.Module, path: str, *, inputs: int | None = None, outputs: int | None = None, biased: bool = False
) -> None:
    module = block.get_submodule(path)
    rows, columns = shape_of(module)
    shape, bias = (outputs or rows, inputs or columns), biased or module.bias is not None
    if shape != (rows, columns) or bias != (module.bias is not None):
        block.set_submodule(path, _empty(module, shape, bias))


def _product(inputs: int, outputs: int, like: nn.Parameter) -> nn.Linear:
    """An empty linear without a bias, on the meta device, that trains where `like` does."""
    made = nn.Linear(inputs, outputs, bias=False, device="meta", dtype=like.dtype)
    made.weight.requires_grad_(like.requires_grad)
    return made


def _stored(module: nn.Module, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape of the weight in this kind of module."""
    return shape if isinstance(module, nn.Linear) else (shape[1], shape[0])


def _empty(module: nn.Module, shape: tuple[int, int], bias: bool) -> nn.Module:
    """A linear of the same kind and another size, on the meta device."""
    weight = module.get_parameter("weight")
    with torch.device("meta"):
        if isinstance(module, nn.Linear):
            made: nn.Module = nn.Linear(shape[1], shape[0], bias=bias, dtype=weight.dtype)
        else:
            made = type(module)(*shape).to(weight.dtype)
    for parameter in made.parameters():
        parameter.requires_grad_(weight.requires_grad)
    return made.train(module.training)
