"""Saved compressed models with something changed: config.json, tensors, bytes. Each loads and computes, or is refused.

`saved.py make FOLDER` saves the models, `saved.py run FOLDER FIRST COUNT` surveys seeds.
"""

from __future__ import annotations

import copy
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from runner import finish, survey
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import pycompress
from pycompress import RTN, SWSC, LowRank, Prune, SliceGPT
from pycompress.architectures.subnet import Kept, Subnet
from pycompress.formats import packed
from pycompress.hub import record
from pycompress.nn.linear import PackedLinear, ZerosLinear
from pycompress.surgery.shrink import shrink

IDS = torch.arange(3, 43).view(2, 20)
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
RECIPES: dict[str, Any] = {
    "rows": SWSC(clusters=6, rank=5, share="output", weighting="none"),
    "columns": SWSC(clusters=6, rank=5, share="input", weighting="none"),
    "low rank": LowRank(0.6),
    "int8": SWSC(0.3, storage="int8", weighting="none"),
    "int4 rows": SWSC(0.2, storage="int4", share="output", weighting="none"),
    "int4 columns": SWSC(0.25, storage="int4", share="input", weighting="none"),
    "rounded": RTN(4, group_size=32),
    "2:4": Prune("magnitude", pattern="2:4"),
    "bitmap": Prune("magnitude", sparsity=0.8),
    "zeros": Prune("magnitude", sparsity=0.5),
    "shrunk": Subnet(
        (
            Kept(torch.arange(40), torch.tensor([[0, 1, 2, 3, 8, 9, 10, 11]]), torch.arange(8).repeat(2, 1)),
            Kept(torch.arange(57), kv_heads=torch.tensor([1])),
        )
    ),
    "sliced": SliceGPT(0.7),
}
VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 64, 65, 2**15, 2**31, 2**40, 10**30, 1.5, float("nan"), float("inf")]
VALUES += ["", "64", "x" * 10**5, [], {}, [1], [[[]]], {"a": 1}, [64, 64], "float", "int4", "output", "shared_channels"]
DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.float16, torch.bfloat16]
DTYPES += [torch.float32, torch.float64]
SENTENCES = (ValueError, TypeError, OSError, SafetensorError)
MOST_BYTES = 1 << 30


def make(folder: Path) -> None:
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
        if isinstance(recipe, Subnet):
            shrink(model, recipe)
        else:
            pycompress.apply(model, recipe, torch.randint(3, 97, (32, 32)), progress=False)
        model.save_pretrained(folder / name)


def case(root: Path, seed: int) -> str | None:
    draw = random.Random(seed)
    name = draw.choice(sorted(RECIPES))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        shutil.copytree(root / name, folder)
        how = draw.choice([of_config, of_config, of_tensors, of_tensors, of_bytes])
        what = f"{name}: {how(draw, folder)}"
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        wrong = _outcome(folder)
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        if grown > MOST_BYTES:
            wrong = f"took {grown >> 20} MB more"
        if [file.name for file in Path(place).iterdir()] != ["model"]:
            wrong = "wrote beside the model"
    return None if wrong is None else f"{what[:300]}: {wrong}"


def of_config(draw: random.Random, folder: Path) -> str:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    said = []
    for _ in range(draw.choice([1, 1, 2])):
        places = list(_places(config["quantization_config"]))
        holder, key, path = draw.choice(places)
        number = isinstance(holder[key], int)
        change = draw.choice(["value", "value", "near" if number else "drop", "drop", "rename"])
        if change == "drop":
            del holder[key]
        elif change == "rename" and isinstance(holder, dict):
            holder[f"{key}{draw.choice(['x', '.', '/../../x', '.weight'])}"] = holder.pop(key)
        elif change == "near":
            holder[key] += draw.choice([-32, -1, 1, 32])
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
        said.append(f"{change} {path}")
        if not isinstance(config["quantization_config"], dict) or not config["quantization_config"]:
            break
    file.write_text(json.dumps(config))
    return "; ".join(said)


def _places(value: Any, path: str = "") -> Any:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(pairs):
        yield value, key, f"{path}/{key}"
        yield from _places(each, f"{path}/{key}")


def of_tensors(draw: random.Random, folder: Path) -> str:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    own = [name for name in tensors if "layers" in name] if draw.random() < 0.9 else list(tensors)
    name = draw.choice(own)
    tensor, generator = tensors[name], torch.Generator().manual_seed(draw.randrange(2**31))
    change = draw.choice(["dtype", "dtype", "shape", "values", "values", "drop", "rename", "swap", "one", "add"])
    if change == "dtype":
        tensors[name] = tensor.to(draw.choice(DTYPES))
    elif change == "shape":
        shapes = [tensor[:-1], torch.cat([tensor, tensor]), tensor[None], tensor.flatten(), tensor[:0]]
        shapes += [tensor.T] if tensor.ndim == 2 else []
        tensors[name] = draw.choice(shapes).contiguous()
    elif change == "values":
        many = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), generator=generator, dtype=torch.uint8)
        tensors[name] = many.view(tensor.dtype).view(tensor.shape)
    elif change == "drop":
        del tensors[name]
    elif change == "rename":
        tensors[draw.choice([f"{name}x", f"../{name}", name.removeprefix("model."), f"model.{name}"])] = tensors.pop(
            name
        )
    elif change == "swap":
        other = draw.choice(own)
        tensors[name], tensors[other] = tensors[other], tensors[name]
    elif change == "one" and tensor.numel():
        place = draw.randrange(tensor.numel())
        bits = tensor.flatten().contiguous().view(torch.uint8)
        bits[place * tensor.element_size() :][: tensor.element_size()] ^= 1 << draw.randrange(8)
        tensors[name] = bits.view(tensor.dtype).view(tensor.shape)
    else:
        tensors["model.layers.0.extra"] = torch.ones(3)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return f"{change} {name}"


def of_bytes(draw: random.Random, folder: Path) -> str:
    file = folder / draw.choice(["config.json", "model.safetensors"])
    data = bytearray(file.read_bytes())
    change = draw.choice(["flip", "flip", "cut", "zeros", "header"])
    if change == "cut":
        data = data[: draw.randrange(len(data))]
    elif change == "zeros":
        start = draw.randrange(len(data))
        data[start : start + 64] = bytes(len(data[start : start + 64]))
    else:
        most = 2000 if change == "header" else len(data)
        for _ in range(draw.choice([1, 1, 8])):
            data[draw.randrange(min(most, len(data)))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    return f"{change} {file.name}"


def _outcome(folder: Path) -> str | None:
    """What was wrong with loading the model and running it; None where it computes, or was refused in a sentence."""
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            found = model(IDS).logits
    except SENTENCES as error:
        text = str(error)
        ours = _ours(error)
        return f"said {len(text)} characters" if ours and (len(text) > 2000 or not text) else None
    except Exception as error:
        # What transformers makes of what it reads itself is its own.
        allowed = not _ours(error) and not isinstance(error, MemoryError)
        return None if allowed else f"{type(error).__name__}: {str(error)[:200]}"
    return _compare(model, found)


def _ours(error: BaseException) -> bool:
    """Whether this package raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    return "/pycompress/" in last or any("/pycompress/" in name for name in frames[-4:])


@torch.no_grad()
def _compare(model: Any, found: torch.Tensor) -> str | None:
    """Against a dense model made of the tensors that were loaded."""
    dense = copy.deepcopy(model)
    largest = max(float(tensor.float().abs().max()) for tensor in model.state_dict().values() if tensor.numel())
    for name, spec in record.compressed_modules(model).items():
        module = model.get_submodule(name)
        if not isinstance(module, PackedLinear):
            continue
        tensors = {part: tensor for part, tensor in module.state_dict().items() if part != "bias"}
        if isinstance(module, ZerosLinear):
            spec = spec | {"kept": len(tensors["weight"])}
        weight = packed.rebuild(spec, tensors).unpack()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
        linear.weight = nn.Parameter(weight.to(found.dtype))
        if module.bias is not None:
            linear.bias = module.bias
        dense.set_submodule(name, linear)
    expected = dense(IDS).logits
    if not found.isfinite().all():
        return None if not expected.isfinite().all() or largest > 1e8 else "not finite where the dense model is"
    if largest > 1e3 or found.dtype != torch.float32:
        return None  # a flipped exponent: sums in another order differ
    close = torch.allclose(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    return None if close else f"another result than the dense model: {float((found - expected).abs().max()):.3g}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if sys.argv[1] == "make":
        make(Path(sys.argv[2]))
        finish({})
    else:
        root, first, count = Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
        finish({"saved": survey(lambda seed: case(root, seed), range(first, first + count), seconds=20)})
