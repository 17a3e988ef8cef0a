"""A module beside a saved model that imports pycompress."""

from __future__ import annotations

import json
from pathlib import Path

import transformers

from pycompress._brief import brief
from pycompress._files import write_whole
from pycompress.hub.config import METHOD
from pycompress.hub.record import method_of

CODE_FILE = "modeling_pycompress"
LOADING_CODE = '''"""Importing pycompress is all that {class_name} needs to load compressed weights."""

import pycompress  # noqa: F401
from transformers import {class_name}


class Compressed{class_name}({class_name}):
    """A class of its own, because transformers marks the class it finds here as code of this directory."""
'''


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
    if not isinstance(config, dict) or method_of(config.get("quantization_config")) != METHOD:
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
