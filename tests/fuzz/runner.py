"""Runs seeded cases where a crash kills a child and nothing else.

A script calls `survey` with a function of a seed and hands its report to `finish`; a test calls `launch` on the script.
`survey` forks, so the script's own process must never have run a parallel product.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

# Gives None where a case behaved, else one line on what was wrong.
Case = Callable[[int], str | None]
ROOT = Path(__file__).parents[2]
TOGETHER = 50  # cases of one child


def survey(case: Case, seeds: Iterable[int], seconds: int = 60) -> dict[str, Any]:
    """Run every seed in forked children: how many ran, `crashes` by signal and `wrong` with their seeds.

    A case that takes longer than `seconds` is ended by SIGALRM, which counts as a crash.
    """
    left, report = list(seeds), {"cases": 0, "crashes": [], "wrong": []}
    while left:
        done, wrong, status = _child(case, left[:TOGETHER], seconds)
        report["wrong"] += wrong
        if status:
            report["crashes"].append(f"seed {left[done]}: {_ended(status)}")
            done += 1
        report["cases"] += done
        left = left[done:]
    return report


def _child(case: Case, seeds: list[int], seconds: int) -> tuple[int, list[str], int]:
    """How many seeds a child finished, what was wrong, and its wait status, 0 where it finished them all."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        for seed in seeds:
            signal.alarm(seconds)
            try:
                found = case(seed)
            except BaseException as error:
                found = f"{type(error).__name__}: {error}"
            os.write(write, (json.dumps(found) + "\n").encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = [json.loads(line) for line in pipe if line.endswith("\n")]
    wrong = [f"seed {seed}: {text}" for seed, text in zip(seeds, found, strict=False) if text]
    return len(found), wrong, os.waitpid(child, 0)[1]


def _ended(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return "took too long" if number == signal.SIGALRM else f"ended by {signal.Signals(number).name}"
    return f"exited with {os.WEXITSTATUS(status)}"


def finish(reports: dict[str, dict[str, Any]]) -> None:
    """Print the reports of a script, by name, as its last line."""
    print(json.dumps(reports))


def launch(script: Path, *arguments: str, timeout: int = 600) -> dict[str, dict[str, Any]]:
    """Run a script of this folder in a process of its own; its reports by name."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{script.name} ended with {done.returncode}:\n{done.stderr[-4000:]}"
    return json.loads(done.stdout.splitlines()[-1])
