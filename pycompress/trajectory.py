"""Weight evolution along training: how large each weight was, later records counting more (arXiv:2502.17071)."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from pycompress._files import folder_of, write_whole
from pycompress.calibration.records import STEM, facts_of, importance, opened

# What wrappers put before a module's name.
WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "module.")


LONGEST_STEM = 120


class TrajectoryTracker(TrainerCallback):
    """Records weight magnitudes while a model trains, and sums them up to an importance.

    After record n, `importance()` gives for each tracked weight, of its shape and in float32, `Σ_{l=0..k} |w(n-l)|
    (n-l) / Σ_{l=0..k} (n-l)`: the weight's own unit, later records counting more. It is a callback of
    `transformers.Trainer`, or `tracker.update(model)` in a loop of one's own. The Trainer's checkpoints carry the
    records (`trajectory-….safetensors`) and resuming from one goes on with them. Each process of a sharded run records
    its own shards.

    Parameters
    ----------
    window
        k, how many records before the last count; None for all of them, which takes one float32 sum a weight; k takes
        k + 1 copies of the weights in their dtype.
    every
        "epoch", or a number of optimiser steps between two records.
    signed
        Averages the weights themselves, and takes the magnitude of the average.
    targets
        Patterns over module names, as in "model.layers.0.*"; None for every linear layer.
    storage
        "device" keeps records where the weights are, "cpu" in memory; any other value is a folder for memory-mapped
        files.

    Raises
    ------
    ValueError
        For settings out of range, targets that match nothing, and weights whose shape is another than at the first
        record.

    Reference: arXiv:2502.17071.
    """

    def __init__(
        self,
        window: int | None = None,
        every: str | int = "epoch",
        signed: bool = False,
        targets: str | Sequence[str] | None = None,
        storage: str | Path = "device",
    ) -> None:
        if window is not None and (not isinstance(window, int) or isinstance(window, bool) or window < 0):
            raise ValueError(f"window must be None for all records or an integer of at least 0, got {window!r}")
        if every != "epoch" and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f'every must be "epoch" or a number of steps of at least 1, got {every!r}')
        if storage not in ("device", "cpu"):
            folder_of(storage, "storage")
        self.window = window
        self.every = every
        self.signed = signed
        self.targets = (targets,) if isinstance(targets, str) else None if targets is None else tuple(targets)
        self.storage = storage
        self.count = 0
        self._kept: dict[str, Tensor] = {}
        self._whole: dict[str, Callable[[Tensor], Tensor]] = {}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Record the weights as they are now."""
        found = dict(self._weights(model))
        if not found:
            asked = "no linear layer" if self.targets is None else f"no linear layer that matches {self.targets}"
            raise ValueError(f"the model has {asked}; give targets as patterns over its modules' names")
        for name, weight in found.items():
            kept = self._kept.get(name)
            if kept is not None and kept.shape[1:] != weight.shape:
                raise ValueError(f"{name} has shape {list(weight.shape)} and had {list(kept.shape[1:])} when recorded")
        self.count += 1
        for name, weight in found.items():
            kept = self._kept.get(name)
            if kept is None:
                kept = self._buffer(name, weight)
            elif self.storage == "device":
                kept = kept.to(weight.device)
            self._kept[name] = kept
            self._record(kept, weight)

    def importance(self) -> dict[str, Tensor]:
        """Importance of each tracked weight by module name, float32, sharded weights put together."""
        if not self.count:
            raise ValueError("nothing has been recorded yet; call update(model) or train with the tracker first")
        return {name: self._whole.get(name, _same)(self._importance(kept)) for name, kept in self._kept.items()}

    def save(self, folder: str | Path) -> None:
        """Write the records to `folder`, which is made if it is not there, a file a process."""
        settings = {"window": self.window, "every": self.every, "signed": self.signed, "targets": self.targets}
        facts = {"count": self.count, **settings}
        tensors = {name: kept.contiguous() for name, kept in self._kept.items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_whole(_file(Path(folder)), save(tensors, {STEM: json.dumps(facts)}))

    @classmethod
    def load(cls, folder: str | Path, storage: str | Path = "device") -> TrajectoryTracker:
        """A tracker with the records that `save` wrote. Raises ValueError where there are none."""
        file = _file(Path(folder))
        with opened(file) as tensors:
            facts = facts_of(tensors, file)
        count = facts.pop("count")
        tracker = cls(**facts, storage=storage)
        tracker._read(file, count)
        return tracker

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with the checkpoint's records."""
        self._whole.clear()
        if state.global_step == 0:
            self.count, self._kept = 0, {}
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        given = args.resume_from_checkpoint
        if isinstance(given, str) and _file(Path(given)).exists():
            folder = Path(given)
        if not _file(folder).exists():
            warnings.warn(f"{folder} holds no trajectory: records begin at step {state.global_step}", stacklevel=2)
            return
        with opened(_file(folder)) as tensors:
            facts = facts_of(tensors, _file(folder))
        known = {"window": self.window, "every": self.every, "signed": self.signed}
        differ = [name for name, value in known.items() if facts[name] != value]
        if differ:
            name = differ[0]
            raise ValueError(
                f"the trajectory in {folder} was recorded with {name}={facts[name]!r}, "
                f"this tracker has {name}={known[name]!r}; set it to the former to go on"
            )
        self._read(_file(folder), facts["count"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every == "epoch":
            self.update(kwargs["model"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.every != "epoch" and state.global_step % int(self.every) == 0:
            self.update(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.count:
            self.save(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    def _weights(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """Tracked weights by plain module name, shards as local tensors."""
        for name, module in model.named_modules():
            plain = _plain(name)
            if not isinstance(module, (nn.Linear, Conv1D)):
                continue
            if self.targets is not None and not any(fnmatchcase(plain, target) for target in self.targets):
                continue
            weight = getattr(module, "weight", None)
            if not isinstance(weight, Tensor) or weight.ndim != 2:
                raise ValueError(
                    f"{plain} holds no weight matrix of its own, as under FSDP with flat parameters; "
                    f"train with use_orig_params or FSDP2 to follow it"
                )
            if isinstance(weight, DTensor):
                self._whole[plain] = partial(_gathered, weight)
                weight = weight.to_local()
            yield plain, weight.detach()

    def _buffer(self, name: str, weight: Tensor) -> Tensor:
        """Room for the records of one weight: a sum `[1, *shape]`, or a ring `[window + 1, *shape]`."""
        shape = (1 if self.window is None else self.window + 1, *weight.shape)
        dtype = torch.float32 if self.window is None else weight.dtype
        if self.storage in ("device", "cpu"):
            device = weight.device if self.storage == "device" else torch.device("cpu")
            return torch.zeros(shape, dtype=dtype, device=device)
        folder = Path(self.storage)
        folder.mkdir(parents=True, exist_ok=True)
        # Names are those of modules or of a file, and may be of any characters and length.
        stem = quote(name, safe="")
        stem = stem if len(stem) <= LONGEST_STEM else f"{stem[:LONGEST_STEM]}-{sha256(name.encode()).hexdigest()}"
        file = folder / f"{stem}{_rank_suffix()}.bin"
        return torch.from_file(str(file), shared=True, size=int(torch.Size(shape).numel()), dtype=dtype).view(shape)

    def _record(self, kept: Tensor, weight: Tensor) -> None:
        if self.window is not None:
            kept[self.count % len(kept)].copy_(weight)
            return
        if self.count == 1:
            kept.zero_()
        value = weight if self.signed else weight.abs()
        kept[0].add_(value.to(kept.device, torch.float32), alpha=self.count)

    def _importance(self, kept: Tensor) -> Tensor:
        return importance(kept, self.count, self.window, self.signed)

    def _read(self, file: Path, count: int) -> None:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                value = tensors.get_tensor(name)
                if self.storage in ("device", "cpu"):
                    self._kept[name] = value
                else:
                    self._kept[name] = self._buffer(name, value[0])
                    self._kept[name].copy_(value)
        self.count = count


def _same(value: Tensor) -> Tensor:
    return value


def _gathered(like: DTensor, part: Tensor) -> Tensor:
    """The whole of a value of which `part` is this process' shard, cut as `like` is."""
    whole = DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())
    return whole.full_tensor()


def _plain(name: str) -> str:
    """A module's name in the model that was wrapped."""
    name = f"{name}."
    for wrapper in WRAPPERS[:2]:
        name = name.replace(wrapper, "")
    return name.removeprefix(WRAPPERS[2]).removesuffix(".")


def _rank_suffix() -> str:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    world = torch.distributed.get_world_size() if distributed else 1
    return f"-{torch.distributed.get_rank() + 1:05d}-of-{world:05d}" if distributed and world > 1 else ""


def _file(folder: Path) -> Path:
    return folder / f"{STEM}{_rank_suffix()}.safetensors"
