"""Killed and resumed runs give the same bits; other runs' and damaged checkpoints are refused with the reason."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

import pycompress
from pycompress import RTN, SWSC

IDS = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(1))

# Kills itself with SIGKILL right after the n-th file is written, or half-way through writing it.
SCRIPT = textwrap.dedent(
    """
    import importlib.util, os, signal, sys
    import torch
    spec = importlib.util.spec_from_file_location("tiny", sys.argv[1])
    tiny = importlib.util.module_from_spec(spec)
    sys.modules["tiny"] = tiny
    spec.loader.exec_module(tiny)
    import pycompress
    from pycompress.checkpoint import Checkpoint

    directory, out, write, where = sys.argv[2], sys.argv[3], int(sys.argv[4]), sys.argv[5]
    original, count = Checkpoint._write, 0

    def _write(self, name, data):
        global count
        count += 1
        if count == write and where == "during":
            (self.path / ("." + name + ".half")).write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        original(self, name, data)
        if count == write:
            os.kill(os.getpid(), signal.SIGKILL)

    Checkpoint._write = _write
    torch.set_num_threads(1)
    model = tiny.tiny_model("Qwen3ForCausalLM", num_hidden_layers=3)
    ids = torch.randint(3, 97, (6, 24), generator=torch.Generator().manual_seed(1))
    pycompress.apply(model, pycompress.SWSC(0.5), ids, checkpoint=directory, progress=False)
    torch.save(model.state_dict(), out)
    """
)


def run(tmp_path, directory, write, where="after"):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    tiny = os.path.join(os.path.dirname(__file__), "conftest.py")
    out = tmp_path / f"{directory}.pt"
    code = subprocess.run(
        [sys.executable, script, tiny, tmp_path / directory, out, str(write), where],
        check=False,
        capture_output=True,
        text=True,
    )
    assert code.returncode in (0, -signal.SIGKILL), code.stderr
    return code.returncode, torch.load(out) if out.exists() else None


def test_killed_at_three_points_and_resumed_the_bits_are_the_same(tmp_path):
    code, expected = run(tmp_path, "whole", 0)
    assert code == 0
    # Files are run.json, then two each for the sensitivity, the curves of 3 blocks and 3 blocks. Kills come after the
    # first curves, between the two files of the first block, and while the last block is written.
    for write, where in ((5, "after"), (5, "after"), (5, "during")):
        code, none = run(tmp_path, "killed", write, where)
        assert (code, none) == (-signal.SIGKILL, None)
    code, resumed = run(tmp_path, "killed", 0)
    assert code == 0
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)


@pytest.fixture
def finished(tiny_model, tmp_path):
    model = tiny_model("LlamaForCausalLM")
    pycompress.apply(model, SWSC(0.5), IDS, checkpoint=tmp_path / "run", progress=False)
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("change", "what"),
    [("model", "model"), ("data", "calibration data"), ("all", "model and calibration data")],
)
def test_a_checkpoint_of_another_run_is_refused_with_the_reason(change, what, finished, tiny_model):
    model = tiny_model("LlamaForCausalLM", seed=1 if change in ("model", "all") else 0)
    ids = IDS.flip(0) if change in ("data", "all") else IDS
    with pytest.raises(ValueError, match=f"is of another {what}"):
        pycompress.apply(model, SWSC(0.5), ids, checkpoint=finished, progress=False)


def test_another_keep_reuses_what_was_measured_and_gives_the_same_bits(finished, tiny_model, monkeypatch):
    alone, resumed = tiny_model("LlamaForCausalLM"), tiny_model("LlamaForCausalLM")
    pycompress.apply(alone, SWSC(0.4), IDS, progress=False)
    monkeypatch.setattr("pycompress.api.loss_sensitivity", lambda *_: pytest.fail("felt again"))
    monkeypatch.setattr("pycompress.methods.swsc.curve", lambda *_: pytest.fail("measured again"))
    pycompress.apply(resumed, SWSC(0.4), IDS, checkpoint=finished, progress=False)
    expected, got = alone.state_dict(), resumed.state_dict()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_a_finished_run_is_loaded_again_without_work(finished, tiny_model, monkeypatch):
    monkeypatch.setattr("pycompress.methods.swsc.compress", lambda *_: pytest.fail("compressed again"))
    model = tiny_model("LlamaForCausalLM")
    report = pycompress.apply(model, SWSC(0.5), IDS, checkpoint=finished, progress=False)
    assert report.targets.keep <= 0.5


@pytest.mark.parametrize("damage", ["truncate", "flip", "description", "run"])
def test_a_damaged_checkpoint_is_refused_by_file(damage, finished, tiny_model):
    pattern = {"description": "block-*-0001.json", "run": "run.json"}.get(damage, "block-*-0001.safetensors")
    (file,) = finished.glob(pattern)
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
    file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
        pycompress.apply(model, SWSC(0.5), IDS, checkpoint=finished, progress=False)
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)


def test_a_directory_that_cannot_be_written_is_named(tmp_path, tiny_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the checkpoint directory .*file"):
        pycompress.apply(tiny_model("LlamaForCausalLM"), RTN(3), checkpoint=tmp_path / "file" / "run", progress=False)
