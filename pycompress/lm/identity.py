"""Whose a file is: hashes of what a model computes, and in which versions."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pycompress import _version
from pycompress._files import of_earlier_version, read_json

VERSION = "pycompress version"


# Of a config and of modules: names, ids and records that no output follows from, and what running a model changes.
NOT_THE_FORWARD = re.compile(
    r"_.*|architectures|.*_token_id|dtype|torch_dtype|transformers_version|name_or_path|quantization_\w+|is_quantized"
    r"|is_loaded_in_\w+|use_cache|id2label|label2id|return_dict|output_\w+|training|gradient_checkpointing|max_seq_len_cached"
)


def differing(file: Path, identity: Mapping[str, str]) -> list[str]:
    """In what an identity on file is another one; a file that is not there is none.

    Raises `ValueError` for a file that is damaged or of a version that wrote no hashes.
    """
    if not file.exists():
        return []
    if of_earlier_version(file):
        raise ValueError(
            f"{file} was written by an earlier version of pycompress; give another directory, or delete {file.parent} "
            f"to start over"
        )
    known = read_json(file)
    if VERSION in identity and VERSION not in known:
        raise ValueError(f"{file} is damaged: it says nothing of whose it is; delete {file.parent} to start over")
    return [name for name in {**identity, **known} if known.get(name) != identity.get(name)]


def identity_of(model: nn.Module) -> dict[str, str]:
    """Hashes of what a model computes, and in which versions: tensors, and all that decides what becomes of them."""
    return {
        "model": _hash_of_tensors(model),
        "model config": _hash_of_forward(model),
        "torch version": str(torch.__version__),
        VERSION: _version.__version__,
    }


def hash_of(model: nn.Module) -> str:
    """A hash of every parameter and buffer of a model, and of all that decides what becomes of them."""
    return digest_of({"model": _hash_of_tensors(model), "model config": _hash_of_forward(model)})


def digest_of(identity: Mapping[str, str]) -> str:
    """One hash of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _hash_of_tensors(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device or offloaded; load the model whole")
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _hash_of_forward(model: nn.Module) -> str:
    """A hash of the config's fields, and of each module: the class whose forward it runs, its plain settings."""
    config: Any = getattr(model, "config", None)
    fields = config.to_dict() if hasattr(config, "to_dict") else {}
    facts: list[Any] = [_deciding(fields)]
    for name, module in model.named_modules():
        runs = next(kind for kind in type(module).__mro__ if "forward" in vars(kind))
        plain = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        attention = getattr(getattr(module, "config", None), "_attn_implementation", None)
        facts.append([name, runs.__qualname__, str(attention), _deciding(plain)])
    text = json.dumps(facts, sort_keys=True, default=lambda value: type(value).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def _deciding(fields: Any) -> Any:
    """Values without those that no output follows from."""
    if isinstance(fields, Mapping):
        kept = {str(name): value for name, value in fields.items() if not NOT_THE_FORWARD.fullmatch(str(name))}
        return {name: _deciding(value) for name, value in kept.items()}
    return [_deciding(value) for value in fields] if isinstance(fields, (list, tuple)) else fields
