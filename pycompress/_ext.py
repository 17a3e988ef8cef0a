"""The native module `pycompress._C`, or one sentence on why there is none.

torch is imported first: it loads the one OpenMP runtime that the native code's symbols resolve to.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

C: Any = None
why: str | None = None


def _why_not_built() -> str:
    """What setup.py wrote down when it could not build the module."""
    reason = Path(__file__).with_name("_C.why")
    if reason.exists():
        return reason.read_text().strip()
    return "pycompress._C was not built: run `pip install -e .` in the repository, with a C++17 compiler at hand"


try:
    C = importlib.import_module("pycompress._C")
except ModuleNotFoundError:
    why = _why_not_built()
except ImportError as error:
    if "PYCOMPRESS_ISA" in str(error):
        raise
    why = f"pycompress._C does not load: {error}"


def threads() -> int:
    """Threads a native kernel may use: torch's own number."""
    return torch.get_num_threads()


def build_info() -> dict[str, Any]:
    """What was built: compiler, ISA levels, CUDA architectures, or `why` there is nothing.

    Keys: `native` (bool), `why` (str or None), `compiler`, `isas_built`, `isas_available`, `isa` and `cuda`, the
    last a list of architectures or the reason there are none.
    """
    if C is None:
        return {
            "native": False,
            "why": why,
            "compiler": None,
            "isas_built": [],
            "isas_available": [],
            "isa": None,
            "cuda": "nothing native was built",
        }
    architectures = [a for a in C.cuda_architectures().split(";") if a]
    return {
        "native": True,
        "why": None,
        "compiler": C.compiler(),
        "isas_built": C.isas_built(),
        "isas_available": C.isas(),
        "isa": C.isa(),
        "cuda": architectures or C.cuda_why(),
    }
