"""Puts packed weights into a model, one module at a time."""

from __future__ import annotations

import torch
from torch import nn

from pycompress.formats.intact import check_tensors
from pycompress.formats.packed import Packed, Rounded, SharedChannels
from pycompress.hub.record import check_not_quantized, forget, is_recorded, record
from pycompress.lm.state import replaced_forward, user_hooks
from pycompress.nn.linear import BitmapLinear, KernelLinear, PackedLinear, empty_layer
from pycompress.nn.weights import linear_shape, not_a_linear


def check_replaceable(model: nn.Module, name: str) -> None:
    """Raise `ValueError` unless `replace` can take the module called `name`.

    Refused: a model or module of another quantization method, a module that is compressed already, is neither an
    `nn.Linear` nor a `Conv1D`, has hooks, or shares its weight with another.
    """
    check_not_quantized(model)
    module = _submodule(model, name)
    if isinstance(module, PackedLinear) or is_recorded(model, name):
        raise ValueError(f"{name} is compressed already; start from the dense model")
    if linear_shape(module) is None:
        raise ValueError(f"{name}: {not_a_linear(module)}")
    check_own(name, module)
    tied = [
        other
        for other, parameter in model.named_parameters(remove_duplicate=False)
        if parameter is module.weight and other != f"{name}.weight"
    ]
    if tied:
        raise ValueError(f"{name}.weight is tied to {', '.join(tied)}; leave it out of targets or untie it first")


def check_own(name: str, module: nn.Module) -> None:
    """Raise `ValueError` for a module with hooks or a replaced forward: they would be lost, or run on as they were.

    The hooks by which transformers records hidden states and attentions are none of the user's.
    """
    if hasattr(module, "_hf_hook"):
        raise ValueError(
            f"{name} has hooks of accelerate, which would be lost; remove them first: "
            f"accelerate.hooks.remove_hook_from_submodules(model)"
        )
    hooks = user_hooks(module)
    if hooks:
        what = getattr(hooks[0], "__qualname__", type(hooks[0]).__name__)
        raise ValueError(f"{name} has hooks ({what}), which would be lost; remove them first and add them again after")
    if replaced_forward(module):
        raise ValueError(
            f"{name} has a forward of its own in place of {type(module).__name__}'s (a wrapper, torch.compile), which "
            f"would go on running the old module; take it off first and put it on again after"
        )


@torch.no_grad()
def replace(model: nn.Module, name: str, packed: Packed) -> None:
    """Give the module called `name` the weight `packed`, and record that on the model so that it is saved.

    `Rounded` gives the module a new weight; other formats swap it for their layer on the same device, in the same
    dtype and mode, with the same bias. Raises `ValueError` as `check_replaceable` does, and
    for a packed weight of another shape or whose tensors are not what it says, leaving the model as it was.
    """
    check_replaceable(model, name)
    module = _submodule(model, name)
    shape = linear_shape(module)
    if packed.shape != shape:
        raise ValueError(f"{name} is {list(shape or ())}, its packed weight {list(packed.shape)}")
    check_tensors(name, packed.spec(), packed.tensors())
    if isinstance(packed, Rounded):
        weight = module.get_parameter("weight")
        values = (packed.values if isinstance(module, nn.Linear) else packed.values.T).to(weight.device, weight.dtype)
        module.register_parameter("weight", nn.Parameter(values.contiguous(), requires_grad=weight.requires_grad))
    else:
        # A packed `weight` of the dense shape would load into the dense module where pycompress is not imported.
        if isinstance(packed, SharedChannels) and packed.weight.shape == module.weight.shape:
            raise ValueError(
                f"{name}: {packed.clusters} clusters and rank {packed.rank} take at least the bytes of the dense "
                f"{list(packed.shape)}; use fewer, or leave the module dense"
            )
        model.set_submodule(name, _packed_layer(module, packed))
    record(model, name, packed.spec())


def use_dense_kernel(model: nn.Module, enabled: bool = True) -> int:
    """Multiply the model's ordinary linear layers by this package's dense CPU kernel.

    Every `nn.Linear`, the head too, changes its class in place and keeps its parameters; what is saved stays the same.
    Worth it in 16 bits on a CPU that has no products of its own for them (`pycompress speed FOLDER --dense-kernel`
    compares); a GPU's product is torch's either way.

    Parameters
    ----------
    model
        Any module.
    enabled
        False to go back to torch's product.

    Returns
    -------
    int
        How many layers changed.

    Examples
    --------
    >>> import pycompress
    >>> pycompress.use_dense_kernel(tiny_model("LlamaForCausalLM"))
    15
    """
    given, wanted = (nn.Linear, KernelLinear) if enabled else (KernelLinear, nn.Linear)
    found = [module for module in model.modules() if type(module) is given]
    for module in found:
        module.__class__ = wanted
    return len(found)


class Undo:
    """Puts a model's modules back as they were, for a compression that did not come to its end."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.dense: dict[str, tuple[nn.Module, nn.Parameter]] = {}

    def note(self, name: str) -> None:
        """Keep the module called `name`, and its weight, before they are replaced."""
        module = self.model.get_submodule(name)
        self.dense[name] = (module, module.get_parameter("weight"))

    def all(self) -> None:
        for name, (module, weight) in self.dense.items():
            module.register_parameter("weight", weight)
            self.model.set_submodule(name, module)
        forget(self.model, list(self.dense))
        self.dense.clear()


def _packed_layer(module: nn.Module, packed: Packed) -> nn.Module:
    weight = module.get_parameter("weight")
    layer = empty_layer(packed.spec(), bias=module.bias is not None, dtype=weight.dtype, device="meta")
    for key, tensor in packed.tensors().items():
        floats = tensor.is_floating_point()
        values = tensor.detach().to(weight.device, weight.dtype if floats else tensor.dtype)
        if isinstance(getattr(layer, key), nn.Parameter):
            layer.register_parameter(key, nn.Parameter(values, requires_grad=floats and weight.requires_grad))
        else:
            layer.register_buffer(key, values)
    if module.bias is not None:
        layer.bias = module.get_parameter("bias")
    layer.train(module.training)
    return layer.fastest() if isinstance(layer, BitmapLinear) else layer


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{type(model).__name__} has no module {name!r}") from None
