"""Peak memory between two points: of a GPU by torch's allocator, of a CPU by the process's resident set."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

PROC = Path("/proc/self")


def reset_peak(device: torch.device) -> None:
    """Start a new peak at what is in use now. Where the system cannot (not Linux), the peak is the whole process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        (PROC / "clear_refs").write_text("5")
    except OSError:
        return


def peak(device: torch.device) -> int:
    """Bytes at the highest point since `reset_peak`, everything the process holds included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = (PROC / "status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
