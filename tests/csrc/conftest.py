"""The structs of kernels' arguments as the headers of csrc declare them: the types and names of their fields."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADERS = [ROOT / "csrc" / "cpu" / "kernels.h", *sorted((ROOT / "csrc" / "cuda").glob("*.h"))]
STRUCT = re.compile(r"struct (\w+Args) \{(.*?)\n\};", re.DOTALL)
DECLARATION = re.compile(r"(?:const )?(\w+) (.+)")
KINDS = {"int": ctypes.c_int, "bool": ctypes.c_bool, "int64_t": ctypes.c_int64, "Dtype": ctypes.c_int}
KINDS |= {"Storage": ctypes.c_int, "float": ctypes.c_float}

Fields = list[tuple[str, type]]


@pytest.fixture(scope="session")
def structs() -> dict[str, Fields]:
    """The fields of each struct by its name, in their order."""
    return {name: _fields(body) for header in HEADERS for name, body in STRUCT.findall(header.read_text())}


def _fields(body: str) -> Fields:
    found = []
    for line in re.sub(r"//.*", "", body).split(";"):
        declaration = DECLARATION.fullmatch(line.strip())
        if declaration and "(" not in line:
            kind, names = declaration.groups()
            for name in names.split(","):
                pointer = "*" in name
                found.append((name.strip(" *"), ctypes.c_void_p if pointer else KINDS[kind]))
    return found
