"""Sweeps: rows against what the parts measure alone, kills, failures, what is shared and what is not repeated."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import pycompress
from pycompress._files import alone
from pycompress.laws import sweep as sweeping
from pycompress.laws.grid import RunSpec, load
from pycompress.laws.sweep import sweep, time_left
from pycompress.measure import perplexity, tasks, token_windows
from pycompress.recovery.recover import recover
from pycompress.runs import FILE, Run
from pycompress.runs import load as load_runs

TEXT = "A compressed model must say what it lost. " * 12
GRID = {
    "models": ["model"],
    "methods": ["Random", {"method": "SWSC", "keeps": [0.6], "recovery": {"method": "factors"}}],
    "keeps": [0.9, 0.7],
    "recovery": {"tokens": [0, 64], "window": 16},
    "calibration": {"text": "text.txt", "window": 16, "windows": 4},
    "test": {"text": "text.txt", "window": 32, "windows": 3},
    "speed": {"prompt": 4, "new_tokens": 2, "repeats": 1},
}
# Recovery and tasks stand in for what takes minutes: one moves every float parameter, the other reads one weight.
STAND_INS = """
from types import SimpleNamespace

import torch

from pycompress.laws import sweep as sweeping


def recover(model, text, *, tokens, method, lr, tokenizer, window, batch_size, seed, output_dir, progress):
    generator = torch.Generator().manual_seed(seed + tokens)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return SimpleNamespace(tokens=tokens + 1)


def evaluate(model, tokenizer, names, data_dir=None, *, limit=None, progress=True):
    value = float(torch.sigmoid(next(model.parameters()).detach().flatten()[0]))
    return {name: SimpleNamespace(accuracy=value, stderr=float("nan"), count=limit) for name in names}


sweeping.recover, sweeping.evaluate = recover, evaluate
"""


@pytest.fixture
def place(tiny_model, byte_tokenizer, tmp_path, monkeypatch):
    """A folder with a tiny model, a text and a grid; recovery and tasks are the stand-ins."""
    for name in ("recover", "evaluate"):
        monkeypatch.setattr(sweeping, name, None)
    exec(compile(STAND_INS, "stand_ins", "exec"), {})
    tiny_model("LlamaForCausalLM", vocab_size=300, max_position_embeddings=128).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path


def grid(place, **other):
    (place / "grid.yaml").write_text(yaml.safe_dump(GRID | other))
    return load(place / "grid.yaml")


def measure(place, folder="runs", retry_failed=False, **other):
    return sweep(grid(place, **other), place / folder, retry_failed=retry_failed, device="cpu", progress=False)


def comparable(run):
    """A row without what differs from run to run."""
    plain = run.to_dict()
    return {name: value for name, value in plain.items() if name != "seconds" and "tokens_per_s" not in name}


def test_a_row_holds_what_the_parts_measure_alone(place, byte_tokenizer):
    runs = measure(place, methods=["Random"], keeps=[0.7], tasks={"names": "piqa", "limit": 5}, recovery={"tokens": 0})
    (run,) = runs
    assert load_runs(place / "runs") == runs
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    dense = copy.deepcopy(model)
    report = pycompress.apply(model, pycompress.Random(0.7), progress=False)
    for measured, network in ((run.loss, model), (run.dense_loss, dense)):
        expected = perplexity(network, byte_tokenizer, TEXT, 32, max_windows=3)
        assert measured == pytest.approx(math.log(expected), rel=1e-6)
    assert run.keep == report.decoder.keep
    assert 0.5 < run.keep < 0.9
    assert (run.bytes, run.dense_bytes) == (report.file.after, report.file.before)
    assert (run.keep_asked, run.recovery_tokens, run.recovery, run.error) == (0.7, 0, {}, None)
    assert run.tasks["piqa"] == {
        "accuracy": pytest.approx(float(torch.sigmoid(next(model.parameters()).detach().flatten()[0]))),
        "stderr": None,
        "count": 5,
    }
    assert run.dense_tasks.keys() == {"piqa"}
    assert min(run.speedup(), run.speedup("prefill"), *run.seconds.values()) >= 0
    assert run.versions["torch"] == torch.__version__
    assert run.versions["dtype"] == "float32"


def test_calibrated_runs_read_the_calibration_text(place, byte_tokenizer):
    (run,) = measure(place, methods=["SWSC"], keeps=[0.6], recovery={"tokens": 0}, speed=False)
    model = AutoModelForCausalLM.from_pretrained(place / "model")
    windows = token_windows(model, byte_tokenizer, TEXT, 16, 4)
    pycompress.apply(model, pycompress.SWSC(0.6), windows, progress=False)
    assert run.loss == pytest.approx(math.log(perplexity(model, byte_tokenizer, TEXT, 32, max_windows=3)), rel=1e-6)
    assert run.decode_tokens_per_s is None


def test_a_sweep_in_one_go_does_everything_once(place, monkeypatch):
    applied = []
    monkeypatch.setattr(sweeping, "apply", lambda *a, **o: applied.append(a[1]) or pycompress.apply(*a, **o))
    runs = measure(place)
    # Runs that differ in their recovery alone share a compression.
    assert len(runs) == 6
    assert len(applied) == 3
    assert [run.key for run in runs] == [spec.key for spec in grid(place).specs()]
    assert len({run.dense_loss for run in runs}) == 1
    recovered = [run for run in runs if run.recovery_tokens]
    assert [run.recovery["tokens"] for run in recovered] == [65] * 3
    assert [run.recovery["method"] for run in recovered] == ["lora", "lora", "factors"]
    assert all(run.loss != other.loss for run, other in zip(runs[::2], runs[1::2], strict=True))
    assert measure(place) == runs
    assert len(applied) == 3
    # Another keep joins the rows that are there, and dense models are not scored again.
    monkeypatch.setattr(sweeping.Worker, "_score", lambda *a: (2.5, {}))
    more = measure(place, keeps=[0.9, 0.8, 0.7], recovery={"tokens": 0}, methods=["Random"])
    assert [(run.keep_asked, run.loss == 2.5, run.dense_loss == runs[0].dense_loss) for run in more] == [
        (0.9, False, True),
        (0.8, True, True),
        (0.7, False, True),
    ]


KILLED = """
import os, signal, sys
from pycompress import runs
from pycompress.laws import sweep
from pycompress.laws.grid import load

append, count = runs.append, 0

def append_or_die(folder, run):
    global count
    count += 1
    if count == 3:
        with (folder / runs.FILE).open("a") as file:
            file.write('{"key": "' + run.key)
        os.kill(os.getpid(), signal.SIGKILL)
    append(folder, run)

sweep.rows.append = append_or_die
sweep.sweep(load(sys.argv[1]), sys.argv[2], device="cpu", progress=False)
"""


@pytest.mark.slow
def test_a_killed_sweep_goes_on_without_repeating_or_losing_a_run(place):
    grid(place)
    script = place / "script.py"
    script.write_text(STAND_INS + textwrap.dedent(KILLED))
    ended = subprocess.run(
        [sys.executable, script, place / "grid.yaml", place / "runs"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    before = (place / "runs" / FILE).read_text().splitlines()
    assert len(before) == 3
    runs = measure(place)
    lines = (place / "runs" / FILE).read_text().splitlines()
    assert lines[:2] == before[:2]
    assert [json.loads(line)["key"] for line in lines] == [spec.key for spec in grid(place).specs()]
    assert len(lines) == 6
    assert [comparable(run) for run in runs] == [comparable(run) for run in measure(place, "uninterrupted")]


def test_a_failed_run_is_a_row_and_is_done_again_when_asked(place, monkeypatch):
    def fails(model, recipe, *a, **o):
        if recipe[0].keep == 0.9:
            raise RuntimeError("no\nmemory")
        return pycompress.apply(model, recipe, *a, **o)

    settings = {"methods": ["Random"], "recovery": {"tokens": 0}}
    monkeypatch.setattr(sweeping, "apply", fails)
    failed, sound = measure(place, **settings)
    assert failed.error == "RuntimeError: no memory"
    assert (failed.loss, failed.keep, failed.dense_loss) == (None, None, sound.dense_loss)
    assert sound.error is None
    monkeypatch.setattr(sweeping, "apply", pycompress.apply)
    assert measure(place, **settings) == [failed, sound]
    again, same = measure(place, retry_failed=True, **settings)
    assert again.error is None
    assert again.key == failed.key
    assert same == sound


def test_a_loss_that_is_not_finite_is_a_failure(place, monkeypatch):
    found = iter([20.0, math.inf])
    monkeypatch.setattr(sweeping, "perplexity", lambda *a, **o: next(found))
    (run,) = measure(place, methods=["Random"], keeps=[0.7], recovery={"tokens": 0}, speed=False)
    assert run.error == "ValueError: the loss on the test text is not finite: its perplexity is inf"


def test_what_recipes_finish_is_deleted_and_the_dense_statistics_stay(place):
    measure(place, methods=["SWSC"], keeps=[0.8, 0.6, 0.5], recovery={"tokens": 0}, speed=False)
    (checkpoint,) = (place / "runs" / "checkpoints").iterdir()
    names = sorted(file.name.split("-")[0] for file in checkpoint.glob("*.json"))
    # One recipe's two blocks; one file of curves a block, which all keeps share.
    assert names == ["block", "block", "curves", "curves", "gradients.json", "run.json"]


def test_another_model_of_the_same_name_is_refused(place, tiny_model):
    settings = {"methods": ["Random"], "keeps": [0.7], "recovery": {"tokens": 0}}
    measure(place, **settings)
    tiny_model("LlamaForCausalLM", vocab_size=300, seed=1).save_pretrained(place / "model")
    with pytest.raises(ValueError, match=r"are of another model called model"):
        measure(place, **settings | {"keeps": [0.6]})


def test_two_sweeps_do_not_write_to_one_folder(place):
    with alone(place, "sweep"), pytest.raises(ValueError, match=r"another sweep \(process \d+\) is writing to"):
        sweep(grid(place), place, device="cpu", progress=False)


@pytest.mark.parametrize("name", ["../../x", "{}/outside", "a/b", "..", ".hidden", "tab\there", "x" * 300, "модель"])
def test_names_of_models_never_become_paths(name, place):
    outside = place / "runs" / "of" / "mine"
    shown = name.format(place)
    settings = {"methods": ["SWSC"], "keeps": [0.6], "recovery": {"tokens": 0}, "speed": False}
    before = {path for path in place.rglob("*") if path != place / "grid.yaml"}
    (run,) = sweep(grid(place, models={shown: "model"}, **settings), outside, device="cpu", progress=False)
    assert (run.model, run.error) == (shown, None)
    made = {path for path in place.rglob("*") if path != place / "grid.yaml"} - before
    assert all(outside in path.parents or path in (outside, *outside.parents) for path in made)
    (checkpoint,) = (outside / "checkpoints").iterdir()
    assert (checkpoint / "run.json").exists()


def test_two_names_that_look_alike_have_places_of_their_own(place):
    settings = {"methods": ["SWSC"], "keeps": [0.6], "recovery": {"tokens": 0}, "speed": False}
    runs = measure(place, models={"a/b": "model", "a_b": "model", "a b": "model"}, **settings)
    assert [run.error for run in runs] == [None] * 3
    assert len(list((place / "runs" / "checkpoints").iterdir())) == 3


def test_a_lock_that_leads_elsewhere_is_refused_and_its_target_left(place):
    (place / "letters").write_text("mine")
    (place / "runs").mkdir()
    (place / "runs" / "lock").symlink_to(place / "letters")
    with pytest.raises(ValueError, match="lock is a symbolic link; delete it"):
        measure(place)
    assert (place / "letters").read_text() == "mine"


def test_an_empty_name_is_no_folder(place, monkeypatch):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    settings = grid(place)
    with pytest.raises(ValueError, match="folder is an empty name; give a directory"):
        sweep(settings, "", device="cpu", progress=False)
    assert sorted(place.iterdir()) == sorted({*before, place / "grid.yaml"})


def test_changed_scores_of_a_dense_model_are_named(place):
    settings = {"methods": ["Random"], "keeps": [0.7], "recovery": {"tokens": 0}, "speed": False}
    measure(place, **settings)
    (file,) = (place / "runs").glob("dense-*.json")
    file.write_text(file.read_text().replace('"loss": ', '"loss": 1'))
    with pytest.raises(ValueError, match=rf"{file.name} is damaged; delete it and the dense model is scored again"):
        measure(place, **settings | {"keeps": [0.6]})


def test_an_equal_model_that_computes_something_else_is_another(place):
    settings = {"methods": ["Random"], "keeps": [0.7], "recovery": {"tokens": 0}, "speed": False}
    measure(place, **settings)
    config = json.loads((place / "model" / "config.json").read_text())
    (place / "model" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(ValueError, match=r"are of another model called model"):
        measure(place, **settings | {"keeps": [0.6]})


def test_the_bar_says_what_runs_and_the_loss_last_seen(place, capsys):
    runs = sweep(grid(place, methods=["Random"], recovery={"tokens": 64}, speed=False), place / "runs", device="cpu")
    told = capsys.readouterr().err
    assert "Random, keep 0.7, 64 tokens" in told
    assert f"loss {runs[-1].loss:.3f}" in told
    assert "left" in told


def test_time_left_is_that_of_the_runs_most_alike():
    def spec(key, method, tokens):
        return RunSpec(key, "m", method, [], 0.5, tokens, 0, {})

    def run(key, method, tokens, seconds):
        return Run(key, "m", method, [], 0.5, tokens, 0, seconds={"compress": seconds / 2, "recover": seconds / 2})

    specs = [spec("a", "A", 0), spec("b", "A", 0), spec("c", "B", 9), spec("d", "C", 9), spec("e", "C", 5)]
    assert time_left(specs, {}) is None
    done = {"a": run("a", "A", 0, 10.0), "c": run("c", "B", 9, 100.0)}
    assert time_left(specs, done) == pytest.approx(10 + 100 + 55)
    assert time_left(specs, done | {s.key: run(s.key, "A", 0, 1.0) for s in specs}) == 0


def test_missing_parts_are_said_before_any_work(place, monkeypatch):
    monkeypatch.setattr(sweeping, "evaluate", tasks.evaluate)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'pycompress\[tasks\]'"):
        measure(place, tasks={"names": "piqa"})
    assert not (place / "runs" / FILE).exists()


def test_real_recovery_lowers_the_loss_on_what_it_trains_on(place, monkeypatch):
    pytest.importorskip("accelerate", reason="recovery needs accelerate: pip install pycompress[recover]")
    monkeypatch.setattr(sweeping, "recover", recover)
    settings = {"tokens": [0, 400], "window": 32, "batch_size": 2, "lr": 3.0e-3, "method": "full"}
    before, after = measure(place, methods=["Random"], keeps=[0.7], recovery=settings, speed=False)
    assert after.error is None
    assert after.recovery["tokens"] >= 400
    assert after.loss < before.loss
    # Its own checkpoints go once the row is there.
    assert not list((place / "runs" / "recovery").iterdir())


@pytest.mark.slow
def test_workers_on_ray_measure_the_same_rows(place):
    pytest.importorskip("ray", reason="Ray is not installed: pip install pycompress[ray]")
    settings = {"methods": ["Random", "SWSC"], "recovery": {"tokens": 0}, "speed": False}
    local = measure(place, "local", **settings)
    remote = sweep(grid(place, **settings), place / "remote", executor="ray", workers=2, device="cpu", progress=False)
    assert [comparable(run) for run in remote] == [comparable(run) for run in local]
