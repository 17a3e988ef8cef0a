"""transformers' Trainer as recovery runs it: rows in a fixed order, and checkpoints that hold what trains."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from pycompress._files import finite, hash_of_file, read_json, sweep_parts, write_json, write_whole
from pycompress.lm.identity import differing, digest_of
from pycompress.recovery.objective import Objective
from pycompress.recovery.rows import Sample, collate

TRAINED = "trained.safetensors"
RUN = "recovery.json"
STATE = "trainer_state.json"
HASHES = "hashes.json"  # written last: a checkpoint without it is not whole


class RecoveryTrainer(Trainer):
    """Trains a causal LM on rows, each seen once and in order; checkpoints hold the trained parameters.

    `zeros`: where parameters, by name, stay zero. `identity`: the hash of what the checkpoints belong to.
    """

    def __init__(
        self,
        objective: Objective,
        args: TrainingArguments,
        rows: Sequence[Sample],
        callbacks: Sequence[TrainerCallback],
        zeros: dict[str, Tensor],
        identity: str,
    ) -> None:
        super().__init__(
            objective, args, data_collator=collate, train_dataset=rows, callbacks=[*callbacks, KeepZeros(zeros)]
        )
        self.student = objective.model
        self.identity = identity
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)

    def finish(self, found: tuple[Path, dict[str, Any]] | None) -> list[dict[str, float]]:
        """Train to the last step, from a checkpoint and its state if there is one; the log of all steps."""
        if found is not None and found[1]["global_step"] >= self.args.max_steps:
            self._load_from_checkpoint(str(found[0]))
            return found[1]["log_history"]
        self.train(resume_from_checkpoint=None if found is None else str(found[0]))
        return self.state.log_history

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        rows: Any = train_dataset or self.train_dataset
        return SequentialSampler(rows)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not bool(torch.isfinite(loss)):
            raise RuntimeError(
                f"the loss of step {self.state.global_step + 1} is {float(loss)}; the model is as the step before left "
                f"it: load it again and lower lr ({self.args.learning_rate})"
            )
        return loss

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().cpu().contiguous() for name, p in _trained(self.student)}, folder / TRAINED)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A checkpoint, its hashes last; then older ones go. An error or interruption leaves no part of it."""
        folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            if self.args.should_save:
                (folder / HASHES).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)
            if self.args.world_size > 1:
                torch.distributed.barrier()
            if self.args.should_save:
                state = json.loads((folder / STATE).read_text())
                write_whole(folder / STATE, json.dumps(finite(state), indent=2, allow_nan=False).encode())
                hashes = {path.name: hash_of_file(path) for path in sorted(folder.iterdir()) if path.is_file()}
                write_json(folder / HASHES, {"identity": self.identity, "files": hashes})
        except BaseException:
            if self.args.should_save and not (folder / HASHES).exists():
                shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save and limit:
            for path in checkpoints_in(folder.parent)[:-limit]:
                shutil.rmtree(path, ignore_errors=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint) / TRAINED
        trained, saved = dict(_trained(self.student)), load_file(file)
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in trained.items()}:
            raise ValueError(f"{file} is of another model; {_remedy(file.parent)}")
        with torch.no_grad():
            for name, tensor in saved.items():
                trained[name].copy_(tensor)


class KeepZeros(TrainerCallback):
    """Puts parts of parameters back to zero after each step, whatever the optimizer did to them."""

    def __init__(self, zeros: dict[str, Tensor]) -> None:
        self.zeros = zeros

    @torch.no_grad()
    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for name, mask in self.zeros.items():
            parameter = kwargs["model"].get_parameter(f"model.{name}")
            parameter.masked_fill_(mask.to(parameter.device), 0)


class TrainingBar(TrainerCallback):
    """A progress bar with the last loss."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        hidden = not state.is_world_process_zero
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="recover", unit="step", disable=hidden)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.bar.set_postfix(loss=f"{kwargs['logs']['loss']:.3f}")

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.bar.close()


@contextmanager
def accelerate_kept() -> Iterator[None]:
    """Put back what accelerate shares between all of its users in the process, which each TrainingArguments resets."""
    from accelerate.state import AcceleratorState, GradientState, PartialState  # type: ignore[import-untyped]

    shared = [kind._shared_state for kind in (AcceleratorState, GradientState, PartialState)]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, known in zip(shared, before, strict=True):
            state.clear()
            state.update(known)


def checkpoints_in(folder: Path) -> list[Path]:
    """The folders of checkpoints, whole or not, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def resumed(folder: Path, identity: dict[str, str], resume: bool, writes: bool) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, if there is one; `ValueError` for one that is not of this run."""
    checkpoints = checkpoints_in(folder)
    if checkpoints and not resume:
        raise ValueError(f"{folder} holds checkpoints; delete it or give another directory to start over")
    if checkpoints and not (folder / RUN).exists():
        raise ValueError(f"{folder} holds checkpoints, but no {RUN} that says of what; give another directory")
    differ = differing(folder / RUN, identity) if checkpoints else []
    if differ:
        raise ValueError(
            f"the checkpoints in {folder} are of another {' and '.join(differ)}; to go on, load the model as it "
            f"was and repeat the call, or give another directory"
        )
    found = _last(checkpoints, digest_of(identity))
    if writes:
        sweep_parts(folder)
        for path in checkpoints:
            if not (path / HASHES).exists():
                shutil.rmtree(path, ignore_errors=True)
        if found is None:
            write_json(folder / RUN, identity)
    return found


def _last(checkpoints: list[Path], identity: str) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint whose writing was not interrupted, and the Trainer's state in it.

    Raises `ValueError`, naming the file, where one of its files is missing, damaged or of another run.
    """
    for path in reversed(checkpoints):
        if (path / HASHES).exists():
            _check_hashes(path, identity)
            return path, json.loads((path / STATE).read_text())
    return None


def _check_hashes(path: Path, identity: str) -> None:
    content = read_json(path / HASHES, _remedy(path))
    if content.get("identity") != identity:
        raise ValueError(f"{path} is of another run; {_remedy(path)}")
    files = content["files"]
    if not {TRAINED, STATE} <= files.keys():
        raise ValueError(f"{path / HASHES} is damaged; {_remedy(path)}")
    for name, known in files.items():
        file = path / Path(name).name
        if not file.is_file():
            raise ValueError(f"{file} is missing; {_remedy(path)}")
        if hash_of_file(file) != known:
            raise ValueError(f"{file} is damaged; {_remedy(path)}")


def _remedy(path: Path) -> str:
    return f"delete {path} to go on from the checkpoint before it"


def _trained(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
