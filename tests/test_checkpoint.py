"""Killed and resumed runs give the same bits; other runs' and damaged checkpoints are refused with the reason."""

import copy
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pycompress
from pycompress import RTN, SWSC, Magnitude, Prune, SliceGPT, SubnetSearch, _version
from pycompress._files import LOCK, alone, read_json, write_json
from pycompress.checkpoint import Checkpoint
from pycompress.lm.identity import hash_of

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


@pytest.mark.slow
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


@pytest.fixture(scope="module")
def finished_once(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    pycompress.apply(tiny_model("LlamaForCausalLM"), SWSC(0.5), IDS, checkpoint=folder, progress=False)
    return folder


@pytest.fixture
def finished(finished_once, tmp_path):
    """The checkpoint of a finished run."""
    return shutil.copytree(finished_once, tmp_path / "run")


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
    monkeypatch.setattr("pycompress.calibration.gradients.loss_sensitivity", lambda *_: pytest.fail("measured again"))
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


def again(model, folder, recipe=None, ids=IDS):
    return pycompress.apply(model, recipe or SWSC(0.5), ids, checkpoint=folder, progress=False)


def with_other_eps(model):
    model.config.rms_norm_eps = 1e-3
    return model


def with_other_activation(model):
    model.config.hidden_act = "gelu"
    return model


def with_other_attention(model):
    model.set_attn_implementation("eager")
    return model


def with_other_rope(model):
    model.model.rotary_emb.inv_freq.mul_(0.5)  # a buffer that no file holds
    return model


def with_other_module(model):
    model.model.layers[1].mlp.act_fn = torch.nn.Tanh()
    return model


def with_other_attribute(model):
    model.model.norm.variance_epsilon = 0.1
    return model


@pytest.mark.parametrize("lost", [False, True], ids=["run.json", "run.json lost"])
@pytest.mark.parametrize(
    "change",
    [
        with_other_eps,
        with_other_activation,
        with_other_attention,
        with_other_rope,
        with_other_module,
        with_other_attribute,
    ],
)
def test_equal_weights_that_compute_something_else_are_another_model(change, lost, finished, tiny_model):
    if lost:
        (finished / "run.json").unlink()
    # Another recipe: of the first run only what it measured of the dense model could be taken.
    with pytest.raises(ValueError, match=r"is of another model"):
        again(change(tiny_model("LlamaForCausalLM")), finished, SWSC(0.4))


def test_each_file_says_whose_it_is_and_its_hash(finished):
    identity = hashlib.sha256(json.dumps(read_json(finished / "run.json"), sort_keys=True).encode()).hexdigest()
    described = sorted(set(finished.glob("*.json")) - {finished / "run.json"})
    assert len(described) == len(list(finished.glob("*.safetensors"))) == 5
    for file in described:
        content = read_json(file)
        tensors = file.with_suffix(".safetensors")
        assert content["identity"] == identity
        assert content["tensors"] == hashlib.sha256(tensors.read_bytes()).hexdigest()
        with safe_open(tensors, "pt") as opened:
            assert opened.metadata() == {"identity": identity, "file": file.stem}


def test_a_package_of_another_version_is_told(finished, tiny_model, monkeypatch):
    monkeypatch.setattr(_version, "__version__", "9.9")
    with pytest.raises(ValueError, match="is of another pycompress version; give another directory"):
        again(tiny_model("LlamaForCausalLM"), finished)


@pytest.mark.parametrize("where", ["torch version", "pycompress version"])
def test_a_checkpoint_of_another_version_is_refused(where, finished, tiny_model):
    write_json(finished / "run.json", read_json(finished / "run.json") | {where: "0.0.1"})
    with pytest.raises(ValueError, match=f"is of another {where}; give another directory"):
        again(tiny_model("LlamaForCausalLM"), finished)


def test_a_checkpoint_of_a_version_without_hashes_is_refused(finished, tiny_model):
    (finished / "run.json").write_text(json.dumps({"model": "1", "calibration data": "2", "torch version": "3"}))
    with pytest.raises(ValueError, match=r"run\.json was written by an earlier version of pycompress; give another"):
        again(tiny_model("LlamaForCausalLM"), finished)


def test_another_file_in_the_place_of_whose_it_is_is_refused(finished, tiny_model):
    (finished / "run.json").write_bytes((finished / "gradients.json").read_bytes())
    with pytest.raises(ValueError, match=r"run\.json is damaged: it says nothing of whose it is"):
        again(tiny_model("LlamaForCausalLM"), finished)


def test_names_and_habits_do_not_make_another_model(finished, tiny_model, monkeypatch):
    monkeypatch.setattr("pycompress.methods.swsc.compress", lambda *_: pytest.fail("compressed again"))
    model = tiny_model("LlamaForCausalLM").train()
    model.config.update({"use_cache": False, "name_or_path": "elsewhere", "pad_token_id": 5})
    model.config.update({"output_hidden_states": True, "transformers_version": "0.1"})
    again(model, finished)


def test_a_file_of_another_run_among_a_runs_files_is_refused(finished, tiny_model, tmp_path):
    again(tiny_model("LlamaForCausalLM", seed=1), tmp_path / "other")
    for file in (tmp_path / "other").glob("block-*-0001.*"):
        (finished / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"block-.*-0001\.json is of another model, data or version than run\.json"):
        again(tiny_model("LlamaForCausalLM"), finished)


def test_a_file_under_another_files_name_is_refused(finished, tiny_model):
    for file in finished.glob("block-*-0001.*"):
        (finished / file.name.replace("0001", "0000")).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"block-.*-0000\.json is of another model"):
        again(tiny_model("LlamaForCausalLM"), finished)


SEARCH = SubnetSearch(0.7, candidates=8)


@pytest.fixture(scope="module")
def searched_once(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("searched") / "run"
    again(tiny_model("LlamaForCausalLM"), folder, SEARCH)
    return folder


@pytest.fixture
def searched(searched_once, tmp_path):
    """The checkpoint of a search: ranking, search state, subnet."""
    return shutil.copytree(searched_once, tmp_path / "run")


def flipped_digits(data):
    """The file with each of some digits changed in turn, which leaves it JSON."""
    places = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
    for place in places[:: max(1, len(places) // 3)]:
        changed = bytearray(data)
        changed[place] = ord("1") + (changed[place] - ord("0")) % 9
        yield bytes(changed)


@pytest.mark.parametrize("kind", ["run", "gradients", "curves", "block"])
def test_a_changed_digit_in_any_json_file_is_named(kind, finished, tiny_model):
    file = sorted(finished.glob(f"{kind}*.json"))[0]
    intact, model = file.read_bytes(), tiny_model("LlamaForCausalLM")
    recipe = SWSC(0.4) if kind in ("gradients", "curves") else SWSC(0.5)
    for changed in flipped_digits(intact):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged; delete "):
            again(model, finished, recipe)
    file.write_bytes(intact)
    again(model, finished, recipe)


@pytest.mark.parametrize("pattern", ["ranking-*.json", "subnet-*.json", "search-*.json", "search-*.jsonl"])
def test_a_changed_digit_in_what_a_search_keeps_is_named(pattern, searched, tiny_model):
    (file,) = searched.glob(pattern)
    for subnet in () if pattern.startswith("subnet") else searched.glob("subnet-*"):
        subnet.unlink()
    intact, model = file.read_bytes(), tiny_model("LlamaForCausalLM")
    for changed in flipped_digits(intact):
        file.write_bytes(changed)
        with pytest.raises(ValueError, match=rf"{file.name} is damaged; delete "):
            again(model, searched, SEARCH)
    file.write_bytes(intact)
    again(model, searched, SEARCH)


def resealed(file, change):
    """Change a description's content, as one would who knows how hashes are made."""
    content = read_json(file)
    change(content["description"])
    write_json(file, content)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [("labels", 30_000, r"labels must be 0 to"), ("channels", -1, r"channels must be each of")],
)
def test_tensors_that_fit_their_hash_but_not_their_spec_are_refused(part, value, message, finished, tiny_model):
    file = sorted(finished.glob("block-*.json"))[0]
    tensors = load_file(file.with_suffix(".safetensors"))
    name = next(name for name in tensors if name.endswith(f"|{part}"))
    tensors[name][0] = value
    save_file(tensors, file.with_suffix(".safetensors"))
    content = read_json(file)
    write_json(file, content | {"tensors": hashlib.sha256(file.with_suffix(".safetensors").read_bytes()).hexdigest()})
    model = tiny_model("LlamaForCausalLM")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: .*{message}"):
        again(model, finished)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in before.items())


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("block", lambda description: description.pop("modules")),
        ("block", lambda description: description["modules"][0].pop("row")),
        ("block", lambda description: description["modules"][0]["spec"].update(clusters="many")),
        ("block", lambda description: description.update(modules=[1])),
        ("curves", lambda description: description.update(energy=[])),
        ("curves", lambda description: description["energy"].update(wings=1.0)),
    ],
)
def test_a_description_of_another_form_is_named(kind, change, finished, tiny_model):
    file = sorted(finished.glob(f"{kind}-*.json"))[0]
    resealed(file, change)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged: "):
        again(tiny_model("LlamaForCausalLM"), finished)


@pytest.mark.parametrize("recipe", [SWSC(0.5), RTN(4), Magnitude(0.7), SliceGPT(0.8), Prune("magnitude", rate=0.8)])
def test_a_reloaded_model_is_the_same_model_and_running_it_changes_nothing(recipe, deep_model, tmp_path):
    model = deep_model("Gemma3ForCausalLM")
    dense = hash_of(model)
    pycompress.apply(model, recipe, IDS, progress=False)
    known = hash_of(model)
    assert known != dense
    model(input_ids=IDS)
    model.config.name_or_path = "elsewhere"
    model.save_pretrained(tmp_path)
    assert hash_of(model) == hash_of(copy.deepcopy(model)) == known
    assert hash_of(AutoModelForCausalLM.from_pretrained(tmp_path)) == known


def test_one_run_at_a_time_writes_to_a_directory(finished, tiny_model):
    with (
        alone(finished, "compression"),
        pytest.raises(ValueError, match=rf"another compression \(process {os.getpid()}\) is writing to .*run; wait"),
    ):
        again(tiny_model("LlamaForCausalLM"), finished)
    with pytest.raises(ValueError, match="calibration data"):
        again(tiny_model("LlamaForCausalLM"), finished, ids=IDS.flip(0))
    again(tiny_model("LlamaForCausalLM"), finished)
    with Checkpoint(finished.parent / "free", {}, []), pytest.raises(ValueError, match="another compression"):
        Checkpoint(finished.parent / "free", {}, [])


def test_a_lock_that_leads_elsewhere_is_refused_and_its_target_left(finished, tiny_model, tmp_path):
    (tmp_path / "letters").write_text("mine")
    (finished / LOCK).unlink()
    (finished / LOCK).symlink_to(tmp_path / "letters")
    with pytest.raises(ValueError, match="lock is a symbolic link; delete it"):
        again(tiny_model("LlamaForCausalLM"), finished)
    assert (tmp_path / "letters").read_text() == "mine"


def test_a_full_disk_leaves_no_part_of_a_file_and_the_model_as_it_was(tiny_model, tmp_path, monkeypatch):
    write, written = os.write, []

    def full(descriptor, data):
        if sum(written) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(descriptor, data[:4096]))
        return written[-1]

    monkeypatch.setattr(os, "write", full)
    model = tiny_model("LlamaForCausalLM")
    with pytest.raises(ValueError, match=r"cannot write .*: No space left on device"):
        again(model, tmp_path / "run")
    assert isinstance(model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert not [file.name for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]
    monkeypatch.undo()
    again(model, tmp_path / "run")


def test_what_a_killed_run_left_of_a_file_goes(finished, tiny_model):
    (finished / ".block-0123-0001.safetensors.0123abcd.part").write_bytes(b"half")
    again(tiny_model("LlamaForCausalLM"), finished)
    assert not list(finished.glob(".*"))


@pytest.mark.parametrize("empty", ["", "  "])
def test_an_empty_name_is_no_directory(empty, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="checkpoint is an empty name; give a directory"):
        again(tiny_model("LlamaForCausalLM"), empty)
    assert not list(tmp_path.iterdir())
