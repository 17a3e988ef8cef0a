"""The weight `[N, K]` of a linear, however its module stores it."""

from __future__ import annotations

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pycompress.nn.linear import KernelLinear


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of an `nn.Linear` or of transformers' `Conv1D` as `[N, K]`, detached and contiguous.

    Shares memory with the module where its layout allows. Raises `ValueError` for other modules.
    """
    shape = linear_shape(module)
    if shape is None:
        raise ValueError(not_a_linear(module))
    weight = module.get_parameter("weight").detach()
    return (weight if isinstance(module, nn.Linear) else weight.T).contiguous()


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(N, K)` of an `nn.Linear` or of transformers' `Conv1D`; None for anything else, others' subclasses included."""
    if type(module) is nn.Linear or type(module) is KernelLinear:
        return (module.out_features, module.in_features)
    if type(module) is Conv1D:
        return (module.nf, module.nx)
    return None


def assign(module: nn.Module, value: Tensor) -> Tensor:
    """Give a linear the weight `value [N, K']`, as a parameter of its own: a shrunk model shares what stays whole.

    Gives the weight as it is stored, `[N, K']` in the module's dtype.
    """
    weight = module.get_parameter("weight")
    stored = (value if isinstance(module, nn.Linear) else value.T).to(weight).contiguous()
    module.register_parameter("weight", nn.Parameter(stored, requires_grad=weight.requires_grad))
    return stored if isinstance(module, nn.Linear) else stored.T


def not_a_linear(module: nn.Module) -> str:
    """The sentence for a module that is none."""
    return (
        f"{type(module).__name__} is neither torch.nn.Linear nor transformers' Conv1D; "
        f"load the model without quantization, adapters or parametrizations"
    )
