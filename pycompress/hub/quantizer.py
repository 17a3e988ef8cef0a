"""Loading: rebuilds compressed modules on the empty model, before transformers reads the weights into it."""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from pycompress._brief import brief
from pycompress.formats.packed import Rounded
from pycompress.hub.config import METHOD, PycompressConfig, Spec
from pycompress.hub.record import forget, hash_of_weight, own_config, stale, watch
from pycompress.hub.skeleton import resize_blocks, resolver, slice_blocks
from pycompress.nn.blocks import KeptRotary
from pycompress.nn.linear import LAYERS, BitmapLinear, PackedLinear, ZerosLinear, empty_layer
from pycompress.nn.weights import linear_shape

SAFETENSORS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
}


class PycompressQuantizer(HfQuantizer):
    """Rebuilds compressed modules on the empty model, before transformers reads the weights into it."""

    quantization_config: PycompressConfig

    def __init__(self, quantization_config: PycompressConfig, pre_quantized: bool = True) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._empty: dict[str, Tensor] = {}
        # Of each rounded weight, when it was noted.
        self.hashes: dict[str, str] = {}
        if not pre_quantized:
            raise ValueError(
                "PycompressConfig describes a saved model and cannot compress one; load the model without it and call "
                "pycompress.apply(model, recipe)"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        config = self.quantization_config
        if config.blocks is not None:
            resize_blocks(model, config.blocks)
        if config.sliced is not None:
            slice_blocks(model, config.sliced)
        config.modules = _resolved(model, config.modules)
        for name, spec in config.modules.items():
            module = model.get_submodule(name)
            if linear_shape(module) != tuple(spec["shape"]):
                raise ValueError(
                    f"config.json says {name} is {spec['shape']}, but {type(model).__name__} builds "
                    f"{list(linear_shape(module) or ())} there; config.json does not belong to this model"
                )
            if spec["format"] in LAYERS:
                weight = module.get_parameter("weight")
                layer = empty_layer(spec, module.bias is not None, weight.dtype, weight.device)
                model.set_submodule(name, layer)
        self._empty = {name: tensor.to("meta") for name, tensor in model.state_dict().items()}
        _check_headers(model, kwargs.get("checkpoint_files"))
        watch(model)
        # Where get_new_dtype is missing (5.14, 5.17), transformers leaves a tensor that it renames while loading a
        # pre-quantized model in its saved dtype, whatever dtype was asked for.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.pre_quantized = True
        _check_kinds(model, self._empty)
        for name, spec in self.quantization_config.modules.items():
            module = model.get_submodule(name)
            if isinstance(module, PackedLinear):
                _check_loaded(name, module)
            if spec["format"] == Rounded.name:
                self.hashes[name] = hash_of_weight(module.get_parameter("weight"))
            # Hooks belong to the module they were put on.
            if isinstance(module, BitmapLinear) and not hasattr(module, "_hf_hook"):
                model.set_submodule(name, module.fastest())
        for name, module in model.named_modules():
            if isinstance(module, KeptRotary):
                _check_loaded(name, module)
        # The tensors are ordinary floats that train and cast: without this, transformers forbids .half() and .float().
        model.is_quantized = False  # type: ignore[assignment]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        forget(model, stale(model))
        if own_config(model) is None:
            return None, {}
        for name, spec in self.quantization_config.modules.items():
            module = model.get_submodule(name)
            # Rounding to 16 bits after training may have made further zeros.
            if isinstance(module, ZerosLinear):
                spec["kept"] = int(module.weight.count_nonzero())
        # Models may share one config object; the one being saved writes its own modules.
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        return None, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Make transformers load and save pycompress models; again after a reload, with the newest classes."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    register_quantization_config(METHOD)(PycompressConfig)
    register_quantizer(METHOD)(PycompressQuantizer)


def _resolved(model: nn.Module, modules: dict[str, Spec]) -> dict[str, Spec]:
    resolve, found = resolver(model), {}
    for name, spec in modules.items():
        own = resolve(name)
        if own in found:
            raise ValueError(f"config.json lists the module {brief(own)} twice; config.json is damaged")
        found[own] = spec
    return found


def _check_headers(model: nn.Module, files: list[str] | None) -> None:
    """Before anything is allocated: whether the saved files hold the tensors that config.json describes."""
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return
    held: dict[str, Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            held |= {name: _header(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
    prefix, base, missing = f"{getattr(model, 'base_model_prefix', '')}.", _expected(model), 0
    given: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        found = next((held[n] for n in (name, name.removeprefix(prefix), prefix + name) if n in held), None)
        if found is None:
            missing += tensor.numel()
        elif name.startswith(base):
            _check_kind(name, found, tensor)
            given[name] = found
    numbers = sum(tensor.numel() for tensor in held.values())
    if missing > 2 * numbers:  # tensors that are renamed while loading, or tied, are in the files
        raise ValueError(
            f"the saved files lack {missing} of the numbers that config.json describes, and hold {numbers}; save or "
            f"download the model again"
        )
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | KeptRotary):
            module.check_loading(given, f"{name}.")


def _expected(model: nn.Module) -> str:
    """What the names of those tensors begin with that the saved files must hold: a head may be a new one."""
    names = getattr(model.config, "architectures", None) or ()
    prefix = getattr(model, "base_model_prefix", "")
    return "" if type(model).__name__ in names or not hasattr(model, prefix) else f"{prefix}."


def _header(part: Any) -> Tensor:
    """An empty tensor of the dtype and shape that a safetensors file names."""
    dtype = SAFETENSORS.get(part.get_dtype())
    if dtype is None:
        raise ValueError(
            f"the saved files hold a tensor of {part.get_dtype()}, which no compressed model has; save it again"
        )
    return torch.empty(part.get_shape(), dtype=dtype, device="meta")


def _check_kinds(model: nn.Module, empty: dict[str, Tensor]) -> None:
    """transformers takes tensors of any shape and dtype into a model that has a quantizer, and fills what is missing
    with random numbers."""
    base = _expected(model)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in empty:
            loaded = tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)
            if not loaded and name.startswith(base):
                raise ValueError(f"the saved files lack {name}; save or download the model again")
            _check_kind(name, tensor, empty[name])


def _check_kind(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape:
        raise ValueError(
            f"{name} mismatch: {list(found.shape)} in the saved files, {list(expected.shape)} by config.json; "
            f"save or download the model again"
        )
    if found.dtype != expected.dtype and not (found.is_floating_point() and expected.is_floating_point()):
        raise ValueError(
            f"{name} is {found.dtype} in the saved files, {expected.dtype} by config.json; save or download the model "
            f"again"
        )


def _check_loaded(name: str, layer: PackedLinear | KeptRotary) -> None:
    elsewhere = [key for key, tensor in layer.state_dict(keep_vars=True).items() if tensor.is_meta]
    try:
        layer.check(name, _offloaded(layer, elsewhere))
    except ValueError as error:
        raise ValueError(f"{error}; the saved files are damaged") from error


def _offloaded(layer: nn.Module, keys: list[str]) -> dict[str, Tensor]:
    """What accelerate will put in the place of tensors it has left on disk."""
    hook = getattr(layer, "_hf_hook", None)
    maps = [getattr(each, "weights_map", None) for each in getattr(hook, "hooks", (hook,))]
    return {key: weights[key] for weights in maps if weights is not None for key in keys}
