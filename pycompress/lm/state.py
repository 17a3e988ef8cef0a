"""What a call may not leave changed, and what it may not depend on: of a model, of its modules and of the process."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
# What of a module beside its tensors and children decides how it runs, and may be set on the instance.
ATTRIBUTES = ("forward", "gradient_checkpointing", "_gradient_checkpointing_func")
# What of a config says in which form outputs come.
OUTPUTS = ("use_cache", "return_dict", "output_hidden_states", "output_attentions")
_ABSENT = object()


@contextmanager
def kept(*models: nn.Module) -> Iterator[None]:
    """Put these models and the process back as they were, however the block ends.

    Of every module that is still in its model: train or eval mode, hooks of this package, a forward or gradient
    checkpointing set on the instance. Of every parameter: whether it takes a gradient, and the one it holds. A module
    that took another's place gets its mode. Of the config: in which form outputs come. Of the process: the random
    generators of Python, NumPy and torch, the default dtype, threads, deterministic algorithms, and the precision of
    float32 products.
    """
    with ExitStack() as stack:
        stack.callback(_process())
        for model in models:
            stack.callback(_model(model))
        yield


@contextmanager
def environment_kept() -> Iterator[None]:
    """Put back what a training framework sets of the process: variables, signal handlers, the GPU in use, cuDNN."""
    variables = dict(os.environ)
    main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    cudnn = torch.backends.cudnn
    flags = cudnn.enabled, cudnn.benchmark, cudnn.deterministic
    try:
        yield
    finally:
        for name in os.environ.keys() - variables:
            del os.environ[name]
        os.environ.update(variables)
        for number, handler in handlers.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        if gpu is not None:
            torch.cuda.set_device(gpu)
        cudnn.enabled, cudnn.benchmark, cudnn.deterministic = flags


@contextmanager
def neutral() -> Iterator[None]:
    """Run as in a fresh process: no autocast, float32 by default, gradients on, no inference mode, tensors on the CPU.

    Results do not then depend on what the caller has switched on.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def forwards(modules: Iterable[nn.Module], make: Callable[[nn.Module, Callable[..., Any]], Any]) -> Iterator[None]:
    """Give each module the forward that `make(module, its forward)` returns; one set on the instance comes back."""
    found = list(modules)
    own = [module.__dict__.get("forward", _ABSENT) for module in found]
    try:
        for module in found:
            module.forward = make(module, module.forward)  # type: ignore[method-assign]
        yield
    finally:
        for module, value in zip(found, own, strict=True):
            _set(module, "forward", value)


@contextmanager
def hooked(register: Iterable[Callable[[], Any]]) -> Iterator[None]:
    """Register hooks, each by a call that gives its handle; none is left however the block ends."""
    handles: list[Any] = []
    try:
        for call in register:
            handles.append(call())
        yield
    finally:
        for handle in handles:
            handle.remove()


def user_hooks(module: nn.Module) -> list[Any]:
    """The hooks of a module that are neither this package's nor those by which transformers records outputs."""
    return [hook for kind in HOOKS for hook in getattr(module, kind).values() if not _ours(hook) and not _records(hook)]


def replaced_forward(module: nn.Module) -> bool:
    """Whether the module runs something else than its class's forward: a wrapper, a compiled one."""
    own = module.__dict__.get("forward")
    replaced = own is not None and getattr(own, "__func__", None) is not type(module).forward
    return replaced or getattr(module, "_compiled_call_impl", None) is not None


def _model(model: nn.Module) -> Callable[[], None]:
    """What puts a model back as it is now."""
    modules = dict(model.named_modules())
    training = {name: module.training for name, module in modules.items()}
    attributes = {name: [m.__dict__.get(key, _ABSENT) for key in ATTRIBUTES] for name, m in modules.items()}
    known = {name: {kind: set(getattr(m, kind)) for kind in HOOKS} for name, m in modules.items()}
    parameters = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    outputs = [{key: getattr(config, key) for key in OUTPUTS if hasattr(config, key)} for config in _configs(model)]

    def restore() -> None:
        for name, module in model.named_modules():
            module.training = training.get(name, module.training)
        for name, module in modules.items():
            module.training = training[name]
            for key, value in zip(ATTRIBUTES, attributes[name], strict=True):
                if module.__dict__.get(key, _ABSENT) is not value:
                    _set(module, key, value)
            for kind, before in known[name].items():
                hooks = getattr(module, kind)
                for key in [key for key, hook in hooks.items() if key not in before and _ours(hook)]:
                    del hooks[key]
        for parameter, requires_grad, grad in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        for config, values in zip(_configs(model), outputs, strict=True):
            for key, value in values.items():
                if getattr(config, key, value) != value:
                    setattr(config, key, value)

    return restore


def _configs(model: nn.Module) -> list[Any]:
    """The model's config as it is now, which may be another than before, and that of its decoder."""
    config: Any = getattr(model, "config", None)
    return [] if config is None else [config, config.get_text_config(decoder=True)]


def _process() -> Callable[[], None]:
    """What puts the process back as it is now."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    dtype, threads, precision = torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()

    def restore() -> None:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus is not None:
            torch.cuda.set_rng_state_all(gpus)
        torch.set_default_dtype(dtype)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warns)

    return restore


def _set(module: nn.Module, key: str, value: Any) -> None:
    if value is _ABSENT:
        module.__dict__.pop(key, None)
    else:
        module.__dict__[key] = value


def _module_of(hook: Any) -> str:
    return str(getattr(getattr(hook, "func", hook), "__module__", "") or "")


def _ours(hook: Any) -> bool:
    return _module_of(hook).split(".")[0] == "pycompress"


def _records(hook: Any) -> bool:
    return _module_of(hook).startswith("transformers.utils.")
