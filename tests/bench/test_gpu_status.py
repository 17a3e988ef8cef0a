"""`make gpu-status` and `make gpu` where there is no GPU: no figure is claimed that was not taken from this source."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """The script as a module, looking at two kernels of a made-up repository."""
    spec = importlib.util.spec_from_file_location("gpu_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for folder in ("kernels", "csrc/cuda"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kernels/base.py").write_text("BASE = 1\n")
    (tmp_path / "kernels/op.py").write_text("from pycompress.kernels.base import BASE\n")
    (tmp_path / "csrc/cuda/op.cu").write_text('#include "op.h"\n')
    (tmp_path / "csrc/cuda/op.h").write_text("#pragma once\n")
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def record(gpu, folder, **steps):
    results = {
        name: {"result": result} for name, result in ({"tests": "passed", "benchmarks": "passed"} | steps).items()
    }
    run = {"gpu": "A GPU", "kernels": gpu.fingerprints(), "steps": results}
    (folder / "a-gpu.json").write_text(json.dumps(run))


def verdicts(gpu, folder):
    return {line.split()[1]: line.split()[0] for line in gpu.status(folder)}


def test_without_results_every_kernel_is_pending(gpu, tmp_path):
    (tmp_path / "a-cpu.json").write_text('{"cpu": "some CPU", "groups": {}}')
    assert verdicts(gpu, tmp_path) == {
        "kernels/base.py": "pending",
        "kernels/op.py": "pending",
        "csrc/cuda/op.cu": "pending",
    }


def test_a_complete_run_of_the_same_source_counts_as_measured(gpu, tmp_path):
    record(gpu, tmp_path)
    assert set(verdicts(gpu, tmp_path).values()) == {"measured"}


def test_a_change_makes_stale_what_is_made_from_it_and_nothing_else(gpu, tmp_path):
    record(gpu, tmp_path)
    (tmp_path / "kernels/base.py").write_text("BASE = 2\n")
    assert verdicts(gpu, tmp_path) == {
        "kernels/base.py": "stale",
        "kernels/op.py": "stale",
        "csrc/cuda/op.cu": "measured",
    }
    record(gpu, tmp_path)
    (tmp_path / "csrc/cuda/op.h").write_text("#define OTHER\n")
    assert verdicts(gpu, tmp_path)["csrc/cuda/op.cu"] == "stale"
    assert verdicts(gpu, tmp_path)["kernels/op.py"] == "measured"


def test_a_run_with_a_failed_step_measures_nothing(gpu, tmp_path):
    record(gpu, tmp_path, tests="failed")
    assert set(verdicts(gpu, tmp_path).values()) == {"failed"}


def test_benchmarks_that_ran_out_of_time_measured_a_part(gpu, tmp_path):
    record(gpu, tmp_path)
    run = json.loads((tmp_path / "a-gpu.json").read_text())
    run["steps"]["benchmarks"] = {"result": "failed", "why": ["stopped after 47 s"]}
    (tmp_path / "a-gpu.json").write_text(json.dumps(run))
    assert verdicts(gpu, tmp_path) == dict.fromkeys(gpu.fingerprints(), "partial")
    run["steps"]["tests"]["result"] = "failed"
    (tmp_path / "a-gpu.json").write_text(json.dumps(run))
    assert set(verdicts(gpu, tmp_path).values()) == {"failed"}


def test_a_run_leaves_its_result_its_log_and_what_failed(gpu, tmp_path, monkeypatch, capsys):
    steps = {"tests": ["sh", "-c", "echo FAILED one; exit 1"], "benchmarks": ["true"]}
    monkeypatch.setattr(gpu, "machine", lambda: {"gpu": "Some GPU 9", "versions": {}})
    monkeypatch.setattr(gpu, "commands", lambda: steps)
    monkeypatch.setattr(gpu, "MEASUREMENTS", tmp_path / "figures.json")
    monkeypatch.setenv("GPU_OUT", str(tmp_path / "out"))
    assert gpu.run() == 1
    written = json.loads((tmp_path / "out/some-gpu-9.json").read_text())
    assert written["kernels"] == gpu.fingerprints()
    assert written["benchmarks"] == []
    assert written["steps"]["tests"]["why"] == ["FAILED one"]
    assert "exit 1" in (tmp_path / "out/gpu.log").read_text()
    assert "tests failed:\n  FAILED one" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_a_run_says_so_in_one_sentence(gpu, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu.py", "run"])
    assert gpu.main() == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert "needs an NVIDIA GPU" in said.err
    assert not said.out
