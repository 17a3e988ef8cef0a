"""What a model in memory is known to be made of, so that `save_pretrained` writes it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from pycompress.architectures.description import Architecture
from pycompress.architectures.geometry import Geometry
from pycompress.formats.intact import check_spec
from pycompress.formats.packed import Rounded
from pycompress.hub.config import METHOD, PycompressConfig, Spec
from pycompress.hub.skeleton import SIZES
from pycompress.nn.blocks import KeptRotary
from pycompress.nn.linear import PackedLinear


def compressed_modules(model: nn.Module) -> dict[str, Spec]:
    """The spec of each compressed module by its name; empty for a dense model.

    Rounded weights that have changed since, as by training or by merging adapters, are no longer among them.
    """
    config = own_config(model)
    gone = stale(model)
    return {} if config is None else {n: copy.deepcopy(s) for n, s in config.modules.items() if n not in gone}


def is_recorded(model: nn.Module, name: str) -> bool:
    """Whether the module called `name` is among the `compressed_modules`."""
    config = own_config(model)
    return config is not None and name in config.modules and not stale(model, [name])


def record(model: nn.Module, name: str, spec: Spec) -> None:
    """Note on the model that the module called `name` is compressed, so that `save_pretrained` writes it."""
    check_spec(name, spec)
    config = own_config(model)
    if config is None:
        config = PycompressConfig()
        _own(model, config)
    config.modules[name] = copy.deepcopy(spec)
    if spec["format"] == Rounded.name:
        _hashes(model)[name] = hash_of_weight(model.get_submodule(name).get_parameter("weight"))


def record_blocks(
    model: nn.Module, architecture: Architecture, sizes: list[Geometry], biases: dict[str, list[int]]
) -> None:
    """Note the sizes of each block on a model without packed modules, so that `save_pretrained` writes them.

    `biases`: for a role the blocks whose linear has a bias that transformers' has not.
    """
    blocks: dict[str, Any] = {"architecture": architecture.class_name}
    blocks |= {size: [getattr(block, size) for block in sizes] for size in SIZES}
    _own(model, PycompressConfig(blocks=blocks | {"biases": biases}))


def record_sliced(model: nn.Module, architecture: Architecture, widths: list[int | None]) -> Callable[[], None]:
    """Note the widths of the residual stream on a model without packed modules, so that `save_pretrained` writes them.

    Returns a function that takes the note back.
    """
    before, noted = getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None)
    known = own_config(model)
    sliced = {"architecture": architecture.class_name, "widths": widths}
    _own(model, PycompressConfig(blocks=None if known is None else known.blocks, sliced=sliced))

    def forget() -> None:
        for holder, name, value in ((model, "hf_quantizer", before), (model.config, "quantization_config", noted)):
            if value is not None:
                setattr(holder, name, value)
            else:
                delattr(holder, name)

    return forget


def added_biases(model: nn.Module) -> dict[str, list[int]]:
    """For a role the blocks whose linear has a bias that transformers' has not."""
    config = own_config(model)
    return copy.deepcopy(config.blocks["biases"]) if config is not None and config.blocks is not None else {}


def forget(model: nn.Module, names: list[str]) -> None:
    """Take the record of these modules back; with none left, a model is an ordinary dense one again."""
    config = own_config(model)
    if config is None:
        return
    for name in names:
        config.modules.pop(name, None)
    if names and not config.modules and config.blocks is None and config.sliced is None:
        _unwatch(model)
        del model.hf_quantizer
        if getattr(model.config, "quantization_config", None) is config:
            del model.config.quantization_config  # type: ignore[union-attr]


def check_not_quantized(model: nn.Module) -> None:
    """Raise `ValueError` for a model that another quantization method holds."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = method_of(quantizer) or method_of(config)
    if method is None or method == METHOD:
        return
    drop = "model.hf_quantizer.remove_quantization_config(model)"
    raise ValueError(
        f"the model is quantized with {method}; load its dense weights instead, or, if transformers made them dense "
        f"while loading, drop the record of it: {drop if quantizer else 'del model.config.quantization_config'}"
    )


def _own(model: nn.Module, config: PycompressConfig) -> None:
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.hf_quantizer = AUTO_QUANTIZER_MAPPING[METHOD](config)  # type: ignore[assignment]
    watch(model)


def own_config(model: nn.Module) -> PycompressConfig | None:
    """From the quantizer, not from `model.config`: another model may share that object."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if method_of(quantizer) == METHOD else None


def method_of(holder: Any) -> str | None:
    """The quantization method of a quantizer, of a config object or of a config's dict."""
    holder = getattr(holder, "quantization_config", holder)
    method = holder.get("quant_method") if isinstance(holder, dict) else getattr(holder, "quant_method", None)
    return None if holder is None else str(getattr(method, "value", method))


def check_state(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *_: Any) -> None:
    """Before `load_state_dict` copies anything: `ValueError` for what one of the model's packed layers would refuse."""
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | KeptRotary):
            module.check_loading(state_dict, f"{prefix}{name}." if name else prefix, assign)


def watch(model: nn.Module) -> None:
    _unwatch(model)
    model.register_load_state_dict_pre_hook(check_state)


def _unwatch(model: nn.Module) -> None:
    hooks: dict[int, Any] = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is check_state]:
        del hooks[key]


def _hashes(model: nn.Module) -> dict[str, str]:
    quantizer: Any = model.hf_quantizer
    hashes: dict[str, str] = quantizer.hashes
    return hashes


def stale(model: nn.Module, names: list[str] | None = None) -> list[str]:
    """The modules, of `names` or of all, whose record as rounded no longer holds."""
    config = own_config(model)
    if config is None:
        return []
    hashes = _hashes(model)
    rounded = {name: spec for name, spec in config.modules.items() if spec["format"] == Rounded.name}
    return [
        name
        for name, spec in rounded.items()
        if (names is None or name in names) and not _still_rounded(model, name, spec, hashes.get(name))
    ]


def _still_rounded(model: nn.Module, name: str, spec: Spec, noted: str | None) -> bool:
    """Whether a weight is what it was, or takes as few values a group as the record says."""
    try:
        weight = model.get_submodule(name).weight
    except AttributeError:
        return False
    if not isinstance(weight, Tensor):
        return False
    if weight.is_meta or hash_of_weight(weight) == noted:
        return True
    (n, k), found = spec["shape"], weight.detach()
    found = found.T if isinstance(model.get_submodule(name), Conv1D) else found
    size = n * k // spec["scales"]
    if found.shape != (n, k) or size * spec["scales"] != n * k or k % size or size <= 2 ** spec["bits"]:
        return False  # cannot be told from the values
    steps = found.reshape(-1, size).sort(-1).values.diff() != 0
    return bool((steps.sum(-1) < 2 ** spec["bits"]).all())


@torch.no_grad()
def hash_of_weight(weight: Tensor) -> str:
    if weight.is_meta:
        return ""
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
