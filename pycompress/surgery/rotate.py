"""Rotates the residual stream of decoder blocks into given bases, and gives a model the sliced blocks that come of it.

Reference: arXiv:2401.15024, sections 3.1 to 3.3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pycompress.architectures.description import Architecture, Branch
from pycompress.architectures.model import architecture_of, blocks
from pycompress.hub.record import check_not_quantized, compressed_modules, record_sliced
from pycompress.nn.blocks import SlicedBlock
from pycompress.nn.resize import slice_block
from pycompress.nn.weights import dense_weight
from pycompress.surgery.shrink import check_free, check_untied, twin


class Basis(NamedTuple):
    """Coordinates of the residual stream at one point: `x ≈ decoder h` with `h = encoderᵀ x`, both `[D, d]` float32.

    The decoder's columns are orthonormal, so that h is as long as what it stands for, and `encoderᵀ decoder = 1`. A
    rotation that is sliced has `encoder = decoder`, less its columns' means where norms subtract the mean.
    """

    decoder: Tensor
    encoder: Tensor


# Where attention reads the residual stream, where the MLP does, and where it leaves the block; None: as it is.
Points = tuple[Basis | None, Basis | None, Basis | None]


def check_sliceable(model: nn.Module) -> None:
    """Raise `ValueError` for a model whose blocks cannot be rotated, with the reason."""
    architecture, config = architecture_of(model), model.config
    check_not_quantized(model)
    if compressed_modules(model):
        raise ValueError("the model has packed modules; slice the dense model first, then pack it")
    if any(isinstance(block, SlicedBlock) for block in blocks(model)):
        raise ValueError("the model is sliced already; start from the dense model")
    if architecture.norms_first is not None and not getattr(config, architecture.norms_first):
        raise ValueError(
            f"{architecture.norms_first} is false: norms follow the residual sums, so that these cannot be rotated; "
            f"prune this model instead"
        )
    parent, _, name = architecture.final_norm.rpartition(".")
    if getattr(model.get_submodule(parent), name) is None:
        raise ValueError(f"{architecture.final_norm} is missing, so that the head would read what slicing leaves out")
    check_untied(model, architecture.blocks)
    known = {*architecture.paths.values(), *architecture.head_norms}
    known |= {path for branch in architecture.branches for path in (branch.norm, branch.norm_after) if path}
    check_free(model)
    for index, block in enumerate(blocks(model)):
        for name, _ in block.named_parameters():
            if name.rpartition(".")[0] not in known:
                raise ValueError(
                    f"{architecture.blocks}.{index}.{name} is no part of a {architecture.class_name} block"
                )


@torch.no_grad()
def sliced_block(model: nn.Module, block: nn.Module, points: Points) -> nn.Module:
    """A copy of a dense `block` of `model` that works in these bases; `block` itself where there is none.

    The norms' gains and biases go into the linears that read them; the mean that a LayerNorm subtracts is taken off by
    the encoders. Whole bases (d = D) change nothing but the rounding. Products are formed in float64. In
    a block whose branches run in parallel, the first two points are one.
    """
    architecture, config = architecture_of(model), model.config
    if all(point is None for point in points):
        return block
    parallel = architecture.parallel(config)
    made: Any = twin(block, config, config)
    widths = [None if point is None else point.decoder.shape[1] for point in points]
    slice_block(made, architecture, widths, parallel=parallel)
    device = next(block.parameters()).device
    wide = [None if p is None else Basis(*(t.to(device, torch.float64) for t in p)) for p in points]
    for number, branch in enumerate(architecture.branches):
        before, after = wide[number], wide[2 if parallel else number + 1]
        if before is not None:
            _fill_readers(block, made, architecture, branch, before.decoder)
        encoder = None if after is None else after.encoder
        path = architecture.paths[branch.writer]
        if encoder is not None and branch.norm_after is None:
            writer = block.get_submodule(path)
            bias = _bias(writer)
            bias = None if bias is None else encoder.T @ bias
            _fill(made, path, encoder.T @ dense_weight(writer).double(), bias)
        elif encoder is not None:
            _fill(made, f"projections.{number}", encoder.T)
        if isinstance(made.shortcuts[number], nn.Linear):
            _fill(made, f"shortcuts.{number}", _shortcut(before, encoder))
    return made  # type: ignore[no-any-return]


def install(model: nn.Module, made: list[nn.Module], widths: list[int | None]) -> Callable[[], None]:
    """Give `model` these blocks in place of its own; returns a function that puts its own back.

    `widths`: of the residual stream where each branch reads it and where the last block leaves it, for saving.
    """
    architecture = architecture_of(model)
    dense = model.get_submodule(architecture.blocks)
    forget = record_sliced(model, architecture, widths)
    blocks = nn.ModuleList(made)
    blocks.training = dense.training
    model.set_submodule(architecture.blocks, blocks)

    def undo() -> None:
        model.set_submodule(architecture.blocks, dense)
        forget()

    return undo


def _fill_readers(
    block: nn.Module, made: nn.Module, architecture: Architecture, branch: Branch, decoder: Tensor
) -> None:
    """Fold the norm of a branch into the linears that read it, and let these read coordinates."""
    norm = block.get_submodule(branch.norm)
    for role in branch.readers:
        linear = block.get_submodule(architecture.paths[role])
        weight, bias = dense_weight(linear).double(), _bias(linear)
        shift = getattr(norm, "bias", None)
        if shift is not None:
            shift = weight @ shift.detach().double()
            bias = shift if bias is None else bias + shift
        _fill(made, architecture.paths[role], weight * _gain(architecture, norm) @ decoder, bias)


def _gain(architecture: Architecture, norm: nn.Module) -> Tensor | float:
    gain = getattr(norm, "weight", None)
    return 1.0 if gain is None else gain.detach().double() + architecture.norm_offset


def _shortcut(before: Basis | None, encoder: Tensor | None) -> Tensor:
    """`[width after, width before]`, of which None is the whole stream."""
    if before is None:
        assert encoder is not None
        return encoder.T
    return before.decoder if encoder is None else encoder.T @ before.decoder


def _bias(linear: nn.Module) -> Tensor | None:
    bias = linear.get_parameter("bias") if linear.bias is not None else None
    return None if bias is None else bias.detach().double()


def _fill(made: nn.Module, path: str, weight: Tensor, bias: Tensor | None = None) -> None:
    """Give the linear at `path` a weight `[N, K]` and a bias of its own, in its dtype."""
    module = made.get_submodule(path)
    like = module.get_parameter("weight")
    transposed = not isinstance(module, nn.Linear)
    values = {"weight": weight.T if transposed else weight} | ({} if bias is None else {"bias": bias})
    for name, value in values.items():
        stored = value.to(like.dtype).contiguous()
        module.register_parameter(name, nn.Parameter(stored, requires_grad=like.requires_grad))
