"""What recovery trains of a model: which parameters, in which dtype, behind which adapters; and all put back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pycompress.architectures import model as architectures
from pycompress.formats.codes import storage_of
from pycompress.formats.packed import Rounded
from pycompress.hub.record import compressed_modules
from pycompress.lm.state import HOOKS
from pycompress.nn.linear import PackedLinear, PrunedLinear

ADVICE = 'method="factors" trains what packed layers hold in floats'
ROUNDED = "recover the dense model first, then round it"


@contextmanager
def training_form(
    model: PreTrainedModel, trained: Sequence[str], whole: bool, lora: tuple[list[str], int] | None
) -> Iterator[None]:
    """Make `model` ready to train for the block, and an ordinary model again after it, whatever happened in it.

    `trained`: names of the parameters that train; they are held in float32, with `whole` every float of the model is.
    `lora`: names of the linears that get adapters, and their rank; they are merged into the linears in the end.
    Afterwards dtypes are as before, and hooks and attributes that came in the block are gone.
    """
    dtypes = {name: tensor.dtype for name, tensor in _tensors(model)}
    chosen = set(trained)
    adapted: Any = None
    with _nothing_added(model):
        try:
            for name, tensor in _tensors(model):
                tensor.grad = None
                if tensor.dtype in (torch.bfloat16, torch.float16) and (whole or name in chosen):
                    tensor.data = tensor.data.float()
                if isinstance(tensor, nn.Parameter):
                    tensor.requires_grad_(name in chosen)
            if lora is not None:
                adapted = add_lora(model, *lora)
            yield
        finally:
            try:
                if adapted is not None:
                    adapted.merge_and_unload()
            finally:
                _remove_adapters(model)
                for name, tensor in _tensors(model):
                    tensor.grad = None
                    tensor.data = tensor.data.to(dtypes[name])


@contextmanager
def _nothing_added(model: nn.Module) -> Iterator[None]:
    """Take away what the block adds to modules: attributes, hooks such as those of gradient checkpointing."""
    modules = list(model.modules())
    hooks = [{kind: set(getattr(module, kind)) for kind in HOOKS} for module in modules]
    names = [set(vars(module)) for module in modules]
    inputs = {name: value for name, value in vars(model).items() if name.startswith("_require_grads_hook")}
    try:
        yield
    finally:
        for module, known, before in zip(modules, hooks, names, strict=True):
            for kind, keys in known.items():
                for key in getattr(module, kind).keys() - keys:
                    del getattr(module, kind)[key]
            for name in vars(module).keys() - before:
                del module.__dict__[name]
        vars(model).update(inputs)


def trained_parameters(model: PreTrainedModel, method: str) -> list[str]:
    """Names of the parameters that train under "full" or "factors"; codes and rounded weights do not.

    Raises `ValueError` where "factors" finds no packed layer, or none that holds floats.
    """
    rounded = {f"{name}.weight" for name in _rounded(model)}
    floats = [name for name, p in model.named_parameters() if p.is_floating_point() and name not in rounded]
    if method == "full":
        return floats
    packed = _packed(model)
    if not packed and rounded:
        raise ValueError(f'the model\'s weights are rounded, and method="factors" trains packed layers; {ROUNDED}')
    if not packed:
        raise ValueError(
            'the model has no packed layer, so method="factors" has nothing to train; take method="lora" or "full"'
        )
    kinds = {storage_of(layer.weight) for layer in packed.values()}
    if "float" not in kinds:
        raise ValueError(
            f"the packed layers hold {' and '.join(sorted(kinds))} codes, which do not train; "
            f"pack with storage=None before recovery"
        )
    return [name for name in floats if name.rpartition(".")[0] in packed]


def lora_targets(model: PreTrainedModel, targets: Sequence[str] | None) -> list[str]:
    """Names of the linears that `targets` name, roles or patterns; None: every ordinary linear of the blocks.

    Raises `ValueError` for targets that name nothing, a packed layer or a rounded one, and where no linear is ordinary.
    """
    names = [linear.name for linear in architectures.select(model, targets)]
    packed = [name for name in names if isinstance(model.get_submodule(name), PackedLinear)]
    records = _rounded(model)
    rounded = [name for name in names if name in records]
    other = [name for name in names if not isinstance(model.get_submodule(name), (nn.Linear, Conv1D, PackedLinear))]
    if other:
        kind = type(model.get_submodule(other[0])).__name__
        raise ValueError(f"{other[0]} is a {kind}, on which peft puts no adapter; name other linears in lora_targets")
    if targets is None:
        names = [name for name in names if name not in packed and name not in rounded]
    elif packed:
        raise ValueError(f"{packed[0]} is packed, and LoRA cannot be merged into it; {ADVICE}")
    elif rounded:
        raise ValueError(f"{rounded[0]} holds rounded weights, which LoRA would undo; {ROUNDED}")
    if not names and not packed:
        raise ValueError(f"every linear of the blocks is rounded, which LoRA would undo; {ROUNDED}")
    if not names:
        raise ValueError(f'every linear of the blocks is packed or rounded, so method="lora" finds none; {ADVICE}')
    return names


def add_lora(model: PreTrainedModel, names: list[str], rank: int) -> Any:
    """Put adapters of `rank` on the linears called `names`: `W + 2 B A`, B zero, A random, both in float32.

    Gives peft's model around `model`; everything else is frozen. Reference: arXiv:2106.09685.
    """
    from peft import LoraConfig, get_peft_model

    conv1d = isinstance(model.get_submodule(names[0]), Conv1D)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=conv1d)
    try:
        return get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f'peft puts no adapter on these linears: {error}; name others, or take method="full"'
        ) from error


def _remove_adapters(model: nn.Module) -> None:
    """Put the linears back that adapters have taken the place of, as they are."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer") and hasattr(module, "adapter_layer_names"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())


def zeros_of(model: PreTrainedModel, trained: Sequence[str]) -> dict[str, Tensor]:
    """Where the weights of the blocks' ordinary linears that train are exactly zero, by parameter name.

    Pruned layers keep their zeros by themselves. Raises `ValueError` where no weight has a zero.
    """
    names = [linear.name for linear in architectures.linears(model)]
    pruned = {name for name in names if isinstance(model.get_submodule(name), PrunedLinear)}
    weights = {f"{name}.weight" for name in names if name not in pruned} & set(trained)
    masks = {name: model.get_parameter(name).detach() == 0 for name in sorted(weights)}
    masks = {name: mask for name, mask in masks.items() if mask.any()}
    if not masks and not pruned:
        raise ValueError("keep_zeros=True, but no weight of the blocks' linears has a zero; leave it False")
    return masks


@contextmanager
def gradients_masked(model: PreTrainedModel, zeros: dict[str, Tensor]) -> Iterator[None]:
    """Let no gradient reach what stays zero, so that neither clipping nor the optimizer's moments see it."""

    def masked(mask: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda gradient: gradient.masked_fill(mask.to(gradient.device), 0)

    hooks = [model.get_parameter(name).register_hook(masked(mask)) for name, mask in zeros.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _packed(model: nn.Module) -> dict[str, Any]:
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _rounded(model: nn.Module) -> set[str]:
    return {name for name, spec in compressed_modules(model).items() if spec["format"] == Rounded.name}


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, each once."""
    return chain(model.named_parameters(), model.named_buffers())
