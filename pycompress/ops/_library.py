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
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

from pycompress import _ext
from pycompress.formats import codes

LIBRARY = torch.library.Library("pycompress", "DEF")
# Of the kernels' floats, as csrc/cpu/kernels.h numbers them in its enum Dtype.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Tokens from which torch's float32 products on the CPU are faster than the native ones; its 16-bit ones are slower.
PREFILL = 25
DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
# Asked once: `torch.compile` cannot trace the question.
AUTOCAST_DEVICES = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device)
)
_references: dict[Any, Callable[..., Any]] = {}


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
    check: Callable[..., None],
    check_values: Callable[..., None] | None = None,
) -> Any:
    """Define an op with its reference and fake, plus the `cpu` and `cuda` kernels where those exist.

    `check` takes the op's arguments before any of them computes, `check_values` also where index tensors have values;
    `cpu` calls both itself, as far as the native module does not check.
    """
    name = schema.split("(")[0]
    checks = [each for each in (check, check_values) if each is not None]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _without_tangents(name, _checked(reference, checks)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"pycompress::{name}", _checked(fake, [check]), lib=LIBRARY)
    if _ext.C is not None:
        LIBRARY.impl(name, _without_tangents(name, cpu), "CPU")
    if why_no_triton() is None:
        LIBRARY.impl(name, _without_tangents(name, _checked(cuda, checks)), "CUDA")
    op = getattr(torch.ops.pycompress, name).default
    _references[op] = _checked(reference, checks)
    return op


def _checked(compute: Callable[..., Any], checks: list[Callable[..., None]]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        for check in checks:
            check(*args)
        return compute(*args)

    return run


def _without_tangents(name: str, compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute`, which has no forward-mode derivative and would drop tangents in silence."""

    def run(*args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(arg) for arg in args):
            raise NotImplementedError(
                f"torch.ops.pycompress.{name} has no forward-mode derivative: call the function of pycompress.ops"
            )
        return compute(*args)

    return run


def _has_tangent(arg: Any) -> bool:
    return isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None


def call(op: Any, cpu: Callable[..., Tensor], *args: Any) -> Tensor:
    """`op(*args)`; without gradients below autograd, or straight its native kernel `cpu` where nobody looks on.

    A layer of a small model takes less time than autograd's part in Python and the dispatcher's. Derivatives that
    autograd knows of no op, those of forward mode and of functorch, are those of the reference.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    if torch.is_grad_enabled() or _watched():
        return _references[op](*args) if _transformed() else dispatch(op, *args)
    if _ext.C is not None and all(map(_direct, args)):
        return cpu(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return dispatch(op, *args)


def _transformed() -> bool:
    """Whether a derivative is taken by forward mode or by functorch."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return forward_ad._current_level >= 0 or any(each.key() in DERIVATIVES for each in stack)


def dispatch(op: Any, *args: Any) -> Any:
    """`op(*args)`, with TypeError and ValueError instead of the dispatcher's RuntimeError for what is no tensor."""
    if not torch.compiler.is_compiling():
        for argument, given in zip(op._schema.arguments, args, strict=True):
            _check_argument(argument.name, str(argument.real_type), given)
    return op(*args)


def _check_argument(name: str, kind: str, given: Any) -> None:
    if isinstance(given, Tensor) or (given is None and kind.startswith("Optional")) or has_torch_function((given,)):
        return
    if kind == "int" and isinstance(given, (int, torch.SymInt)) and not isinstance(given, bool):
        if isinstance(given, int) and not -(1 << 63) <= given < 1 << 63:
            raise ValueError(f"{name} must fit in 64 bits, got {given}")
    elif kind in ("int", "bool", "Tensor", "Optional[Tensor]") and not (kind == "bool" and isinstance(given, bool)):
        wanted = {"int": "an integer", "bool": "a bool"}.get(kind, "a tensor")
        raise TypeError(f"{name} must be {wanted}, got {type(given).__name__}")


def _direct(arg: Any) -> bool:
    """Whether a kernel may take the argument as it is: no subclass of tensors, none of another device or layout."""
    kind = type(arg)
    if kind is Tensor or kind is torch.nn.Parameter:
        return arg.is_cpu and arg.layout is torch.strided
    return arg is None or kind is bool


def _watched() -> bool:
    """Whether calls of ops are recorded, traced or transformed: by a mode, a tracer, functorch, a profiler.

    Whatever sees every op has a key of its own among those that the dispatcher adds to a tensor's.
    """
    return bool(
        torch._C._dispatch_tls_local_include_set().raw_repr() not in QUIET
        or torch._C._is_torch_function_mode_enabled()
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
    )


def _quiet() -> frozenset[int]:
    """The keys that the dispatcher adds where nobody looks on, in and out of inference mode."""
    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            found.append(torch._C._dispatch_tls_local_include_set().raw_repr())
    return frozenset(found)


QUIET = _quiet()


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
    has_kernel = tensor.dtype in DTYPE_CODES or tensor.dtype in codes.CODES
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
    if not isinstance(tensor, Tensor):
        return False
    device = tensor.device.type
    return device in AUTOCAST_DEVICES and torch.is_autocast_enabled(device)


def autocast(*tensors: Any) -> tuple[Any, ...]:
    """What `torch.autocast` does to the arguments of `F.linear`: floats but float64 take its dtype."""
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(
        t if t is None or not t.is_floating_point() or t.dtype == torch.float64 else t.to(dtype) for t in tensors
    )
