"""Files that are whole or not there, what a checkpoint and a search keep; texts and JSON read with plain errors."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_whole(file: Path, data: bytes) -> None:
    """Write a file so that after an interruption it is the old one or the new one, never part of it."""
    try:
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}.", delete=False) as part:
            part.write(data)
            part.flush()
            os.fsync(part.fileno())
        os.replace(part.name, file)
    except OSError as error:
        raise ValueError(f"cannot write {file}: {error.strerror}") from error


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; `ValueError` where it holds something else."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged; delete {file.parent} to start over")
    return content


def read_text(file: str | Path) -> str:
    """A UTF-8 text; `ValueError` where it cannot be read."""
    try:
        return Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the text {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the text {file}: it is not UTF-8") from error
