"""Saving and loading: teaches transformers the quantization method `pycompress`.

After this module is imported, `save_pretrained` writes a compressed model and `AutoModelForCausalLM.from_pretrained`
restores it. `config.json` lists the spec of each compressed module and, where they differ, the sizes of each block; the
tensors lie in the usual safetensors files.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pycompress.formats import Bitmap, Rounded, SharedChannels, Sparse24
from pycompress.groups import Architecture, Geometry
from pycompress.layers import (
    PACKED,
    BitmapLinear,
    KeptRotary,
    KernelLinear,
    SharedLinear,
    SlicedBlock,
    Sparse24Linear,
    ZerosLinear,
)
from pycompress.skeleton import (
    SIZES,
    check_blocks,
    check_products,
    check_rotary,
    check_sliced,
    resize_blocks,
    resolve,
    slice_blocks,
)
from pycompress.sparse import TILE, WORD, kept_entries, tile_offsets, untiled
from pycompress.storage import CODES

METHOD = "pycompress"
FORMAT_VERSION = 3
# Formats whose tensors are stored otherwise than before.
CHANGED_IN = {Sparse24.name: 3, Bitmap.name: 3}
SPEC_FIELDS = {
    SharedChannels.name: {"share", "clusters", "rank", "pivoted", "storage", "shape"},
    Rounded.name: {"bits", "scales", "shape"},
    Sparse24.name: {"shape"},
    Bitmap.name: {"kept", "shape"},
}
# Rounded weights stay in the dense layer.
LAYERS = {SharedChannels.name: SharedLinear, Sparse24.name: Sparse24Linear, Bitmap.name: BitmapLinear}

CODE_FILE = "modeling_pycompress"
LOADING_CODE = '''"""Importing pycompress is all that {class_name} needs to load compressed weights."""

import pycompress  # noqa: F401
from transformers import {class_name}


class Compressed{class_name}({class_name}):
    """A class of its own, because transformers marks the class it finds here as code of this directory."""
'''

Spec = dict[str, Any]


class PycompressConfig(QuantizationConfigMixin):
    """What `config.json` holds of a compressed model.

    `modules` maps the name of each compressed module to its format's `spec()`. `blocks`, where blocks have sizes of
    their own (since format version 2): the `architecture`, a list with one number a block for each of `heads`,
    `kv_heads`, `width`, `rotary` and `mlp` as in `groups.Geometry`, and `biases`, the blocks by role whose linears have
    a bias of their own. `sliced`, where blocks have a residual stream narrower than the hidden size: the `architecture`
    and `widths`, one for each branch that reads the stream and one for the last block's output, null where it is whole.
    Raises `ValueError` for a format version or a format that this pycompress does not know.
    """

    def __init__(
        self,
        modules: dict[str, Spec] | None = None,
        blocks: dict[str, Any] | None = None,
        sliced: dict[str, Any] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = METHOD,
        **unknown: Any,
    ) -> None:
        if not isinstance(format_version, int) or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"the model was saved in pycompress format version {format_version}, this pycompress reads versions "
                f"up to {FORMAT_VERSION}; upgrade it: pip install --upgrade pycompress"
            )
        if unknown:
            raise ValueError(f"unknown fields in the pycompress quantization_config: {', '.join(sorted(unknown))}")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.modules = dict(modules or {})
        for name, spec in self.modules.items():
            _check_spec(name, spec)
            changed = CHANGED_IN.get(spec["format"], 1)
            if format_version < changed:
                raise ValueError(
                    f"{name} was saved in pycompress format version {format_version}, before {spec['format']} got its "
                    f"order of version {changed}; compress the model again"
                )
        self.blocks = copy.deepcopy(blocks)
        if blocks is not None:
            check_blocks(blocks)
        self.sliced = copy.deepcopy(sliced)
        if sliced is not None:
            check_sliced(sliced)

    def to_dict(self) -> dict[str, Any]:
        optional = ("blocks", "sliced")
        return {key: value for key, value in super().to_dict().items() if key not in optional or value is not None}

    def get(self, key: str, default: Any = None) -> Any:
        """A field by name: `from_pretrained(..., config=model.config)` reads this object as the dict it saves as."""
        return getattr(self, key, default)


class PycompressQuantizer(HfQuantizer):
    """Rebuilds compressed modules on the empty model, before transformers reads the weights into it."""

    quantization_config: PycompressConfig

    def __init__(self, quantization_config: PycompressConfig, pre_quantized: bool = True) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._shapes: dict[str, torch.Size] = {}
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
        config.modules = {resolve(model, name): spec for name, spec in config.modules.items()}
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
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        # Where get_new_dtype is missing (5.14, 5.17), transformers leaves a tensor that it renames while loading a
        # pre-quantized model in its saved dtype, whatever dtype was asked for.
        self.pre_quantized = hasattr(HfQuantizer, "get_new_dtype")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.pre_quantized = True
        _check_shapes(model, self._shapes)
        for name in self.quantization_config.modules:
            module = model.get_submodule(name)
            if isinstance(module, PACKED):
                _check_loaded(name, module)
            # Hooks belong to the module they were put on.
            if isinstance(module, BitmapLinear) and not hasattr(module, "_hf_hook"):
                model.set_submodule(name, module.fastest())
        for name, module in model.named_modules():
            if isinstance(module, KeptRotary):
                check_rotary(name, module)
            if isinstance(module, SlicedBlock):
                check_products(name, module)
        # The tensors are ordinary floats that train and cast: without this, transformers forbids .half() and .float().
        model.is_quantized = False  # type: ignore[assignment]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
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


def compressed_modules(model: nn.Module) -> dict[str, Spec]:
    """The spec of each compressed module by its name; empty for a dense model."""
    config = _own_config(model)
    return {} if config is None else copy.deepcopy(config.modules)


def record(model: nn.Module, name: str, spec: Spec) -> None:
    """Note on the model that the module called `name` is compressed, so that `save_pretrained` writes it."""
    _check_spec(name, spec)
    config = _own_config(model)
    if config is None:
        config = PycompressConfig()
        _own(model, config)
    config.modules[name] = copy.deepcopy(spec)


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
    known = _own_config(model)
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
    config = _own_config(model)
    return copy.deepcopy(config.blocks["biases"]) if config is not None and config.blocks is not None else {}


def forget(model: nn.Module, names: list[str]) -> None:
    """Take the record of these modules back; with none left, a model is an ordinary dense one again."""
    config = _own_config(model)
    if config is None:
        return
    for name in names:
        config.modules.pop(name, None)
    if not config.modules and config.blocks is None and config.sliced is None:
        del model.hf_quantizer
        if getattr(model.config, "quantization_config", None) is config:
            del model.config.quantization_config  # type: ignore[union-attr]


def add_loading_code(directory: str | Path) -> None:
    """Let a saved model load where pycompress is installed but not imported, for those who trust its code.

    Adds a module to `directory` that imports pycompress, so that
    `AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)` needs no import. Raises `ValueError`
    unless `save_pretrained` has written a compressed model there.
    """
    file = Path(directory) / "config.json"
    config = json.loads(file.read_text()) if file.exists() else {}
    if _method_of(config.get("quantization_config")) != METHOD:
        raise ValueError(f"{directory} holds no model compressed by pycompress; call model.save_pretrained on it first")
    class_name = config["architectures"][0]
    (file.parent / f"{CODE_FILE}.py").write_text(LOADING_CODE.format(class_name=class_name))
    config["auto_map"] = {"AutoModelForCausalLM": f"{CODE_FILE}.Compressed{class_name}"}
    file.write_text(json.dumps(config, indent=2) + "\n")


def check_not_quantized(model: nn.Module) -> None:
    """Raise `ValueError` for a model that another quantization method holds."""
    quantizer = getattr(model, "hf_quantizer", None)
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    method = _method_of(quantizer) or _method_of(config)
    if method is None or method == METHOD:
        return
    drop = "model.hf_quantizer.remove_quantization_config(model)"
    raise ValueError(
        f"the model is quantized with {method}; load its dense weights instead, or, if transformers made them dense "
        f"while loading, drop the record of it: {drop if quantizer else 'del model.config.quantization_config'}"
    )


def empty_layer(spec: Spec, bias: bool, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Module:
    """The layer that the spec of a packed weight describes, its tensors not yet filled."""
    sizes = {field: spec[field] for field in SPEC_FIELDS[spec["format"]] - {"shape"}}
    made: nn.Module = LAYERS[spec["format"]](shape=tuple(spec["shape"]), **sizes, bias=bias, dtype=dtype, device=device)
    return made


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(N, K)` of an `nn.Linear` or of transformers' `Conv1D`; None for anything else, others' subclasses included."""
    if type(module) is nn.Linear or type(module) is KernelLinear:
        return (module.out_features, module.in_features)
    if type(module) is Conv1D:
        return (module.nf, module.nx)
    return None


def _own(model: nn.Module, config: PycompressConfig) -> None:
    model.config.quantization_config = config  # type: ignore[union-attr]
    model.hf_quantizer = PycompressQuantizer(config)  # type: ignore[assignment]


def _own_config(model: nn.Module) -> PycompressConfig | None:
    """From the quantizer, not from `model.config`: another model may share that object."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if _method_of(quantizer) == METHOD else None


def _method_of(holder: Any) -> str | None:
    """The quantization method of a quantizer, of a config object or of a config's dict."""
    holder = getattr(holder, "quantization_config", holder)
    method = holder.get("quant_method") if isinstance(holder, dict) else getattr(holder, "quant_method", None)
    return None if holder is None else str(getattr(method, "value", method))


def _check_spec(name: str, spec: Spec) -> None:
    format_name = spec.get("format")
    if format_name not in SPEC_FIELDS:
        raise ValueError(
            f"{name} is in format {format_name!r}, this pycompress knows {', '.join(SPEC_FIELDS)}; "
            f"upgrade it: pip install --upgrade pycompress"
        )
    if set(spec) != SPEC_FIELDS[format_name] | {"format"}:
        raise ValueError(
            f"{name}: a {format_name} spec has the fields format, {', '.join(sorted(SPEC_FIELDS[format_name]))}; "
            f"got {', '.join(sorted(spec))}"
        )
    if format_name == SharedChannels.name and spec["share"] not in ("output", "input"):
        raise ValueError(f"{name}: share must be output or input, got {spec['share']!r}")
    if format_name == SharedChannels.name and spec["storage"] not in ("float", *CODES.values()):
        raise ValueError(f"{name}: storage must be float, int8 or int4, got {spec['storage']!r}")


def _check_shapes(model: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """transformers 5.14 and 5.17 take tensors of any shape into a model that has a quantizer."""
    for name, tensor in model.state_dict().items():
        if tensor.shape != shapes.get(name, tensor.shape):
            raise ValueError(
                f"{name} mismatch: {list(tensor.shape)} in the saved files, {list(shapes[name])} by config.json; "
                f"save or download the model again"
            )


def _check_loaded(name: str, layer: nn.Module) -> None:
    """transformers fills tensors it did not find with whatever is in memory, and only warns."""
    tensors = layer.state_dict(keep_vars=True)
    offloaded = any(tensor.is_meta for tensor in tensors.values())  # to disk
    for key, tensor in tensors.items():
        if not tensor.is_meta and not getattr(tensor, "_is_hf_initialized", False):
            raise ValueError(f"the saved files lack {name}.{key}; save or download the model again")
    for key, demand in () if offloaded else _broken(layer):
        raise ValueError(f"{name}.{key} must {demand}; the saved files are damaged")


def _broken(layer: nn.Module) -> Iterator[tuple[str, str]]:
    """Each index tensor of a packed layer that points nowhere, and what it must be."""
    if isinstance(layer, SharedLinear):
        labels, channels = layer.labels, layer.channels
        if labels is not None and not 0 <= int(labels.min()) <= int(labels.max()) < layer.clusters:
            yield "labels", f"be in [0, {layer.clusters})"
        if channels is not None and not torch.equal(channels.cpu().sort().values.long(), torch.arange(len(channels))):
            yield "channels", "be a permutation"
    if isinstance(layer, Sparse24Linear):
        codes = torch.stack([layer.positions & 15, layer.positions >> 4])
        if bool(((codes & 3) >= codes >> 2).any()):
            yield "positions", "name two columns of every four, the first below the second"
    if isinstance(layer, BitmapLinear):
        kept = kept_entries(layer.bitmap)
        starts = tile_offsets(kept)
        if bool(untiled(kept, WORD)[:, layer.in_features :].any()):
            yield "bitmap", f"have no bit past column {layer.in_features - 1}"
        if not torch.equal(layer.offsets.long(), starts) or int(starts[-1]) != len(layer.weight):
            yield "offsets", f"count the bits of every {TILE} rows of the bitmap"


register()
