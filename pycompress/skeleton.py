"""What config.json says of a model's blocks, checked, and given to an empty model before its weights load."""

from __future__ import annotations

from typing import Any

from torch import nn

from pycompress.groups import ARCHITECTURES, Geometry, frequencies, shape_of
from pycompress.layers import KeptRotary, SlicedBlock
from pycompress.resize import resize, slice_block

SIZES = ("heads", "kv_heads", "width", "rotary", "mlp")


def check_blocks(blocks: dict[str, Any]) -> None:
    if set(blocks) != {"architecture", "biases", *SIZES}:
        raise ValueError(
            f"blocks in the pycompress quantization_config has the fields architecture, biases, {', '.join(SIZES)}; "
            f"got {', '.join(sorted(blocks))}"
        )
    if blocks["architecture"] not in ARCHITECTURES:
        raise ValueError(
            f"the model is a shrunk {blocks['architecture']}, this pycompress knows {', '.join(ARCHITECTURES)}; "
            f"upgrade it: pip install --upgrade pycompress"
        )
    depths = {len(blocks[size]) for size in SIZES}
    whole = all(isinstance(n, int) and n >= (size != "rotary") for size in SIZES for n in blocks[size])
    if len(depths) != 1 or not whole:
        raise ValueError(f"blocks in the pycompress quantization_config must hold one size a block, got {blocks}")


def check_sliced(sliced: dict[str, Any]) -> None:
    if set(sliced) != {"architecture", "widths"} or sliced["architecture"] not in ARCHITECTURES:
        raise ValueError(
            f"sliced in the pycompress quantization_config has the fields architecture (one of "
            f"{', '.join(ARCHITECTURES)}) and widths; got {sliced}"
        )
    widths = sliced["widths"]
    if len(widths) % 2 == 0 or not all(width is None or (isinstance(width, int) and width > 0) for width in widths):
        raise ValueError(f"widths in the pycompress quantization_config must be two a block and one, got {widths}")


def resize_blocks(model: nn.Module, blocks: dict[str, Any]) -> None:
    """Give the blocks of an empty model the sizes that `config.json` says."""
    architecture = ARCHITECTURES[blocks["architecture"]]
    found = list(model.get_submodule(resolve(model, architecture.blocks)).children())
    if len(found) != len(blocks["mlp"]):
        raise ValueError(
            f"config.json lists the sizes of {len(blocks['mlp'])} blocks, but {type(model).__name__} builds "
            f"{len(found)}; config.json does not belong to this model"
        )
    embedding = None if architecture.rotary is None else model.get_submodule(resolve(model, architecture.rotary))
    for index, block in enumerate(found):
        rotary = 0 if embedding is None else 2 * len(frequencies(embedding, model.config, index))
        sizes = {size: blocks[size][index] for size in SIZES}
        hidden, _ = shape_of(block.get_submodule(architecture.paths["o"]))
        geometry = Geometry(**sizes, hidden=hidden, roles=architecture.roles, fused=architecture.fused)
        biases = [role for role, having in blocks["biases"].items() if index in having]
        resize(block, architecture, model.config, geometry, index=index, rotary=rotary, biases=biases)


def slice_blocks(model: nn.Module, sliced: dict[str, Any]) -> None:
    """Make the blocks of an empty model those that `config.json` says."""
    architecture, widths = ARCHITECTURES[sliced["architecture"]], sliced["widths"]
    found = list(model.get_submodule(resolve(model, architecture.blocks)).children())
    if len(widths) != 2 * len(found) + 1:
        raise ValueError(
            f"config.json lists {len(widths)} widths of the residual stream, but {type(model).__name__} builds "
            f"{len(found)} blocks, which have {2 * len(found) + 1}; config.json does not belong to this model"
        )
    for index, block in enumerate(found):
        own = widths[2 * index : 2 * index + 3]
        if any(width is not None for width in own):
            slice_block(block, architecture, own, parallel=architecture.parallel(model.config))


def resolve(model: nn.Module, name: str) -> str:
    """`name` as this class has it: a base model lacks its causal LM's prefix, and the other way round."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    names = {module_name for module_name, _ in model.named_modules()}
    for candidate in (name, name.removeprefix(prefix), prefix + name):
        if candidate in names:
            return candidate
    raise ValueError(
        f"config.json lists the module {name}, but {type(model).__name__} has no such module; "
        f"config.json does not belong to this model"
    )


def check_products(name: str, block: SlicedBlock) -> None:
    for key, tensor in block.named_parameters():
        loaded = tensor.is_meta or getattr(tensor, "_is_hf_initialized", False)
        if not loaded and key.startswith(("shortcuts.", "projections.")):
            raise ValueError(f"the saved files lack {name}.{key}; save or download the model again")


def check_rotary(name: str, kept: KeptRotary) -> None:
    if kept.channels.is_meta:
        return
    if not getattr(kept.channels, "_is_hf_initialized", False):
        raise ValueError(f"the saved files lack {name}.channels; save or download the model again")
    low, high = kept.channels.cpu().long().chunk(2)
    ascending = bool((kept.channels.diff() > 0).all()) and int(low[0]) >= 0
    if not ascending or bool(((high - low) != (high - low)[0]).any()):
        raise ValueError(f"{name}.channels must be pairs of channels, ascending; the saved files are damaged")
