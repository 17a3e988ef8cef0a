"""The torch.library namespace of the ops, and who computes what on which device.

Every op has a plain-torch reference as its default, so it works on any device; the native module and Triton
replace it on the CPU and on CUDA when they are there.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pycompress import _ext, storage

LIBRARY = torch.library.Library("pycompress", "DEF")
# Of the kernels' floats, as csrc/cpu/kernels.h numbers them in its enum Dtype.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Tokens from which torch's float32 products on the CPU are faster than the native ones; its 16-bit ones are slower.
PREFILL = 25


def why_no_triton() -> str | None:
    """One phrase on why the Triton kernels cannot be used, or None when they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("pycompress.kernels") is None:
        return "pycompress is not installed, so pycompress.kernels is missing: run `pip install -e .`"
    return None


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """A launcher of `pycompress.kernels` that is imported on its first call, so that CPU use never loads Triton."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"pycompress.kernels.{module}"), function)(*args)

    return launch


def register(
    schema: str,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
) -> Any:
    """Define an op with its reference and fake, plus the `cpu` and `cuda` kernels where those exist."""
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"pycompress::{name}", fake, lib=LIBRARY)
    if _ext.C is not None:
        LIBRARY.impl(name, cpu, "CPU")
    if why_no_triton() is None:
        LIBRARY.impl(name, cuda, "CUDA")
    return getattr(torch.ops.pycompress, name).default


def call(op: Any, cpu: Callable[..., Tensor], *args: Any) -> Tensor:
    """`op(*args)`; without gradients below autograd, or straight its native kernel `cpu` where nobody looks on.

    A layer of a small model takes less time than autograd's part in Python and the dispatcher's.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    gradients = torch.is_grad_enabled()
    if not gradients and _ext.C is not None and not _watched() and all(map(_direct, args)):
        return cpu(*args)
    empty = [arg for arg in args if isinstance(arg, Tensor) and arg.is_meta]
    if empty and not args[0].is_meta:
        raise ValueError(
            f"a tensor of shape {tuple(empty[0].shape)} is on the meta device and holds no values; "
            f"load the model's weights before running it"
        )
    if gradients:
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _direct(arg: Any) -> bool:
    """Whether a kernel may take the argument as it is: no subclass of tensors, and none of another device."""
    return type(arg) in (Tensor, torch.nn.Parameter) and arg.is_cpu if isinstance(arg, Tensor) else True


def _watched() -> bool:
    """Whether calls of ops are recorded, traced or transformed: by a profiler, a dispatch mode, vmap."""
    return bool(
        torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.peek_interpreter_stack()
        or torch._C._autograd._profiler_enabled()
    )


def tokens_of(x: Tensor) -> Tensor:
    """`x [..., K]` as `[M, K]` with contiguous rows; they may be apart."""
    tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return tokens if tokens.stride(1) == 1 else tokens.contiguous()


def native_cuda_built(op: str) -> bool:
    """Whether the native module has a CUDA kernel of this op."""
    return _ext.C is not None and hasattr(_ext.C, f"{op}_cuda")


def check_native_cuda(op: str, x: Tensor) -> None:
    """Raise RuntimeError where the native CUDA kernel of this op was not built, ValueError for an x it cannot take."""
    if not native_cuda_built(op):
        raise RuntimeError(f"the CUDA kernels were not built: {_ext.build_info()['cuda']}")
    if not x.is_cuda or x.dtype not in DTYPE_CODES:
        raise ValueError(f"x must be float32, bfloat16 or float16 on CUDA, got {x.dtype} on {x.device}")


def kernel_in_use(tensor: Tensor) -> str:
    """Name of the kernel that runs for a tensor of this device and dtype, or `reference` and why."""
    has_kernel = tensor.dtype in DTYPE_CODES or tensor.dtype in storage.CODES
    if tensor.device.type == "cpu":
        if _ext.C is None:
            return f"reference ({_ext.why})"
        return f"cpu {_ext.C.isa()}" if has_kernel else f"reference (no native kernel for {tensor.dtype})"
    if tensor.device.type == "cuda":
        reason = why_no_triton()
        if reason is None and not has_kernel:
            reason = f"no triton kernel for {tensor.dtype}"
        return "triton" if reason is None else f"reference ({reason})"
    return f"reference (no kernel for {tensor.device.type})"


def describe(cuda: str | None = None) -> str:
    """One line: which kernels an op has on this installation, for `pycompress info`; on CUDA Triton's unless given."""
    cpu = f"reference ({_ext.why})" if _ext.C is None else " ".join(_ext.C.isas())
    reason = why_no_triton()
    return f"cpu: {cpu}; cuda: {cuda or ('triton' if reason is None else f'reference ({reason})')}"


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics and factorisations are kept in: float64 stays, everything else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def autocasts(tensor: Tensor) -> bool:
    """Whether `torch.autocast` is on for the device of a tensor."""
    device = tensor.device.type
    return (device == "cpu" or torch.amp.is_autocast_available(device)) and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """What `torch.autocast` does to the arguments of `F.linear`: floats but float64 take its dtype."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )
