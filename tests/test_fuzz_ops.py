"""Random calls of the ops, valid and not: none crashes, none is wrong in silence. `make fuzz` runs many more."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pycompress import ops

pytestmark = pytest.mark.slow

FUZZ = Path(__file__).parent / "fuzz"
# Random calls of each registered op, and a quarter as many of each public function.
CALLS = int(os.environ.get("PYCOMPRESS_FUZZ", "40"))


def _runner() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_runner", FUZZ / "runner.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RUNNER = _runner()
REGISTERED = sorted(name for name in ops.OPS)
PUBLIC = sorted({*REGISTERED, "kmeans", "truncated_svd"})


@pytest.mark.parametrize(
    ("names", "calls"),
    [([f"torch.ops.{name}" for name in REGISTERED], CALLS), ([f"ops.{name}" for name in PUBLIC], -(-CALLS // 4))],
    ids=["registered", "public"],
)
def test_random_calls_neither_crash_nor_go_wrong_in_silence(names: list[str], calls: int) -> None:
    reports = RUNNER.launch(FUZZ / "ops.py", "0", str(calls), *names, timeout=60 + 2 * calls * len(names))
    assert {name: report["cases"] for name, report in reports.items()} == dict.fromkeys(names, calls)
    assert [line for report in reports.values() for line in report["crashes"]] == []
    assert [line for report in reports.values() for line in report["wrong"]] == []


def test_every_registered_op_is_called() -> None:
    registered = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pycompress::")]
    assert {name.removeprefix("pycompress::") for name in registered} == set(REGISTERED)


def test_a_crash_names_its_signal_and_seed(tmp_path: Path) -> None:
    script = tmp_path / "crash.py"
    script.write_text(
        f"import os, signal, sys\nsys.path.insert(0, {str(FUZZ)!r})\nimport runner\n"
        "def case(seed):\n"
        "    if seed == 3:\n        os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return 'odd' if seed == 5 else None\n"
        "runner.finish({'case': runner.survey(case, range(7))})\n"
    )
    report = RUNNER.launch(script)["case"]
    assert report == {"cases": 7, "crashes": ["seed 3: ended by SIGSEGV"], "wrong": ["seed 5: odd"]}
