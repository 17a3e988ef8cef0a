"""transformers' Trainer as recovery runs it: rows in a fixed order, and checkpoints that hold what trains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from pycompress.objective import Objective
from pycompress.rows import Row, collate

TRAINED = "trained.safetensors"
STATE = "trainer_state.json"  # the Trainer writes it last


class RecoveryTrainer(Trainer):
    """Trains a causal LM on rows, each seen once and in order; checkpoints hold the trained parameters.

    `zeros`: where parameters, by name, stay zero.
    """

    def __init__(
        self,
        objective: Objective,
        args: TrainingArguments,
        rows: Sequence[Row],
        callbacks: Sequence[TrainerCallback],
        zeros: dict[str, Tensor],
        progress: bool,
    ) -> None:
        super().__init__(
            objective, args, data_collator=collate, train_dataset=rows, callbacks=[*callbacks, KeepZeros(zeros)]
        )
        self.student = objective.model
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if progress:
            self.add_callback(Bar())

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

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        file = Path(resume_from_checkpoint) / TRAINED
        trained = dict(_trained(self.student))
        try:
            saved = load_file(file)
        except (OSError, SafetensorError):
            saved = {}
        if {n: t.shape for n, t in saved.items()} != {n: p.shape for n, p in trained.items()}:
            raise ValueError(f"{file} is damaged; delete {file.parent} to go on from the checkpoint before it")
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


class Bar(TrainerCallback):
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


def last_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint in `folder` that is whole, and the Trainer's state in it."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        try:
            return path, json.loads((path / STATE).read_text())
        except (OSError, ValueError):
            continue
    return None


def _trained(model: PreTrainedModel) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]
