"""Recovery: a compressed model is trained on for a few tokens, so that it regains some of what it lost."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from pycompress._files import alone, folder_of
from pycompress.hub.record import check_not_quantized
from pycompress.lm.head import require_known_head
from pycompress.lm.identity import digest_of, hash_of, identity_of
from pycompress.lm.model import embedding, evaluation
from pycompress.lm.state import environment_kept, kept, neutral
from pycompress.recovery.objective import Distillation, Objective
from pycompress.recovery.rows import Sample, draw, source
from pycompress.recovery.trainable import gradients_masked, lora_targets, trained_parameters, training_form, zeros_of

# pycompress.training and transformers' Trainer take a second to import, which those who never train do not wait for.
if TYPE_CHECKING:
    from transformers import TrainingArguments

# Of AdamW at its peak.
LEARNING_RATES = {"lora": 5e-4, "full": 5e-5, "factors": 1e-4}
# TrainingArguments that have an argument of their own.
OWN = {
    "output_dir": "output_dir",
    "max_steps": "tokens",
    "num_train_epochs": "tokens",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "learning_rate": "lr",
    "weight_decay": "weight_decay",
    "lr_scheduler_type": "scheduler",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "seed": "seed",
    "save_steps": "save_steps",
    "bf16": "precision",
    "disable_tqdm": "progress",
}


@dataclass(frozen=True)
class Recovery:
    """What a recovery did: the loss of each step in nats a token, tokens seen, seconds of this call.

    `losses` has an entry a step, or a mean for every `logging_steps` of them where `train` sets that. `checkpoints` is
    the directory that holds them, or None.
    """

    losses: tuple[float, ...]
    tokens: int
    seconds: float
    checkpoints: Path | None

    def __str__(self) -> str:
        change = f"loss {self.losses[0]:.3f} to {self.losses[-1]:.3f}" if self.losses else "no step"
        return f"{self.tokens} tokens in {self.seconds:.0f} s, {change} over {len(self.losses)} steps"


@dataclass(frozen=True)
class _RecoverSettings:
    """Everything but the model and the data that decides the result."""

    method: str
    lr: float
    batch_size: int
    gradient_accumulation: int
    warmup: float
    weight_decay: float
    scheduler: str
    seed: int
    precision: str
    lora_rank: int
    lora_targets: tuple[str, ...] | None
    keep_zeros: bool
    distillation: tuple[int, float, float] | None
    train: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        if self.method not in LEARNING_RATES:
            raise ValueError(f"method must be one of {', '.join(map(repr, LEARNING_RATES))}, got {self.method!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be above 0, got {self.lr!r}")
        for name in ("batch_size", "gradient_accumulation", "lora_rank"):
            _check_count(name, getattr(self, name))
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup is a fraction of the steps in [0, 1), got {self.warmup!r}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay!r}")
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision must be 'float32', 'bfloat16' or None, got {self.precision!r}")
        if self.keep_zeros and self.method != "full":
            raise ValueError(
                f'keep_zeros goes with method="full", got {self.method!r}; a low-rank product has no zeros to keep'
            )


def recover(
    model: PreTrainedModel,
    dataset: Any,
    *,
    tokens: int,
    method: str = "lora",
    lr: float | None = None,
    tokenizer: Any = None,
    window: int | None = None,
    bos: bool | None = None,
    batch_size: int = 4,
    gradient_accumulation: int = 1,
    warmup: float = 0.05,
    weight_decay: float = 0.0,
    scheduler: str = "cosine",
    seed: int = 0,
    precision: str | None = None,
    lora_rank: int = 16,
    lora_targets: Sequence[str] | None = None,
    keep_zeros: bool = False,
    teacher: PreTrainedModel | None = None,
    distill_weight: float = 0.5,
    distill_top_k: int = 64,
    temperature: float = 1.0,
    output_dir: str | Path | None = None,
    save_steps: int | None = None,
    resume: bool = True,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
    train: Any = None,
) -> Recovery:
    """Train a compressed causal LM in place for `tokens` tokens, on transformers' Trainer, also under torchrun.

    An error or Ctrl-C leaves the model valid, with the parameters that train as the last step made them. However the
    call ends, all else is as before: modes, `requires_grad`, hooks, gradient checkpointing, random generators, the
    environment; autocast, `no_grad` and the default dtype do not reach it. The model goes to the Trainer's device and
    stays there.

    Parameters
    ----------
    model
        A model of transformers, compressed or not.
    dataset
        Texts or conversations (with a `tokenizer`), token windows `[N, T]` int64, batches, or a map-style dataset whose
        items have `input_ids` `[T]` and may have `labels` `[T]`, -100 for what is not predicted. What an
        `attention_mask` masks is left out. Rows are drawn by `seed`, and again when all were seen, which is warned of.
    tokens
        To train on; steps are whole.
    method
        "lora" trains adapters and merges them into the weights; "factors" trains what packed layers hold in floats:
        centroids, factors, biases; "full" trains every float parameter. Labels, codes and rounded weights stay.
    lr
        AdamW's at its peak; None for 5e-4, 1e-4 and 5e-5 of "lora", "factors" and "full".
    tokenizer
        The model's own; for texts and conversations.
    window
        Ids that texts are cut into; None for 512 or what fits the model.
    bos
        Whether a BOS goes before each window; None for what the tokenizer does.
    batch_size, gradient_accumulation
        Rows of a step: their product, times the number of processes.
    warmup
        The fraction of the steps in which the learning rate rises to its peak.
    weight_decay, scheduler
        AdamW's, and a name of transformers' SchedulerType.
    seed
        Of the rows and the adapters.
    precision
        Of the arithmetic: "float32", or "bfloat16" by autocast; None for bfloat16 on a GPU that has it. What trains is
        held in float32 and goes back to its own dtype in the end.
    lora_rank, lora_targets
        Of the adapters: their rank, and the linears by roles or patterns, None for every ordinary linear of the blocks.
    keep_zeros
        With "full": zeros in the blocks' linears stay zeros.
    teacher
        A model with the same vocabulary, such as the dense one, on any device; the loss is then `(1 - distill_weight)`
        times the cross-entropy plus `distill_weight` times `temperature²` times the divergence from the teacher's
        `distill_top_k` likeliest tokens and all others as one class.
    distill_weight, temperature, distill_top_k
        As said of `teacher`.
    train
        Further `TrainingArguments`, as such or as a dict.
    output_dir
        Holds the Trainer's checkpoints, with the trained parameters in safetensors and a hash of every file; one
        recovery at a time writes there. After a kill, load the model again and repeat the call: it goes on from the
        last checkpoint and ends with the same bits.
    save_steps
        Between two checkpoints; None for a tenth of the steps.
    progress
        Whether a bar is shown.

    Returns
    -------
    Recovery
        The losses, tokens and seconds.

    Raises
    ------
    ValueError, TypeError
        For what cannot be used, before the model is changed.
    ImportError
        Without accelerate, or without peft for "lora".

    Reference: arXiv:2106.09685 (LoRA).
    """
    _check_count("tokens", tokens)
    _check_installed(method)
    output = None if output_dir is None else folder_of(output_dir, "output_dir")
    models = _models(model, teacher)
    from pycompress.recovery.trainer import TrainingBar, accelerate_kept, resumed

    started = time.perf_counter()
    with environment_kept(), accelerate_kept(), kept(*models), neutral(), ExitStack() as stack:
        settings = _RecoverSettings(
            method,
            LEARNING_RATES.get(method, 1.0) if lr is None else lr,
            batch_size,
            gradient_accumulation,
            warmup,
            weight_decay,
            scheduler,
            seed,
            _default_precision() if precision is None else precision,
            lora_rank,
            None if lora_targets is None else tuple([lora_targets] if isinstance(lora_targets, str) else lora_targets),
            keep_zeros,
            None if teacher is None else (distill_top_k, temperature, distill_weight),
            _overrides(train),
        )
        job = _Finetuning(model, teacher, settings)
        folder = output or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        args = job.arguments(folder, "no" if output is None else "steps")
        per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        rows = draw(model, source(model, dataset, tokenizer, window, bos), tokens, per_step, seed)
        args.max_steps = len(rows) // per_step
        args.warmup_steps = math.ceil(warmup * args.max_steps)
        args.save_steps = max(1, args.max_steps // 10) if save_steps is None else _check_count("save_steps", save_steps)
        identity = {} if output is None else job.identity(rows, args.world_size)
        found = None
        if output is not None:
            if args.process_index == 0:
                _make_folder(output)
                stack.enter_context(alone(output, "recovery"))
            found = resumed(output, identity, resume, args.process_index == 0)
        losses = job.run(args, rows, found, [*callbacks, *([TrainingBar()] if progress else [])], digest_of(identity))
    seen = sum(len(row.input_ids) for row in rows)
    return Recovery(losses, seen, time.perf_counter() - started, output)


class _Finetuning:
    """One recovery: what is trained, on what objective. Nothing is changed before `run`."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None, settings: _RecoverSettings) -> None:
        _check_model(model, teacher)
        self.model = model
        self.settings = settings
        self.distillation = None
        if teacher is not None and settings.distillation is not None:
            self.distillation = Distillation(teacher, *settings.distillation)
        self.lora: tuple[list[str], int] | None = None
        self.trained: list[str] = []
        if settings.method == "lora":
            self.lora = lora_targets(model, settings.lora_targets), settings.lora_rank
        else:
            self.trained = trained_parameters(model, settings.method)
        self.zeros = zeros_of(model, self.trained) if settings.keep_zeros else {}

    def arguments(self, folder: Path, save_strategy: str) -> TrainingArguments:
        """The Trainer's arguments, but for what follows from the number of steps."""
        from transformers import TrainingArguments

        own: dict[str, Any] = {
            "output_dir": str(folder),
            "per_device_train_batch_size": self.settings.batch_size,
            "gradient_accumulation_steps": self.settings.gradient_accumulation,
            "learning_rate": self.settings.lr,
            "weight_decay": self.settings.weight_decay,
            "lr_scheduler_type": self.settings.scheduler,
            "seed": self.settings.seed,
            "bf16": self.settings.precision == "bfloat16",
            "save_strategy": save_strategy,
            "save_total_limit": 2,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "report_to": "none",
            "use_cpu": not torch.accelerator.is_available(),
        }
        args = TrainingArguments(**(own | dict(self.settings.train)))
        if args.save_only_model and save_strategy != "no":
            raise ValueError("save_only_model=True leaves checkpoints without the optimizer; leave it out of train")
        sharding = [name for name in ("fsdp", "deepspeed") if getattr(args, name) or _asked_of_accelerate(name)]
        if sharding:
            raise ValueError(
                f"recover cannot put back a model that {sharding[0]} has sharded; run it under torchrun, where every "
                f"process holds the whole model"
            )
        return args

    def identity(self, rows: list[Sample], processes: int) -> dict[str, str]:
        """What checkpoints belong to."""
        return identity_of(self.model) | {
            "teacher": "none" if self.distillation is None else hash_of(self.distillation.teacher),
            "data": _hash_of_rows(rows),
            "settings": repr(self.settings),
            "number of processes": str(processes),
        }

    def run(
        self,
        args: TrainingArguments,
        rows: list[Sample],
        found: tuple[Path, dict[str, Any]] | None,
        callbacks: Sequence[Any],
        identity: str,
    ) -> tuple[float, ...]:
        """Train to the end, from the checkpoint that was found; the losses of all steps."""
        from transformers import set_seed

        from pycompress.recovery.trainer import RecoveryTrainer

        model = self.model
        set_seed(self.settings.seed)
        with ExitStack() as stack:
            if self.distillation is not None:
                stack.enter_context(evaluation(self.distillation.teacher))
            whole = self.settings.precision == "float32"
            stack.enter_context(training_form(model, self.trained, whole, self.lora))
            stack.enter_context(gradients_masked(model, self.zeros))
            trainer = RecoveryTrainer(Objective(model, self.distillation), args, rows, callbacks, self.zeros, identity)
            history = trainer.finish(found)
        return tuple(entry["loss"] for entry in history if "loss" in entry)


def _overrides(train: Any) -> tuple[tuple[str, Any], ...]:
    """Settings of `train` that are not the Trainer's defaults, by name."""
    if train is None:
        return ()
    from transformers import TrainingArguments

    if isinstance(train, TrainingArguments):
        default = TrainingArguments()
        names = [field.name for field in fields(TrainingArguments) if field.init]
        train = {n: getattr(train, n) for n in names if getattr(train, n) != getattr(default, n)}
    if not isinstance(train, dict):
        raise TypeError(f"train must be TrainingArguments or a dict of its fields, got {type(train).__name__}")
    for name in train:
        if name in OWN:
            raise ValueError(f"train sets {name}; give recover's own argument {OWN[name]} instead")
    return tuple(sorted(train.items()))


def _models(model: Any, teacher: Any) -> list[PreTrainedModel]:
    """The model, and its teacher if it has one."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a transformers causal LM, got {type(model).__name__}; merge adapters first")
    if teacher is not None and not isinstance(teacher, PreTrainedModel):
        raise TypeError(f"teacher must be a transformers causal LM, got {type(teacher).__name__}")
    return [model] if teacher is None else [model, teacher]


def _check_model(model: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
    if getattr(model, "peft_config", None):
        raise ValueError("the model has adapters; merge them first: peft's merge_and_unload()")
    check_not_quantized(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("parts of the model are on the meta device or offloaded; load it whole")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("the model was made under torch.inference_mode, so it cannot train; load it outside of that")
    for each in _models(model, teacher):
        with evaluation(each):
            require_known_head(each, torch.arange(8).clamp(max=len(embedding(each)) - 1))
    if teacher is None:
        return
    if {id(parameter) for parameter in model.parameters()} & {id(parameter) for parameter in teacher.parameters()}:
        raise ValueError("teacher shares parameters with the model, which training changes; load it on its own")
    if len(embedding(teacher)) != len(embedding(model)):
        raise ValueError(
            f"teacher has a vocabulary of {len(embedding(teacher))}, the model one of {len(embedding(model))}; "
            f"take a teacher with the model's tokenizer"
        )


def _check_installed(method: str) -> None:
    for package in ("accelerate", "peft") if method == "lora" else ("accelerate",):
        if find_spec(package) is None:
            raise ImportError(f"recover needs {package}: pip install pycompress[recover]")


def _check_count(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def _asked_of_accelerate(sharding: str) -> bool:
    """Whether `accelerate launch` asks for it."""
    return os.environ.get(f"ACCELERATE_USE_{sharding.upper()}", "false").lower() in ("true", "1")


def _default_precision() -> str:
    return "bfloat16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "float32"


def _hash_of_rows(rows: list[Sample]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for tensor in row:
            digest.update(f"{len(tensor)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to {folder}: {error.strerror}") from error
