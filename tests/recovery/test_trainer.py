"""Recovery's checkpoints: damaged, foreign, interrupted, shared by two; what is there is what was written."""

import errno
import json
import os
import shutil

import pytest
import torch
from transformers import TrainerCallback

from pycompress import recover
from pycompress._files import alone, read_json, write_json
from pycompress.recovery.trainer import HASHES, RecoveryTrainer, checkpoints_in

pytestmark = pytest.mark.slow

pytest.importorskip("peft", reason="recovery needs peft: pip install pycompress[recover]")

WINDOWS = (torch.arange(17) + torch.arange(40)[:, None]) % 90 + 3


def some_steps(model, folder, **settings):
    given = {"lr": 3e-3, "progress": False, "batch_size": 2, "tokens": 6 * 2 * 17, "save_steps": 2, "method": "full"}
    return recover(model, WINDOWS, output_dir=folder, **given | settings)


class Stops(TrainerCallback):
    """Ctrl-C after the fifth step; the checkpoints of the second and the fourth are there."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 5:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def once(tiny_model, tmp_path_factory):
    """What the whole run gives, and the folder of one that was stopped."""
    folder = tmp_path_factory.mktemp("once")
    whole, stopped = (tiny_model("LlamaForCausalLM", attention_dropout=0.2) for _ in range(2))
    some_steps(whole, folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        some_steps(stopped, folder / "stopped", callbacks=[Stops()])
    return whole.state_dict(), folder / "stopped"


@pytest.fixture
def stopped(once, tmp_path):
    return shutil.copytree(once[1], tmp_path / "stopped")


@pytest.fixture
def model(tiny_model):
    return tiny_model("LlamaForCausalLM", attention_dropout=0.2)


def is_whole(model, once):
    return all(torch.equal(tensor, once[0][name]) for name, tensor in model.state_dict().items())


def test_a_stopped_run_goes_on_to_the_same_bits(stopped, model, once):
    assert [path.name for path in checkpoints_in(stopped)] == ["checkpoint-2", "checkpoint-4"]
    some_steps(model, stopped)
    assert is_whole(model, once)
    assert [path.name for path in checkpoints_in(stopped)] == ["checkpoint-4", "checkpoint-6"]


FILES = ["hashes.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trained.safetensors", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
def test_a_changed_bit_or_a_missing_file_is_named(name, stopped, model, once):
    newest = stopped / "checkpoint-4"
    assert sorted(path.name for path in newest.iterdir()) == FILES
    intact = (newest / name).read_bytes()
    for place in (len(intact) // 3, len(intact) - 2):
        changed = bytearray(intact)
        changed[place] ^= 1
        (newest / name).write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{name} is damaged; delete .*checkpoint-4 to go on from the checkpoint"):
            some_steps(model, stopped)
    (newest / name).unlink()
    if name != HASHES:
        with pytest.raises(ValueError, match=rf"{name} is missing; delete .*checkpoint-4 to go on"):
            some_steps(model, stopped)
        shutil.rmtree(newest)
    # Without its hashes a checkpoint is one whose writing was interrupted.
    some_steps(model, stopped)
    assert is_whole(model, once)


def test_a_checkpoint_of_another_run_among_a_runs_checkpoints_is_refused(stopped, model, tmp_path):
    write_json(stopped / "checkpoint-4" / HASHES, read_json(stopped / "checkpoint-4" / HASHES) | {"identity": "other"})
    with pytest.raises(ValueError, match="checkpoint-4 is of another run; delete"):
        some_steps(model, stopped)


def with_other_eps(model):
    model.config.rms_norm_eps = 0.1


def with_other_rope(model):
    model.model.rotary_emb.inv_freq.mul_(2)


@pytest.mark.parametrize(("change", "what"), [(with_other_eps, "model config"), (with_other_rope, "model")])
def test_equal_weights_that_compute_something_else_are_another_model(change, what, stopped, model):
    change(model)
    with pytest.raises(ValueError, match=rf"are of another {what}; to go on"):
        some_steps(model, stopped)


def test_of_another_version_or_of_another_program_is_refused(stopped, model):
    write_json(stopped / "recovery.json", read_json(stopped / "recovery.json") | {"pycompress version": "0.0.1"})
    with pytest.raises(ValueError, match="are of another pycompress version; to go on"):
        some_steps(model, stopped)
    (stopped / "recovery.json").write_text(json.dumps({"model": "1", "data": "2"}))
    with pytest.raises(ValueError, match="was written by an earlier version of pycompress; give another directory"):
        some_steps(model, stopped)
    (stopped / "recovery.json").unlink()
    with pytest.raises(ValueError, match=r"holds checkpoints, but no recovery\.json that says of what; give another"):
        some_steps(model, stopped)
    assert len(checkpoints_in(stopped)) == 2


class Intrudes(TrainerCallback):
    """A second recovery, on the same folder, in the middle of the first."""

    def __init__(self, model, folder):
        self.model, self.folder, self.said = model, folder, ""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            with pytest.raises(ValueError, match="another recovery") as caught:
                some_steps(self.model, self.folder)
            self.said = str(caught.value)


def test_one_recovery_at_a_time_writes_to_a_directory(model, once, tiny_model, tmp_path):
    other = Intrudes(tiny_model("LlamaForCausalLM", attention_dropout=0.2), tmp_path)
    before = {name: tensor.clone() for name, tensor in other.model.state_dict().items()}
    some_steps(model, tmp_path, callbacks=[other])
    assert f"another recovery (process {os.getpid()}) is writing to {tmp_path}; wait until it ends" in other.said
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.model.state_dict().items())
    assert is_whole(model, once)
    with alone(tmp_path, "recovery"):
        pass


def test_a_full_disk_leaves_no_part_of_a_checkpoint(stopped, model, once, monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecoveryTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space left"):
        some_steps(model, stopped)
    assert [path.name for path in checkpoints_in(stopped)] == ["checkpoint-2", "checkpoint-4"]


def test_a_figure_that_is_not_finite_is_null_in_the_state(model, tmp_path):
    class Logs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            state.log_history.append({"norm": float("nan"), "step": state.global_step})

    some_steps(model, tmp_path, callbacks=[Logs()])
    state = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text()
    assert "NaN" not in state
    assert {"norm": None, "step": 6} in json.loads(state)["log_history"]


def test_checkpoints_that_could_not_be_gone_on_from_are_refused(model, tmp_path):
    with pytest.raises(ValueError, match="save_only_model=True leaves checkpoints without the optimizer"):
        some_steps(model, tmp_path, train={"save_only_model": True})
