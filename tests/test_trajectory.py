"""Importance along training against float64 sums over weights kept by hand; resumed and sharded runs."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, Trainer, TrainingArguments

from pycompress.calibration.records import Records
from pycompress.trajectory import TrajectoryTracker


def model_of(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3, bias=False))


def walk(model, steps, seed=1):
    """Change the weights at random, and give copies of them by module name, a record a step."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
        yield {name: module.weight.detach().clone() for name, module in model.named_modules() if name in "02" and name}


def expected(records, window, signed):
    """The paper's sum in float64, record numbers from 1."""
    n = len(records)
    lags = range(n if window is None else min(n, window + 1))
    value = lambda w: w.double() if signed else w.double().abs()  # noqa: E731
    return {
        name: (sum(value(records[n - 1 - lag][name]) * (n - lag) for lag in lags) / sum(n - lag for lag in lags)).abs()
        for name in records[0]
    }


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("window", [None, 0, 2, 20])
@pytest.mark.parametrize("storage", ["device", "cpu", "folder"])
def test_importance_is_the_papers_sum(window, signed, storage, tmp_path):
    model = model_of()
    tracker = TrajectoryTracker(window, signed=signed, storage=tmp_path / "ring" if storage == "folder" else storage)
    records = []
    for record in walk(model, 6):
        tracker.update(model)
        records.append(record)
        exact = expected(records, window, signed)
        found = tracker.importance()
        assert set(found) == {"0", "2"}
        for name, value in found.items():
            torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("storage", ["device", "folder"])
@pytest.mark.parametrize("window", [None, 2])
def test_saved_records_go_on(window, storage, tmp_path):
    model, records = model_of(), []
    where = {"storage": tmp_path / "first"} if storage == "folder" else {}
    tracker = TrajectoryTracker(window, **where)
    for number, record in enumerate(walk(model, 6)):
        if number == 4:
            tracker.save(tmp_path)
            tracker = TrajectoryTracker.load(tmp_path, **({"storage": tmp_path / "second"} if where else {}))
        tracker.update(model)
        records.append(record)
    for name, value in expected(records, window, False).items():
        torch.testing.assert_close(tracker.importance()[name].double(), value, rtol=1e-6, atol=1e-7)


def test_targets_choose_modules():
    model = model_of()
    tracker = TrajectoryTracker(targets="2")
    tracker.update(model)
    assert set(tracker.importance()) == {"2"}
    with pytest.raises(ValueError, match="no linear layer that matches"):
        TrajectoryTracker(targets="*.q_proj").update(model)


def test_a_window_holds_the_weights_dtype():
    model = model_of().bfloat16()
    tracker = TrajectoryTracker(3)
    tracker.update(model)
    assert tracker._kept["0"].dtype == torch.bfloat16
    assert tracker.importance()["0"].dtype == torch.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": -1}, "window must be"),
        ({"every": 0}, "every must be"),
        ({"every": "step"}, "every must be"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TrajectoryTracker(**settings)


def test_an_empty_tracker_and_a_changed_shape_say_so(tmp_path):
    tracker = TrajectoryTracker()
    with pytest.raises(ValueError, match="nothing has been recorded"):
        tracker.importance()
    tracker.update(model_of())
    with pytest.raises(ValueError, match="has shape"):
        tracker.update(nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 3)))
    assert tracker.count == 1
    with pytest.raises(ValueError, match="holds no trajectory"):
        TrajectoryTracker.load(tmp_path)


def trainer(folder, epochs, tracker, **settings):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(0, 32, (12, 8), generator=torch.Generator().manual_seed(4))
    data = [{"input_ids": row, "labels": row} for row in ids]
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=epochs,
        per_device_train_batch_size=4,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        **settings,
    )
    return Trainer(model, arguments, train_dataset=data, callbacks=[tracker])


class Keeper(TrajectoryTracker):
    """Keeps copies of the weights beside the records."""

    def update(self, model):
        super().update(model)
        self.copies = [*getattr(self, "copies", []), {n: w.double().clone() for n, w in self._weights(model)}]


@pytest.mark.parametrize("every", ["epoch", 2])
def test_the_trainer_records(tmp_path, every):
    tracker = Keeper(every=every)
    trainer(tmp_path, 3, tracker).train()
    assert tracker.count == {"epoch": 3, 2: 4}[every]
    exact = expected(tracker.copies, None, False)
    assert "model.layers.1.mlp.down_proj" in exact
    for name, value in tracker.importance().items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("window", [None, 1])
def test_resumed_training_gives_the_same_importance(tmp_path, window):
    whole = TrajectoryTracker(window)
    trainer(tmp_path / "whole", 3, whole).train()
    # The second run starts from the first one's checkpoint after an epoch, as after a kill.
    resumed = TrajectoryTracker(window)
    trainer(tmp_path / "whole", 3, resumed).train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.count == whole.count == 3
    for name, value in whole.importance().items():
        assert torch.equal(value, resumed.importance()[name]), name


def test_resuming_with_other_settings_or_without_records_says_so(tmp_path):
    trainer(tmp_path, 1, TrajectoryTracker(1)).train()
    with pytest.raises(ValueError, match="recorded with window=1"):
        trainer(tmp_path, 2, TrajectoryTracker(2)).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-3" / "trajectory.safetensors").unlink()
    with pytest.warns(UserWarning, match="holds no trajectory"):
        trainer(tmp_path, 2, TrajectoryTracker(2)).train(resume_from_checkpoint=True)


def test_a_tracker_starts_anew_with_each_training(tmp_path):
    tracker = TrajectoryTracker()
    trainer(tmp_path / "a", 1, tracker).train()
    first = copy.deepcopy(tracker.importance())
    trainer(tmp_path / "b", 1, tracker).train()
    assert tracker.count == 1
    assert all(torch.equal(value, first[name]) for name, value in tracker.importance().items())


def _sharded(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = model_of()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    tracker = TrajectoryTracker()
    for _ in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.25)
        tracker.update(model)
    tracker.save(folder)
    found = TrajectoryTracker.load(folder)
    assert found.count == 3
    whole = tracker.importance()
    if rank == 0:
        torch.save(whole, f"{folder}/whole.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_shards_are_followed_and_put_together(tmp_path):
    torch.multiprocessing.spawn(_sharded, (str(tmp_path),), nprocs=2)
    found = torch.load(tmp_path / "whole.pt")
    plain = model_of()
    for name in ("0", "2"):
        weight = plain.get_submodule(name).weight.detach().double()
        exact = sum((weight + 0.25 * n).abs() * n for n in (1, 2, 3)) / 6
        torch.testing.assert_close(found[name].double(), exact, rtol=1e-6, atol=1e-7)
    assert len(list(tmp_path.glob("trajectory-*-of-00002.safetensors"))) == 2


@pytest.mark.parametrize("storage", ["device", "folder"])
@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "a/b", "..", "x" * 300, "a\0b", "é"])
def test_names_of_records_stay_in_the_storage_folder(tmp_path, storage, name):
    facts = {"count": 1, "window": None, "every": "epoch", "signed": False, "targets": None}
    saved = tmp_path / "deep" / "saved"
    saved.mkdir(parents=True)
    save_file({name: torch.ones(1, 2, 3)}, saved / "trajectory.safetensors", {"trajectory": json.dumps(facts)})
    where = {"storage": tmp_path / "deep" / "ring"} if storage == "folder" else {}
    before = {file for file in tmp_path.rglob("*") if file.is_file()}
    tracker = TrajectoryTracker.load(saved, **where)
    assert torch.equal(tracker.importance()[name], torch.ones(2, 3))
    made = {file for file in tmp_path.rglob("*") if file.is_file()} - before
    assert {file.parent for file in made} == ({where["storage"]} if where else set())


FACTS = {"count": 2, "window": 1, "every": 3, "signed": False, "targets": ["*.q"]}


@pytest.mark.parametrize(
    ("facts", "tensor"),
    [
        ("[" * 10**5, None),
        ("{", None),
        ("[]", None),
        (FACTS | {"more": 1}, None),
        (FACTS | {"count": -1}, None),
        (FACTS | {"count": "2"}, None),
        (FACTS | {"count": 10**30}, None),
        (FACTS | {"window": 10**9}, None),
        (FACTS | {"window": True}, None),
        (FACTS | {"every": 0}, None),
        (FACTS | {"signed": 1}, None),
        (FACTS | {"targets": [["q"]]}, None),
        (FACTS, torch.ones(2, 3)),
        (FACTS, torch.ones(3, 2, 3)),
        (FACTS, torch.ones(2, 2, 3, dtype=torch.int64)),
        (FACTS | {"window": None}, torch.ones(1, 2, 3, dtype=torch.bfloat16)),
    ],
)
def test_damaged_records_are_refused(tmp_path, facts, tensor):
    text = facts if isinstance(facts, str) else json.dumps(facts)
    file = tmp_path / "trajectory.safetensors"
    save_file({"0": torch.ones(2, 2, 3) if tensor is None else tensor}, file, {"trajectory": text})
    for load in (TrajectoryTracker.load, Records):
        with pytest.raises(ValueError, match=r"trajectory\.safetensors is damaged") as error:
            load(tmp_path)
        assert len(str(error.value)) < 600 + len(str(tmp_path))


def test_an_empty_name_is_no_storage_folder():
    with pytest.raises(ValueError, match="storage is an empty name"):
        TrajectoryTracker(storage="")
