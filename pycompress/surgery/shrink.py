"""Shrinks a model to a subnet: smaller matrices, fewer blocks. Only it, rotate.py and replace.py change a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pycompress.architectures.description import Architecture
from pycompress.architectures.geometry import Geometry
from pycompress.architectures.model import KEPT_ROTARY, architecture_of, blocks, frequencies, geometry, rotary_channels
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.hub.record import added_biases, check_not_quantized, compressed_modules, record_blocks
from pycompress.hub.skeleton import SIZES
from pycompress.nn.blocks import SlicedBlock
from pycompress.nn.resize import OwnConfig, resize, scaled_norm
from pycompress.nn.weights import linear_shape
from pycompress.surgery.replace import check_own

# New weight `[N', K']`, or `[width]` of a norm, and bias `[N']` or None for the one that is there.
Weights = Mapping[str, tuple[Tensor, Tensor | None]]


def plain_config(model: nn.Module, subnet: Subnet) -> Any:
    """The config by which transformers alone builds `model` shrunk to `subnet`.

    It exists where every block keeps the same sizes and the class reads them from its config. Raises `ValueError`, with
    the reason, where it does not: such a model is saved with the sizes of each block, and loads where pycompress is
    imported. Kept rotary pairs are written as `longrope` factors of their own frequencies.
    """
    return _Shrinking(model, subnet, {}).plain_config()


@torch.no_grad()
def shrink(
    model: nn.Module, subnet: Subnet, weights: Weights | None = None, *, plain: bool | None = None
) -> Callable[[], None]:
    """Shrink `model` to `subnet` in place; returns a function that puts the model back as it was.

    That function holds the dense weights: drop it to free them. The result computes what the dense model does without
    the contributions of what was removed: of MLP channels, of value channels, of products of query and key channels, of
    heads and blocks. Norms over queries and keys are scaled for the channels they lack. `weights` gives new values, by
    the name a linear or such a norm has in the dense model, in the shrunk shape; the softmax scale of the dense head
    width is folded into queries afterwards. `plain`: True raises where `plain_config` does, False stores each block's
    sizes in any case, None takes what is possible.

    Raises `ValueError` for a subnet or weights that do not fit, for a model with packed modules, hooks in a block or
    tied block weights, leaving it as it was.
    """
    work = _Shrinking(model, subnet, dict(weights or {}))
    config = None
    if plain is not False:
        try:
            config = work.plain_config()
        except ValueError:
            if plain:
                raise
    return work.apply(config)


class _Shrinking:
    """One model on its way to a subnet. Nothing of the model changes before `apply` has built every new block."""

    def __init__(self, model: nn.Module, subnet: Subnet, weights: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        self.model, self.subnet, self.weights = model, subnet, weights
        self.architecture: Architecture = architecture_of(model)
        self.config: Any = model.config
        self.before = self._check()
        self.after = [self.before[i].kept(self._kept(i)) for i in subnet.kept_blocks]
        self.rotary = [self._rotary(i) for i in subnet.kept_blocks]
        self.biases = self._biases()

    def plain_config(self) -> Any:
        different = [size for size in SIZES if len({getattr(block, size) for block in self.after}) > 1]
        if different:
            raise ValueError(f"the blocks differ in {', '.join(different)}; one config.json has one size for all")
        if self.biases:
            raise ValueError(f"{self.config.model_type} has no biases on {', '.join(self.biases)}")
        first, architecture = self.after[0], self.architecture
        config = self._config()
        setattr(config, architecture.intermediate, first.mlp)
        if (first.heads, first.width) != (getattr(config, architecture.heads), self._config_width()):
            setattr(config, architecture.heads, first.heads)
            if architecture.kv_heads is not None:
                setattr(config, architecture.kv_heads, first.kv_heads)
            config.head_dim = first.width
        if architecture.rotary is not None:
            config.rope_parameters = self._rope_parameters(config)
        self._check_builds(config)
        return config

    def apply(self, config: Any) -> Callable[[], None]:
        plain = config is not None
        config = config if plain else self._config()
        made = nn.ModuleList(self._block(new, config, plain) for new in range(len(self.after)))
        return self._commit(made, config, plain)

    def _check(self) -> list[Geometry]:
        check_not_quantized(self.model)
        if compressed_modules(self.model):
            raise ValueError("the model has packed modules; shrink the dense model first, then pack it")
        if any(isinstance(block, SlicedBlock) for block in blocks(self.model)):
            raise ValueError("the model's blocks are sliced; shrink the dense model first, then slice it")
        found = blocks(self.model)
        if len(self.subnet.blocks) != len(found):
            raise ValueError(f"the subnet has {len(self.subnet.blocks)} blocks, the model {len(found)}")
        check_untied(self.model, self.architecture.blocks)
        check_free(self.model)
        sizes = [geometry(self.model, block) for block in range(len(found))]
        for block in self.subnet.kept_blocks:
            try:
                sizes[block].check(self._kept(block))
            except ValueError as error:
                raise ValueError(f"block {block}: {error}") from error
        self._check_weights(sizes)
        return sizes

    def _check_weights(self, sizes: list[Geometry]) -> None:
        fits: dict[str, tuple[int, ...]] = {}
        for block in self.subnet.kept_blocks:
            shapes = sizes[block].shapes(self._kept(block))
            fits |= {self._name(block, self.architecture.paths[role]): shape for role, shape in shapes.items()}
            width = sizes[block].kept(self._kept(block)).width
            fits |= {self._name(block, norm): (width,) for norm in self.architecture.head_norms}
        for name, (weight, bias) in self.weights.items():
            if name not in fits:
                raise ValueError(f"weights name {name!r}, which is no linear or head norm of a kept block")
            if tuple(weight.shape) != fits[name]:
                raise ValueError(f"{name} is {list(fits[name])} in the subnet, its given weight {list(weight.shape)}")
            if bias is not None and tuple(bias.shape) != fits[name][:1]:
                raise ValueError(f"{name} has {fits[name][0]} outputs, its given bias is {list(bias.shape)}")
            if bias is not None and len(fits[name]) == 1:
                raise ValueError(f"{name} is a norm without a bias; give None")

    def _kept(self, block: int) -> Kept:
        kept = self.subnet.blocks[block]
        assert kept is not None
        return kept

    def _name(self, block: int, path: str) -> str:
        return f"{self.architecture.blocks}.{block}.{path}"

    def _rotary(self, block: int) -> Tensor:
        """Channels of the model's rotary embedding that a block keeps."""
        channels, qk = rotary_channels(self.model, block), self._kept(block).qk
        return channels if qk is None else channels[qk[0][qk[0] < len(channels)]]

    def _biases(self) -> dict[str, list[int]]:
        """For a role the new blocks whose linear gets a bias that transformers' has not."""
        known = added_biases(self.model)
        found: dict[str, list[int]] = {}
        for new, block in enumerate(self.subnet.kept_blocks):
            for role in self.architecture.roles:
                name = self._name(block, self.architecture.paths[role])
                given = name in self.weights and self.weights[name][1] is not None
                bare = self.model.get_submodule(name).bias is None
                if (given and bare) or block in known.get(role, []):
                    found.setdefault(role, []).append(new)
        return found

    def _config(self) -> Any:
        """A copy of the model's config, for the blocks that stay."""
        config = copy.deepcopy(self.config)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        if self.subnet.depth < len(self.before):
            if getattr(config, "layer_types", None):
                config.layer_types = [config.layer_types[block] for block in self.subnet.kept_blocks]
            config.num_hidden_layers = self.subnet.depth
        return config

    def _config_width(self) -> int:
        """The width of heads that the model's config says."""
        heads = getattr(self.config, self.architecture.heads)
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // heads

    def _rope_parameters(self, config: Any) -> Any:
        """Those of the model, or where pairs are missing the factors of the frequencies that are left."""
        found: Any = copy.deepcopy(self.config.rope_parameters)
        nested = bool(set(found) & set(getattr(config, "layer_types", None) or ()))
        kinds: list[str] = config.layer_types if nested else [""] * len(self.after)
        for kind in dict.fromkeys(kinds):
            sets = [channels for channels, other in zip(self.rotary, kinds, strict=True) if other == kind]
            if any(not torch.equal(channels, sets[0]) for channels in sets):
                raise ValueError("the blocks keep different rotary pairs; one config.json has one set for all")
            own = found[kind] if nested else found
            own |= self._rope_changes(own, kind, kinds.index(kind))
        return found

    def _rope_changes(self, parameters: dict[str, Any], kind: str, new: int) -> dict[str, Any]:
        """Fields of rope parameters by which the new block `new`, like all of its kind, rotates what it keeps."""
        block, size, pairs = self.subnet.kept_blocks[new], self.after[new], len(self.rotary[new]) // 2
        changes: dict[str, Any] = {}
        partial = size.rotary != size.width or "partial_rotary_factor" in parameters
        if partial and size.width != self._config_width():
            changes["partial_rotary_factor"] = _fraction(size.rotary, size.width)
        embedding = self._fresh_rotary(self.config)
        have = frequencies(embedding, self.config, block)
        if pairs == len(have):
            return changes
        if parameters["rope_type"] in ("dynamic", "longrope"):
            raise ValueError(f"{parameters['rope_type']} rotary frequencies depend on the length of the text")
        names = ("attention_scaling", f"{kind}_attention_scaling")
        factors = _reciprocals(have[self.rotary[new][:pairs]])
        parameters.clear()
        return changes | {
            "rope_type": "longrope",
            "rope_theta": 1.0,
            "short_factor": factors,
            "long_factor": factors,
            "factor": 1.0,
            "attention_factor": float(next(getattr(embedding, name) for name in names if hasattr(embedding, name))),
            "original_max_position_embeddings": self.config.max_position_embeddings,
        }

    def _fresh_rotary(self, config: Any) -> nn.Module:
        """The rotary embedding of a config, in float32 on the CPU: the model's own may have been cast."""
        assert self.architecture.rotary is not None
        with torch.device("cpu"):
            return type(self.model.get_submodule(self.architecture.rotary))(config)

    def _check_builds(self, config: Any) -> None:
        """Whether transformers builds these blocks from that config, as from its saved file."""
        try:
            read = type(config).from_dict(config.to_dict())
            with torch.device("meta"):
                built: Any = type(self.model)(read)
        except Exception as error:
            raise ValueError(f"transformers' {type(config).__name__} refuses these sizes ({error})") from error
        for made, size in zip(blocks(built), self.after, strict=True):
            for role, shape in size.shapes(Kept()).items():
                if linear_shape(made.get_submodule(self.architecture.paths[role])) != shape:
                    raise ValueError(
                        f"{type(config).__name__} has no field for the width of heads, so {role} cannot be "
                        f"{list(shape)}; keep all heads and all of their channels"
                    )
        if self.architecture.rotary is not None:
            embedding, old = self._fresh_rotary(read), self._fresh_rotary(self.config)
            for new, block in enumerate(self.subnet.kept_blocks):
                expected = frequencies(old, self.config, block)[self.rotary[new][: len(self.rotary[new]) // 2]]
                found = frequencies(embedding, read, new)
                if found.shape != expected.shape or not torch.allclose(found, expected, rtol=1e-6):
                    raise ValueError(f"{type(config).__name__} cannot say which rotary frequencies are kept")

    def _block(self, new: int, config: Any, plain: bool) -> nn.Module:
        """The block that is left, sharing the tensors that stay as they are."""
        index = self.subnet.kept_blocks[new]
        old = blocks(self.model)[index]
        block = twin(old, self.config, config)
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = new  # type: ignore[assignment]
        size, rotary = self.after[new], self.rotary[new]
        whole = len(rotary) if plain else self._whole_rotary(index)
        biases = [role for role, having in self.biases.items() if new in having]
        resize(block, self.architecture, config, size, index=new, rotary=whole, biases=biases)
        for role in self.architecture.roles:
            path = self.architecture.paths[role]
            given = self.weights.get(self._name(index, path))
            self._fill(role, old.get_submodule(path), block.get_submodule(path), index, given)
        attention = block.get_submodule(self.architecture.attention)
        if hasattr(attention, KEPT_ROTARY):
            device = next(attention.parameters()).device
            attention.get_submodule(KEPT_ROTARY).register_buffer("channels", rotary.to(device, torch.int32))
        self._scale(index, old, block, size)
        return block

    def _whole_rotary(self, block: int) -> int:
        if self.architecture.rotary is None:
            return 0
        embedding = self.model.get_submodule(self.architecture.rotary)
        return 2 * len(frequencies(embedding, self.config, block))

    def _fill(
        self, role: str, old: nn.Module, new: nn.Module, block: int, given: tuple[Tensor, Tensor | None] | None
    ) -> None:
        """Give the linear `new` its rows and columns of `old`, or what the caller gave."""
        if new.weight is old.weight and given is None:
            return
        kept, size = self._kept(block), self.before[block]
        rows = None if role in ("o", "down") else size.rows(role, kept)
        columns = size.columns(role, kept) if role in ("o", "down") else None
        weight = old.get_parameter("weight")
        transposed = not isinstance(old, nn.Linear)
        value: Tensor = weight.T if transposed else weight
        value = value if rows is None else value[rows.to(weight.device)]
        value = value if columns is None else value[:, columns.to(weight.device)]
        bias: Tensor | None = None if old.bias is None else old.get_parameter("bias")
        bias = bias if bias is None or rows is None else bias[rows.to(weight.device)]
        if given is not None:
            value = given[0].to(weight)
            bias = bias if given[1] is None else given[1].to(weight)
        value = (value.T if transposed else value).contiguous()
        new.register_parameter("weight", _parameter(value, weight))
        if bias is not None:
            new.register_parameter("bias", _parameter(bias.contiguous(), weight))

    def _scale(self, index: int, old: nn.Module, block: nn.Module, size: Geometry) -> None:
        """Keep the scale of the attention's logits, and that of normed queries and keys."""
        path = self.architecture.attention
        fold = float(old.get_submodule(path).scaling) / float(block.get_submodule(path).scaling)  # type: ignore[arg-type]
        shorter = (self.before[index].width / size.width) ** 0.5
        qk = self._kept(index).qk
        for number, norm_path in enumerate(self.architecture.head_norms):
            norm, given = block.get_submodule(norm_path), self.weights.get(self._name(index, norm_path))
            weight = old.get_submodule(norm_path).get_parameter("weight")
            value = weight if qk is None else weight[qk[0].to(weight.device)]
            factor = 1.0 if given is not None else shorter
            factor *= fold if number == 0 else 1.0
            value = value if given is None else given[0].to(weight)
            norm.register_parameter("weight", _parameter(scaled_norm(self.architecture, value, factor), weight))
        if fold == 1 or self.architecture.head_norms:
            return
        q = block.get_submodule(self.architecture.paths[size.holder("q")])
        rows = size.channel_rows("q").flatten()
        for name, parameter in list(q.named_parameters()):
            value = parameter.detach().clone()
            dim = 0 if name == "bias" or isinstance(q, nn.Linear) else 1
            at = rows.to(value.device)
            scaled = (value.index_select(dim, at).double() * fold).to(value.dtype)
            q.register_parameter(name, _parameter(value.index_copy_(dim, at, scaled), parameter))

    def _commit(self, made: nn.ModuleList, config: Any, plain: bool) -> Callable[[], None]:
        model, path = self.model, self.architecture.blocks
        layers = model.get_submodule(path)
        outside = [m for m in model.modules() if getattr(m, "config", None) is self.config]
        inside = {id(m) for m in layers.modules()}
        outside = [m for m in outside if id(m) not in inside]
        made.training = layers.training
        quantizer = getattr(model, "hf_quantizer", None)
        rotary = None if self.architecture.rotary is None else model.get_submodule(self.architecture.rotary)

        def undo() -> None:
            model.set_submodule(path, layers)
            if rotary is not None and self.architecture.rotary is not None:
                model.set_submodule(self.architecture.rotary, rotary)
            for module in outside:
                module.config = self.config
            if quantizer is not None:
                model.hf_quantizer = quantizer
            elif hasattr(model, "hf_quantizer"):
                del model.hf_quantizer

        try:
            model.set_submodule(path, made)
            for module in outside:
                module.config = config
            if rotary is not None and plain and config.rope_parameters != self.config.rope_parameters:
                assert self.architecture.rotary is not None
                device = next(rotary.buffers()).device
                model.set_submodule(self.architecture.rotary, self._fresh_rotary(config).to(device))
            if not plain:
                record_blocks(model, self.architecture, self.after, self.biases)
            elif quantizer is not None:
                del model.hf_quantizer
        except BaseException:
            undo()
            raise
        return undo


def check_free(model: nn.Module) -> None:
    """Refuse what new blocks would lose."""
    for index, block in enumerate(blocks(model)):
        name = f"{architecture_of(model).blocks}.{index}"
        for path, module in block.named_modules():
            check_own(f"{name}.{path}" if path else name, module)
        if any(tensor.is_meta for tensor in block.state_dict().values()):
            raise ValueError(f"{name} is on the meta device; load the model's weights before shrinking it")


def check_untied(model: nn.Module, path: str) -> None:
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = names.setdefault(id(parameter), name)
        if other != name and (name.startswith(f"{path}.") or other.startswith(f"{path}.")):
            raise ValueError(f"{name} is tied to {other}; untie it first")


def twin(block: nn.Module, config: Any, new: Any) -> nn.Module:
    """A copy of the modules of `block` that shares its tensors, with another config."""
    shared: list[Any] = [*block.parameters(), *block.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor for tensor in shared} | {id(config): new}
    twin = copy.deepcopy(block, memo)
    for module in twin.modules():
        own = getattr(module, "config", None)
        if isinstance(own, OwnConfig):
            module.config = own.shared
    return twin


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.detach(), requires_grad=like.requires_grad)


def _fraction(part: int, whole: int) -> float:
    """A float of which `int(whole * fraction)` is `part`."""
    exact = part / whole
    return exact if int(whole * exact) == part else (part + 0.5) / whole


def _reciprocals(values: Tensor) -> list[float]:
    """Float32 numbers whose reciprocals are `values`, to the last bit where there are such."""
    near = 1.0 / values.float()
    up, down = torch.full_like(near, torch.inf), torch.zeros_like(near)
    candidates = torch.stack([near, near.nextafter(up), near.nextafter(down)])
    best = (1.0 / candidates - values).abs().argmin(0)
    return candidates.gather(0, best[None])[0].tolist()
