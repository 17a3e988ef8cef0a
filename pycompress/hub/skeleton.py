"""What config.json says of a model's blocks, checked, and given to an empty model before its weights load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from pycompress._brief import brief, listed
from pycompress.architectures.description import Architecture
from pycompress.architectures.geometry import Geometry
from pycompress.architectures.model import block_geometry, frequencies, is_of, shape_of
from pycompress.architectures.supported import ARCHITECTURES
from pycompress.nn.resize import resize, slice_block

SIZES = ("heads", "kv_heads", "width", "rotary", "mlp")


def check_blocks(blocks: Any) -> None:
    fields = ("architecture", "biases", *SIZES)
    if not isinstance(blocks, dict) or set(blocks) != set(fields):
        got = listed(blocks) if isinstance(blocks, dict) else brief(blocks)
        raise ValueError(f"blocks in the pycompress quantization_config has the fields {listed(fields)}; got {got}")
    architecture = _architecture("shrunk", blocks["architecture"])
    for size in SIZES:
        least = 0 if size == "rotary" else 1
        if not isinstance(blocks[size], list) or not all(_integer(n, least) for n in blocks[size]):
            raise ValueError(f"{size} of blocks must be a list of integers, one a block, got {brief(blocks[size])}")
    depths = {size: len(blocks[size]) for size in SIZES}
    if len(set(depths.values())) != 1:
        raise ValueError(f"blocks must hold one size a block, but the lists are as long as {depths}")
    biases, depth = blocks["biases"], depths["mlp"]
    if not isinstance(biases, dict) or not all(
        role in architecture.paths and isinstance(having, list) and all(_integer(n, 0) and n < depth for n in having)
        for role, having in biases.items()
    ):
        raise ValueError(
            f"biases of blocks must be, for some of the roles {listed(architecture.paths)}, lists of blocks below "
            f"{depth}, got {brief(biases)}"
        )


def check_sliced(sliced: Any) -> None:
    if not isinstance(sliced, dict) or set(sliced) != {"architecture", "widths"}:
        got = listed(sliced) if isinstance(sliced, dict) else brief(sliced)
        raise ValueError(f"sliced in the pycompress quantization_config has the fields architecture, widths; got {got}")
    _architecture("sliced", sliced["architecture"])
    widths = sliced["widths"]
    fits = isinstance(widths, list) and all(width is None or _integer(width, 1) for width in widths)
    if not fits or len(widths) % 2 == 0:
        raise ValueError(
            f"widths in the pycompress quantization_config must be two a block and one, integers of at least 1 or "
            f"null, got {brief(widths)}"
        )


def _architecture(what: str, name: Any) -> Architecture:
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(
            f"the model is a {what} {brief(name)}, this pycompress knows {', '.join(ARCHITECTURES)}; upgrade it: "
            f"pip install --upgrade pycompress"
        )
    return ARCHITECTURES[name]


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def resize_blocks(model: nn.Module, blocks: dict[str, Any]) -> None:
    """Give the blocks of an empty model the sizes that `config.json` says."""
    architecture = ARCHITECTURES[blocks["architecture"]]
    _check_class(model, architecture)
    find = resolver(model)
    found = list(model.get_submodule(find(architecture.blocks)).children())
    if len(found) != len(blocks["mlp"]):
        raise ValueError(
            f"config.json lists the sizes of {len(blocks['mlp'])} blocks, but {type(model).__name__} builds "
            f"{len(found)}; config.json does not belong to this model"
        )
    embedding = None if architecture.rotary is None else model.get_submodule(find(architecture.rotary))
    for index, block in enumerate(found):
        rotary = 0 if embedding is None else 2 * len(frequencies(embedding, model.config, index))
        sizes = {size: blocks[size][index] for size in SIZES}
        dense = block_geometry(architecture, block, rotary)
        _check_smaller(index, sizes, dense)
        geometry = replace(dense, **sizes)
        biases = [role for role, having in blocks["biases"].items() if index in having]
        resize(block, architecture, model.config, geometry, index=index, rotary=rotary, biases=biases)


def _check_class(model: nn.Module, architecture: Architecture) -> None:
    if not is_of(architecture, model):
        raise ValueError(
            f"config.json says that the model was a {architecture.class_name}, but builds {type(model).__name__}; "
            f"config.json does not belong to this model"
        )


def _check_smaller(index: int, sizes: dict[str, int], dense: Geometry) -> None:
    larger = [size for size, n in sizes.items() if n > getattr(dense, size)]
    if larger:
        size = larger[0]
        raise ValueError(
            f"config.json says that block {index} has {size} {brief(sizes[size])}, but the whole model has "
            f"{getattr(dense, size)}, and a shrunk one has no more; config.json does not belong to this model"
        )
    fits = sizes["heads"] * dense.kv_heads == sizes["kv_heads"] * dense.heads
    if not fits or sizes["rotary"] % 2 or sizes["rotary"] > sizes["width"]:
        raise ValueError(
            f"config.json says that block {index} has {sizes['heads']} heads, {sizes['kv_heads']} kv_heads, width "
            f"{sizes['width']} and rotary {sizes['rotary']}; heads a kv_head must be {dense.heads / dense.kv_heads:g} "
            f"as in the whole model, and rotary even and within the width"
        )


def slice_blocks(model: nn.Module, sliced: dict[str, Any]) -> None:
    """Make the blocks of an empty model those that `config.json` says."""
    architecture, widths = ARCHITECTURES[sliced["architecture"]], sliced["widths"]
    _check_class(model, architecture)
    found = list(model.get_submodule(resolver(model)(architecture.blocks)).children())
    if len(widths) != 2 * len(found) + 1:
        raise ValueError(
            f"config.json lists {len(widths)} widths of the residual stream, but {type(model).__name__} builds "
            f"{len(found)} blocks, which have {2 * len(found) + 1}; config.json does not belong to this model"
        )
    for index, block in enumerate(found):
        own = widths[2 * index : 2 * index + 3]
        hidden, _ = shape_of(block.get_submodule(architecture.paths["o"]))
        wider = [width for width in own if width is not None and width > hidden]
        if wider:
            raise ValueError(
                f"config.json says that the residual stream of block {index} is {brief(wider[0])} wide, but the whole "
                f"model's is {hidden}; config.json does not belong to this model"
            )
        if any(width is not None for width in own):
            slice_block(block, architecture, own, parallel=architecture.parallel(model.config))


def resolver(model: nn.Module) -> Callable[[str], str]:
    """Gives a name as this class has it: a base model lacks its causal LM's prefix, and the other way round."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {module_name for module_name, _ in model.named_modules()}

    def resolve(name: str) -> str:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in names:
                return candidate
        raise ValueError(
            f"config.json lists the module {brief(name)}, but {type(model).__name__} has no such module; "
            f"config.json does not belong to this model"
        )

    return resolve
