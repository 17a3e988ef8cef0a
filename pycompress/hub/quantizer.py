"""Saving and loading: teaches transformers the quantization method `pycompress`.

After this module is imported, `save_pretrained` writes a compressed model and `AutoModelForCausalLM.from_pretrained`
restores it. `config.json` lists the spec of each compressed module and, where they differ, the sizes of each block; the
tensors lie in the usual safetensors files.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pycompress.architectures.supported import Architecture, Geometry
from pycompress.brief import brief, listed
from pycompress.files import write_whole
from pycompress.formats import Bitmap, Rounded, SharedChannels, Sparse24
from pycompress.intact import FIELDS, check_spec
from pycompress.layers import (
    BitmapLinear,
    KeptRotary,
    KernelLinear,
    PackedLinear,
    SharedLinear,
    Sparse24Linear,
    ZerosLinear,
)
from pycompress.skeleton import (
    SIZES,
    check_blocks,
    check_sliced,
    resize_blocks,
    resolver,
    slice_blocks,
)

METHOD = "pycompress"
FORMAT_VERSION = 3
# More than any model has; config.json is read before the model is there to say.
MOST_MODULES = 1 << 16
LONGEST_NAME = 500
# Formats whose tensors are stored otherwise than before.
CHANGED_IN = {Sparse24.name: 3, Bitmap.name: 3}
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
    Raises `ValueError` for what no `save_pretrained` of this pycompress or an earlier one writes.
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
        counts = isinstance(format_version, int) and not isinstance(format_version, bool)
        if not counts or not 1 <= format_version <= FORMAT_VERSION:
            raise ValueError(
                f"the model was saved in pycompress format version {brief(format_version)}, this pycompress reads "
                f"versions up to {FORMAT_VERSION}; upgrade it: pip install --upgrade pycompress"
            )
        if unknown:
            raise ValueError(f"unknown fields in the pycompress quantization_config: {listed(sorted(unknown))}")
        if not isinstance(modules, dict | None):
            raise ValueError(
                f"modules in the pycompress quantization_config must map names to specs, got {brief(modules)}"
            )
        if modules and len(modules) > MOST_MODULES:
            raise ValueError(
                f"config.json lists {len(modules)} compressed modules, allowed are {MOST_MODULES}; it is damaged"
            )
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.modules = dict(modules or {})
        for name, spec in self.modules.items():
            if not isinstance(name, str) or len(name) > LONGEST_NAME:
                raise ValueError(f"config.json must list modules by their names, got {brief(name)}")
            check_spec(name, spec)
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
        _watch(model)
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
                self.hashes[name] = _hash(module.get_parameter("weight"))
            # Hooks belong to the module they were put on.
            if isinstance(module, BitmapLinear) and not hasattr(module, "_hf_hook"):
                model.set_submodule(name, module.fastest())
        for name, module in model.named_modules():
            if isinstance(module, KeptRotary):
                _check_loaded(name, module)
        # The tensors are ordinary floats that train and cast: without this, transformers forbids .half() and .float().
        model.is_quantized = False  # type: ignore[assignment]

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, str]]:
        forget(model, _stale(model))
        if _own_config(model) is None:
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


def compressed_modules(model: nn.Module) -> dict[str, Spec]:
    """The spec of each compressed module by its name; empty for a dense model.

    Rounded weights that have changed since, as by training or by merging adapters, are no longer among them.
    """
    config = _own_config(model)
    stale = _stale(model)
    return {} if config is None else {n: copy.deepcopy(s) for n, s in config.modules.items() if n not in stale}


def is_recorded(model: nn.Module, name: str) -> bool:
    """Whether the module called `name` is among the `compressed_modules`."""
    config = _own_config(model)
    return config is not None and name in config.modules and not _stale(model, [name])


def record(model: nn.Module, name: str, spec: Spec) -> None:
    """Note on the model that the module called `name` is compressed, so that `save_pretrained` writes it."""
    check_spec(name, spec)
    config = _own_config(model)
    if config is None:
        config = PycompressConfig()
        _own(model, config)
    config.modules[name] = copy.deepcopy(spec)
    if spec["format"] == Rounded.name:
        _hashes(model)[name] = _hash(model.get_submodule(name).get_parameter("weight"))


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
    if names and not config.modules and config.blocks is None and config.sliced is None:
        _unwatch(model)
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
    try:
        config = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or _method_of(config.get("quantization_config")) != METHOD:
        raise ValueError(f"{directory} holds no model compressed by pycompress; call model.save_pretrained on it first")
    architectures = config.get("architectures")
    class_name = architectures[0] if isinstance(architectures, list) and architectures else None
    known = (
        getattr(transformers, class_name, None) if isinstance(class_name, str) and class_name.isidentifier() else None
    )
    if not isinstance(known, type) or not issubclass(known, transformers.PreTrainedModel):
        raise ValueError(
            f"architectures in {file} must name a model class of transformers, got {brief(architectures)}; save the "
            f"model again"
        )
    write_whole(file.parent / f"{CODE_FILE}.py", LOADING_CODE.format(class_name=class_name).encode())
    config["auto_map"] = {"AutoModelForCausalLM": f"{CODE_FILE}.Compressed{class_name}"}
    write_whole(file, f"{json.dumps(config, indent=2)}\n".encode())


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
    sizes = {field: spec[field] for field in FIELDS[spec["format"]] if field != "shape"}
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
    _watch(model)


def _own_config(model: nn.Module) -> PycompressConfig | None:
    """From the quantizer, not from `model.config`: another model may share that object."""
    quantizer: Any = getattr(model, "hf_quantizer", None)
    return quantizer.quantization_config if _method_of(quantizer) == METHOD else None


def _method_of(holder: Any) -> str | None:
    """The quantization method of a quantizer, of a config object or of a config's dict."""
    holder = getattr(holder, "quantization_config", holder)
    method = holder.get("quant_method") if isinstance(holder, dict) else getattr(holder, "quant_method", None)
    return None if holder is None else str(getattr(method, "value", method))


def _resolved(model: nn.Module, modules: dict[str, Spec]) -> dict[str, Spec]:
    resolve, found = resolver(model), {}
    for name, spec in modules.items():
        own = resolve(name)
        if own in found:
            raise ValueError(f"config.json lists the module {brief(own)} twice; config.json is damaged")
        found[own] = spec
    return found


def check_state(model: nn.Module, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, *_: Any) -> None:
    """Before `load_state_dict` copies anything: `ValueError` for what one of the model's packed layers would refuse."""
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    for name, module in model.named_modules():
        if isinstance(module, PackedLinear | KeptRotary):
            module.check_loading(state_dict, f"{prefix}{name}." if name else prefix, assign)


def _watch(model: nn.Module) -> None:
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


def _stale(model: nn.Module, names: list[str] | None = None) -> list[str]:
    """The modules, of `names` or of all, whose record as rounded no longer holds."""
    config = _own_config(model)
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
    if weight.is_meta or _hash(weight) == noted:
        return True
    (n, k), found = spec["shape"], weight.detach()
    found = found.T if isinstance(model.get_submodule(name), Conv1D) else found
    size = n * k // spec["scales"]
    if found.shape != (n, k) or size * spec["scales"] != n * k or k % size or size <= 2 ** spec["bits"]:
        return False  # cannot be told from the values
    steps = found.reshape(-1, size).sort(-1).values.diff() != 0
    return bool((steps.sum(-1) < 2 ** spec["bits"]).all())


@torch.no_grad()
def _hash(weight: Tensor) -> str:
    if weight.is_meta:
        return ""
    digest = hashlib.sha256(f"{weight.dtype} {list(weight.shape)}".encode())
    digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


register()
