"""`make gpu` and `make gpu-status`: build, test and time on a GPU; say which kernels have figures that still hold.

`python bench/gpu.py run` writes `<gpu>.json` and `gpu.log` into `$GPU_OUT`, or bench/results and build.
`python bench/gpu.py status` needs no GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
STAGE = ROOT / "build" / "gpu"
MEASUREMENTS = ROOT / "build" / "gpu-benchmarks.json"
# Seconds for all of it, which is to end within five minutes, and for each step of it.
BUDGET = float(os.environ.get("GPU_BUDGET", "285"))
LIMITS = {"build": 100, "tests": 90, "memcheck": 25, "racecheck": 25, "benchmarks": 170}
SANITIZERS = ("memcheck", "racecheck")


def kernel_sources() -> list[Path]:
    """Files of kernels and of what launches them."""
    launchers = [file for file in sorted((ROOT / "kernels").glob("*.py")) if file.name != "__init__.py"]
    return launchers + sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def _needed(file: Path) -> list[Path]:
    """Files of its own folder that `file` is made from."""
    text = file.read_text()
    names = [f"{name}.py" for name in re.findall(r"^from pycompress\.kernels\.(\w+) import", text, re.M)]
    names += re.findall(r'^#include "([\w.]+)"', text, re.M)
    return [file.with_name(name) for name in names if file.with_name(name).exists()]


def fingerprint(file: Path) -> str:
    """sha256 over a kernel's source and the sources it is made from, in the order they are met."""
    met: list[Path] = []
    pending = [file]
    while pending:
        source = pending.pop(0)
        if source not in met:
            met.append(source)
            pending += _needed(source)
    return hashlib.sha256(b"\0".join(source.read_bytes() for source in met)).hexdigest()


def fingerprints() -> dict[str, str]:
    return {file.relative_to(ROOT).as_posix(): fingerprint(file) for file in kernel_sources()}


def status(folder: Path) -> list[str]:
    """One line a kernel: measured, partial, stale, failed or pending, and on what."""
    runs = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    runs = [run for run in runs if "gpu" in run]
    lines = []
    for name, digest in fingerprints().items():
        found = [(_verdict(run, name, digest), run["gpu"]) for run in runs if name in run["kernels"]]
        lines += [f"{verdict:<9}{name}  ({gpu})" for verdict, gpu in found] or [f"{'pending':<9}{name}"]
    return lines


def _verdict(run: dict[str, Any], name: str, digest: str) -> str:
    if run["kernels"][name] != digest:
        return "stale"
    steps = run["steps"]
    out_of_time = "benchmarks" in steps and _was_stopped(steps["benchmarks"])
    others = [step for which, step in steps.items() if which != "benchmarks" or not out_of_time]
    if "benchmarks" not in steps or any(step["result"] == "failed" for step in others):
        return "failed"
    return "partial" if out_of_time else "measured"


def _was_stopped(step: dict[str, Any]) -> bool:
    """Whether a step failed by its time alone: what it printed before holds."""
    return step["result"] == "failed" and all(line.startswith("stopped after") for line in step.get("why", [""]))


class NoGpuError(Exception):
    """Why nothing can run here, as one sentence."""


def machine() -> dict[str, Any]:
    """Name of the GPU and versions of what drives it."""
    try:
        import torch
    except ImportError as error:
        raise NoGpuError(f"make gpu needs a Python with torch, and {sys.executable} has none ({error})") from error
    if not torch.cuda.is_available():
        raise NoGpuError(f"make gpu needs an NVIDIA GPU, and torch {torch.__version__} sees none here: nothing was run")
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True).stdout if shutil.which(query[0]) else ""
    return {
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "driver": answer.split("\n")[0] or "unknown",
            "python": sys.version.split()[0],
        },
    }


def commands() -> dict[str, list[str]]:
    """The steps in their order; the sanitizers are among them only where compute-sanitizer is installed."""
    python = [sys.executable, "-m"]
    install = ["pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--target", str(STAGE)]
    pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    spread = ["-n", str(min(os.cpu_count() or 1, 12))] if importlib.util.find_spec("xdist") else []
    steps = {
        "build": [*python, *install, str(ROOT)],
        "tests": [*pytest, "-vv", *spread, "-m", "gpu", "tests/kernels/test_gpu.py", "tests/kernels/test_kernels.py"],
    }
    if sanitizer := shutil.which("compute-sanitizer"):
        native = [*pytest, "-x", "tests/kernels/test_gpu.py", "-k", "native and (anywhere or 63)"]
        for tool in SANITIZERS:
            steps[tool] = [sanitizer, "--tool", tool, "--error-exitcode", "9", *native]
    # Last, so that they have what time is left; the figures come to disk one by one.
    return steps | {"benchmarks": [sys.executable, "bench/gpu_benchmarks.py", str(MEASUREMENTS)]}


def perform(name: str, command: list[str], seconds: float, log: Path) -> dict[str, Any]:
    """Run one step into the log; `passed`, `failed` or, for a sanitizer that cannot work here, `unavailable`."""
    print(f"{name}: {' '.join(command)}", flush=True)
    # The staged package, not the checkout beside which Python may stand, has the kernels and the native module in it.
    environment = os.environ | {"PYTHONPATH": str(STAGE), "PYTHONSAFEPATH": "1"}
    if name in SANITIZERS:
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    if name == "benchmarks":
        environment["GPU_BUDGET"] = str(seconds)
    began = time.monotonic()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=max(1.0, seconds),
        )
        output, code = done.stdout, done.returncode
    except subprocess.TimeoutExpired as error:
        partial = error.stdout or b""
        output = partial.decode(errors="replace") if isinstance(partial, bytes) else partial
        output, code = output + f"\nstopped after {seconds:.0f} s", 124
    took = time.monotonic() - began
    with log.open("a") as file:
        file.write(f"== {name}: {' '.join(command)}\n{output}\n== exit {code} after {took:.1f} s\n")
    step: dict[str, Any] = {"result": "passed" if code == 0 else "failed", "seconds": round(took, 1)}
    if code and name in SANITIZERS and "not supported" in output:
        step["result"] = "unavailable"
    if code:
        step["why"] = summary(output)
    print(f"{name}: {step['result']} in {took:.0f} s", flush=True)
    return step


def summary(output: str) -> list[str]:
    """The lines that say what failed, or the last ones."""
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [
        line
        for line in lines
        if re.match(r"(\[gw\d+\] .*)?FAILED|ERROR|E  |========= (Invalid|ERROR)|stopped after", line)
    ]
    return [line[:300] for line in (telling or lines)[-12:]]


def run() -> int:
    facts = machine()
    given = os.environ.get("GPU_OUT")
    folder = Path(given) if given else RESULTS
    log = (Path(given) if given else ROOT / "build") / "gpu.log"
    for needed in (folder, log.parent):
        needed.mkdir(parents=True, exist_ok=True)
    log.write_text(json.dumps(facts) + "\n")
    MEASUREMENTS.unlink(missing_ok=True)
    hashes, ends = fingerprints(), time.monotonic() + BUDGET
    steps: dict[str, dict[str, Any]] = {}
    for name, command in commands().items():
        if steps.get("build", {}).get("result") == "failed":
            break
        steps[name] = perform(name, command, min(LIMITS[name], ends - time.monotonic()), log)
    figures = json.loads(MEASUREMENTS.read_text()) if MEASUREMENTS.exists() else []
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    changes = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True).stdout
    report = {"command": "make gpu", **facts, "commit": commit or None, "dirty": bool(changes.strip())}
    report |= {"kernels": hashes, "steps": steps}
    report["benchmarks"] = figures
    target = folder / (re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-") + ".json")
    target.write_text(json.dumps(report, indent=1) + "\n")
    failed = [name for name, step in steps.items() if step["result"] == "failed"]
    for name in failed:
        print(f"\n{name} failed:", *steps[name]["why"], sep="\n  ")
    print(f"\n{len(figures)} figures in {target}, the log in {log}")
    return 1 if failed else 0


def main() -> int:
    if sys.argv[1:] == ["status"]:
        print(*status(RESULTS), sep="\n")
        return 0
    if sys.argv[1:] != ["run"]:
        print(f"usage: python {Path(__file__).name} run | status", file=sys.stderr)
        return 2
    try:
        return run()
    except NoGpuError as reason:
        print(reason, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
