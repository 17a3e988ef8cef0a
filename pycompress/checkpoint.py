"""A compression's progress on disk: one file a finished block, written whole or not at all, and whose it is."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from pycompress._files import alone, encoded, folder_of, read_json, sweep_parts, write_whole
from pycompress.architectures.subnet import Subnet
from pycompress.formats.intact import check_tensors
from pycompress.formats.packed import Packed, rebuild
from pycompress.lm.identity import differing, digest_of
from pycompress.methods.registry import Curve
from pycompress.methods.structural import ShrinkConfig
from pycompress.recipe import Config, Recipe
from pycompress.report import Row
from pycompress.search.result import Result

RUN = "run.json"


GRADIENTS = "gradients"
CURVE = ("nbytes", "error", "candidate")


Finished = list[tuple[str, Packed | None, Row]]


class Checkpoint:
    """Gradients, curves and packed blocks of runs of `apply` in a directory; `path=None` keeps nothing.

    `identity`: what the directory is for, by name; its hash is in every file. Runs of several recipes share it, one
    after the other, and what they have in common: the gradients of the loss, and the curves of recipes that differ in
    `keep` and `targets` alone. A context manager: until it is left no other process, and no other run in this one,
    writes there. Raises `ValueError` when the directory is of another identity, naming what differs, is in use, or
    cannot be written.
    """

    def __init__(self, path: str | Path | None, identity: dict[str, str], recipe: Recipe) -> None:
        self.path = None if path is None else folder_of(path, "checkpoint")
        self.identity = digest_of(identity)
        self.recipe = _digest(repr(recipe))
        shrunk = [config for config in recipe if isinstance(config, ShrinkConfig)]
        packing = [config.of_any_size() for config in recipe if config not in shrunk]
        self.measured = _digest(repr(shrunk + packing))
        self.gradients = f"{GRADIENTS}-{_digest(repr(shrunk))}" if shrunk else GRADIENTS
        self._lock = ExitStack()
        if self.path is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot write the checkpoint directory {self.path}: {error.strerror}") from error
        with ExitStack() as stack:
            stack.enter_context(alone(self.path, "compression"))
            sweep_parts(self.path)
            differ = differing(self.path / RUN, identity)
            if differ:
                raise ValueError(
                    f"the checkpoint in {self.path} is of another {' and '.join(differ)}; "
                    f"give another directory, or delete this one to start over"
                )
            if not (self.path / RUN).exists():
                self._write(RUN, encoded(identity))
            self._lock = stack.pop_all()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.close()

    def save_curves(self, block: int, curves: dict[str, Curve]) -> None:
        """Add to the block's curves on file."""
        stem = f"curves-{self.measured}-{block:04d}"
        curves = self._curves(stem) | curves
        tensors = {f"{name}|{part}": getattr(c, part) for name, c in curves.items() for part in CURVE}
        self.save(stem, tensors, {"energy": {name: c.energy for name, c in curves.items()}})

    def load_curves(self, block: int, names: list[str]) -> dict[str, Curve] | None:
        """The curves of these modules, or None where one is missing."""
        return _all_of(names, self._curves(f"curves-{self.measured}-{block:04d}"))

    def _curves(self, stem: str) -> dict[str, Curve]:
        tensors, description = self.load(stem) or ({}, {"energy": {}})
        with self._sound(stem):
            return {
                name: Curve(energy=float(energy), **{part: tensors[f"{name}|{part}"] for part in CURVE})
                for name, energy in description["energy"].items()
            }

    def save_sensitivity(self, sensitivity: dict[str, Tensor]) -> None:
        """Add to the gradients on file."""
        known, _ = self.load(self.gradients) or ({}, {})
        self.save(self.gradients, known | sensitivity, {})

    def load_sensitivity(self, names: list[str]) -> dict[str, Tensor] | None:
        """The gradients of these modules, or None where one is missing."""
        known, _ = self.load(self.gradients) or ({}, {})
        return _all_of(names, known)

    def save_block(self, block: int, finished: Finished) -> None:
        tensors: dict[str, Tensor] = {}
        modules = []
        for name, packed, row in finished:
            modules.append({"name": name, "spec": None if packed is None else packed.spec(), "row": asdict(row)})
            for part, tensor in ({} if packed is None else packed.tensors()).items():
                tensors[f"{name}|{part}"] = tensor
        self.save(f"block-{self.recipe}-{block:04d}", tensors, {"modules": modules})

    def load_block(self, block: int) -> Finished | None:
        stem = f"block-{self.recipe}-{block:04d}"
        found = self.load(stem)
        if found is None:
            return None
        tensors, description = found
        with self._sound(stem):
            return [_finished(module, tensors) for module in description["modules"]]

    def stage(self, configs: Sequence[Config]) -> StageCheckpoint:
        """Where the last of these structural configs, run after the others, keeps its progress."""
        return StageCheckpoint(self, _digest(self.identity + repr(list(configs))), _digest(repr(list(configs[:-1]))))

    def save(self, stem: str, tensors: dict[str, Tensor], description: dict[str, Any]) -> None:
        """The tensors first, then the description with their hash: without the second the first does not count."""
        if self.path is None:
            return
        whose = {"identity": self.identity, "file": stem}
        data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, whose)
        self._write(f"{stem}.safetensors", data)
        described = whose | {"tensors": hashlib.sha256(data).hexdigest(), "description": description}
        self._write(f"{stem}.json", encoded(described))

    def load(self, stem: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if self.path is None or not (self.path / f"{stem}.json").exists():
            return None
        file, remedy = self.path / f"{stem}.safetensors", self._remedy(stem)
        content = read_json(self.path / f"{stem}.json", remedy)
        if (content.get("identity"), content.get("file")) != (self.identity, stem):
            raise ValueError(
                f"{self.path / stem}.json is of another model, data or version than {RUN} beside it; {remedy}"
            )
        try:
            data = file.read_bytes()
            tensors = load(data) if hashlib.sha256(data).hexdigest() == content.get("tensors") else None
        except (OSError, SafetensorError):
            tensors = None
        if tensors is None or not isinstance(content.get("description"), dict):
            raise ValueError(f"{file} is damaged or cut short; {remedy}")
        return tensors, content["description"]

    def _write(self, name: str, data: bytes) -> None:
        assert self.path is not None
        write_whole(self.path / name, data)

    @contextmanager
    def _sound(self, stem: str) -> Iterator[None]:
        """What a file holds is taken apart in this block; `ValueError` where it is not what such a file holds."""
        try:
            yield
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path}/{stem}.json is damaged: {error}; {self._remedy(stem)}") from error

    def _remedy(self, stem: str) -> str:
        return f"delete {stem}.safetensors and {stem}.json in {self.path}, and that part is done again"


@dataclass(frozen=True)
class StageCheckpoint:
    """Progress of one structural config: the subnet it chose, and the linears it has refitted.

    Configs that differ in size alone share their ranking and what refits take from the dense model; `before` stands for
    the configs that ran earlier.
    """

    checkpoint: Checkpoint
    key: str
    before: str

    @property
    def folder(self) -> Path | None:
        return self.checkpoint.path

    def save_ranking(self, of: str, tensors: dict[str, Tensor]) -> None:
        """`of`: what decides the ranking."""
        self.checkpoint.save(f"ranking-{_digest(of + self.before)}", tensors, {})

    def load_ranking(self, of: str) -> dict[str, Tensor] | None:
        found = self.checkpoint.load(f"ranking-{_digest(of + self.before)}")
        return None if found is None else found[0]

    def save_moments(self, block: int, moments: dict[str, list[Tensor]]) -> None:
        """Sums over what the dense block's linears read, by role."""
        tensors = {f"{role} {number}": part for role, parts in moments.items() for number, part in enumerate(parts)}
        stem = self._moments(block, list(moments))
        self.checkpoint.save(stem, tensors, {"parts": {role: len(parts) for role, parts in moments.items()}})

    def load_moments(self, block: int, roles: list[str]) -> dict[str, list[Tensor]] | None:
        stem = self._moments(block, roles)
        found = self.checkpoint.load(stem)
        if found is None:
            return None
        tensors, description = found
        with self.checkpoint._sound(stem):
            return {
                role: [tensors[f"{role} {n}"] for n in range(count)] for role, count in description["parts"].items()
            }

    def _moments(self, block: int, roles: list[str]) -> str:
        return f"moments-{_digest(self.before + repr(roles))}-{block:04d}"

    def save_subnet(self, subnet: Subnet, result: Result | None) -> None:
        """What was chosen, and the search that found it, if there was one."""
        found = None if result is None else result.to_json()
        self.checkpoint.save(f"subnet-{self.key}", {}, {"subnet": subnet.to_dict(), "search": found})

    def load_subnet(self) -> tuple[Subnet, Result | None] | None:
        stem = f"subnet-{self.key}"
        found = self.checkpoint.load(stem)
        if found is None:
            return None
        with self.checkpoint._sound(stem):
            text = found[1]["search"]
            return Subnet.from_dict(found[1]["subnet"]), None if text is None else Result.from_json(text)

    def save_refit(self, block: int, found: dict[str, tuple[Tensor, float]]) -> None:
        """Weights and errors of one block's refitted linears, by role."""
        tensors = {role: weight for role, (weight, _) in found.items()}
        errors = {role: error for role, (_, error) in found.items()}
        self.checkpoint.save(f"refit-{self.key}-{block:04d}", tensors, {"errors": errors})

    def load_refit(self, block: int) -> dict[str, tuple[Tensor, float]] | None:
        stem = f"refit-{self.key}-{block:04d}"
        found = self.checkpoint.load(stem)
        if found is None:
            return None
        with self.checkpoint._sound(stem):
            return {role: (found[0][role], float(error)) for role, error in found[1]["errors"].items()}

    def save_bases(self, block: int, bases: dict[str, Tensor]) -> None:
        """Bases of the residual stream in one block, by point and part."""
        self.checkpoint.save(f"bases-{self.key}-{block:04d}", bases, {})

    def load_bases(self, block: int) -> dict[str, Tensor] | None:
        found = self.checkpoint.load(f"bases-{self.key}-{block:04d}")
        return None if found is None else found[0]


def forget_recipes(path: str | Path) -> None:
    """Delete what recipes have finished in a directory; what was measured of the dense model stays for others."""
    for pattern in ("block-*", "refit-*", "subnet-*", "search-*"):
        # A description goes before its tensors, so that none is left without them.
        for file in sorted(Path(path).glob(pattern)):
            file.unlink(missing_ok=True)


def _finished(module: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[str, Packed | None, Row]:
    """A module's packed weight, whose tensors are what its spec says, and its row."""
    name, spec = module["name"], module["spec"]
    parts = {key.split("|")[1]: t for key, t in tensors.items() if key.split("|")[0] == name}
    fields: dict[str, Any] = {field: math.nan if value is None else value for field, value in module["row"].items()}
    row = Row(**fields)
    if spec is None:
        return name, None, row
    check_tensors(name, spec, parts)
    return name, rebuild(spec, parts), row


def _all_of(names: list[str], known: dict[str, Any]) -> dict[str, Any] | None:
    return {name: known[name] for name in names} if known.keys() >= set(names) else None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
