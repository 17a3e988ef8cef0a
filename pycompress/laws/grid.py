"""What a sweep measures, as a YAML file: models × methods × keeps × recovery × seeds, checked before anything runs."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from pycompress import recipe as recipes
from pycompress._files import read_text
from pycompress.recipe import CONFIGS, Config

T = TypeVar("T")


@dataclass(frozen=True)
class Passage:
    """A text file as windows of tokens: the first `windows` of it for a test, spread over it for calibration."""

    text: str
    window: int = 512
    windows: int = 64

    def __post_init__(self) -> None:
        _counts(self, "window", "windows")
        if not isinstance(self.text, str):
            raise ValueError(f"text must be a file, got {self.text!r}")

    def identity(self) -> dict[str, Any]:
        """What decides a measurement: the text itself, not where it lies."""
        return {"text": digest(read_text(self.text)), "window": self.window, "windows": self.windows}


@dataclass(frozen=True)
class Scoring(Passage):
    """The text of the loss. `dtype`: arithmetic of loss and tasks: as saved ("auto"), or converted to another."""

    windows: int = 8
    dtype: str = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_dtype(self.dtype)

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"dtype": self.dtype}


@dataclass(frozen=True)
class Tasks:
    """Tasks whose accuracy is measured: `names`, the folder `data` of their files if they have one, questions each."""

    names: tuple[str, ...] = ()
    data: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", (self.names,) if isinstance(self.names, str) else tuple(self.names or ()))
        if self.limit is not None:
            _counts(self, "limit")


@dataclass(frozen=True)
class SpeedSettings:
    """Of `measure.compare_speed`."""

    batch: int = 1
    prompt: int = 128
    new_tokens: int = 32
    repeats: int = 3

    def __post_init__(self) -> None:
        _counts(self, "batch", "prompt", "new_tokens", "repeats")


@dataclass(frozen=True)
class RecoverySettings:
    """Of `recover`: fine-tuning on `text`, by default the calibration's. `lr` None: the method's own."""

    tokens: tuple[int, ...] = (0,)
    text: str | None = None
    method: str = "lora"
    lr: float | None = None
    window: int = 512
    batch_size: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", token_counts(self.tokens))
        _counts(self, "window", "batch_size")
        if self.lr is not None and (not isinstance(self.lr, (int, float)) or not self.lr > 0):
            raise ValueError(f"lr must be above 0, got {self.lr!r}; write 1.0e-4, since YAML takes 1e-4 for a word")

    def identity(self) -> dict[str, Any]:
        """The settings that decide a result, the text's own content among them."""
        plain = {name: value for name, value in dataclasses.asdict(self).items() if name != "tokens"}
        return plain | {"text": self.text and digest(read_text(self.text))}


# What of it a method may have of its own.
RECOVERY = ("tokens", "method", "lr", "window", "batch_size")


@dataclass(frozen=True)
class GridMethod:
    """A recipe in plain values whose `keep` is open, or that says everything; `keeps` of its own, and what of the
    grid's `recovery` is other for it.
    """

    label: str
    entries: tuple[dict[str, Any], ...]
    keeps: tuple[float, ...] | None = None
    recovery: dict[str, Any] = field(default_factory=dict)

    @property
    def open(self) -> bool:
        """Whether an entry waits for its `keep`."""
        return any(_open(entry) for entry in self.entries)

    @property
    def seeded(self) -> bool:
        """Whether a seed decides anything."""
        return any(_has(entry, "seed") and "seed" not in entry for entry in self.entries)

    def recipe(self, keep: float | None, seed: int) -> list[Config]:
        """The configs with what was open filled in. Raises `ValueError` for a setting that a method does not take."""
        filled = []
        for entry in self.entries:
            more: dict[str, Any] = {} if keep is None else _size(entry, keep)
            more |= {"seed": seed} if _has(entry, "seed") else {}
            filled.append(recipes.from_dict(more | entry))
        return filled


@dataclass(frozen=True)
class RunSpec:
    """One run to do. `recipe`: plain values; `recovery`: empty without tokens; `key`: hash of all that decides it."""

    key: str
    model: str
    method: str
    recipe: list[dict[str, Any]]
    keep_asked: float | None
    recovery_tokens: int
    seed: int
    recovery: dict[str, Any]

    @property
    def compression(self) -> str:
        """What runs share that differ in their recovery alone."""
        return json.dumps([self.model, self.recipe], sort_keys=True)


@dataclass(frozen=True)
class Grid:
    """A sweep's settings; `models` are folders of saved models by name."""

    models: dict[str, str]
    methods: tuple[GridMethod, ...]
    test: Scoring
    calibration: Passage | None = None
    keeps: tuple[float, ...] = ()
    recovery: RecoverySettings = field(default_factory=RecoverySettings)
    seeds: tuple[int, ...] = (0,)
    tasks: Tasks = field(default_factory=Tasks)
    speed: SpeedSettings | None = field(default_factory=SpeedSettings)
    dtype: str = "auto"

    def __post_init__(self) -> None:
        _check_dtype(self.dtype)
        for label, entries in ((method.label, method.entries) for method in self.methods):
            if any(method.label == label and method.entries != entries for method in self.methods):
                raise ValueError(f"two methods of other settings are called {label}; give each a label of its own")
        for method in self.methods:
            keeps = self.keeps if method.keeps is None else method.keeps
            if method.open and not keeps:
                raise ValueError(f"{method.label} needs a keep: give keeps, or keep in its recipe")
            needs = [c.name for c in method.recipe(keeps[0] if keeps else None, 0) if c.needs_calibration]
            if needs and self.calibration is None:
                raise ValueError(f"{needs[0]} reads a calibration text; give calibration: {{text: FILE}}")
            if any(self._recovery(method).tokens) and self.recovery.text is None:
                raise ValueError("recovery needs a text; give recovery: {text: FILE}, or calibration: {text: FILE}")

    def specs(self) -> list[RunSpec]:
        """Every run once, those that share a compression side by side."""
        shared, found = self._identity(), dict[str, RunSpec]()
        for model, method in product(self.models, self.methods):
            recovery = self._recovery(method)
            settings = recovery.identity()
            for keep, seed, tokens in self._runs(method, recovery):
                plain = json.loads(json.dumps([config.to_dict() for config in method.recipe(keep, seed)]))
                how = settings if tokens else {}
                key = digest(json.dumps([shared, model, method.label, plain, seed, tokens, how], sort_keys=True))
                found.setdefault(key, RunSpec(key, model, method.label, plain, keep, tokens, seed, how))
        groups = list(dict.fromkeys(spec.compression for spec in found.values()))
        return sorted(found.values(), key=lambda spec: (groups.index(spec.compression), spec.recovery_tokens))

    def _runs(self, method: GridMethod, recovery: RecoverySettings) -> Iterator[tuple[float | None, int, int]]:
        """Keep, seed, recovery tokens; only the first seed where none decides anything."""
        keeps = (self.keeps if method.keeps is None else method.keeps) if method.open else (None,)
        for keep, tokens in product(keeps, recovery.tokens):
            for seed in self.seeds if method.seeded or tokens else self.seeds[:1]:
                yield keep, seed, tokens

    def _recovery(self, method: GridMethod) -> RecoverySettings:
        try:
            return dataclasses.replace(self.recovery, **method.recovery)
        except ValueError as error:
            raise ValueError(f"recovery of {method.label}: {error}") from error

    def _identity(self) -> dict[str, Any]:
        calibration = None if self.calibration is None else self.calibration.identity()
        tasks = {"names": self.tasks.names, "limit": self.tasks.limit}
        speed = None if self.speed is None else dataclasses.asdict(self.speed)
        shared = {"calibration": calibration, "test": self.test.identity(), "tasks": tasks, "speed": speed}
        return shared | {"dtype": self.dtype}


def load(file: str | Path) -> Grid:
    """Read a grid; files it names lie beside it unless their paths are absolute.

    Raises `ValueError` with what was given and what is allowed, for every method at every keep, before anything runs.
    """
    path = Path(file)
    content = recipes.read_yaml(path, "grid")
    try:
        return parse(content, path.parent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the grid {path}: {error}") from error


def parse(content: Any, folder: Path = Path()) -> Grid:
    """A grid from the YAML's values; relative files lie in `folder`, `$NAME` in them is an environment variable."""
    allowed = [f.name for f in dataclasses.fields(Grid)]
    values = _mapping("a grid", content, allowed)
    missing = [name for name in ("models", "methods", "test") if not values.get(name)]
    if missing:
        raise ValueError(f"it needs {', '.join(missing)}")
    test = _section(Scoring, "test", values["test"], folder)
    calibration = values.get("calibration") and _section(Passage, "calibration", values["calibration"], folder)
    recovery = _section(RecoverySettings, "recovery", values.get("recovery") or {}, folder)
    if recovery.text is None and calibration:
        recovery = dataclasses.replace(recovery, text=calibration.text)
    speed = values.get("speed", {})
    return Grid(
        models=_models(values["models"], folder),
        methods=tuple(_method(entry) for entry in _list("methods", values["methods"])),
        test=test,
        calibration=calibration or None,
        keeps=keep_values(values.get("keeps", ())),
        recovery=recovery,
        seeds=_seeds(values.get("seeds", (0,))),
        tasks=_section(Tasks, "tasks", values.get("tasks") or {}, folder),
        # `speed: false` leaves it out.
        speed=None if speed in (False, None) else _section(SpeedSettings, "speed", speed, folder),
        dtype=values.get("dtype", "auto"),
    )


def digest(text: str) -> str:
    """The first 16 digits of a text's SHA-256."""
    return sha256(text.encode()).hexdigest()[:16]


def _models(given: Any, folder: Path) -> dict[str, str]:
    """Folders by name: a mapping as it is, a list under the folders' own names."""
    if isinstance(given, Mapping):
        found = {str(name): _path(path, folder) for name, path in given.items()}
    else:
        paths = [_path(path, folder) for path in _list("models", given)]
        found = {Path(path).name: path for path in paths}
        if len(found) < len(paths):
            raise ValueError("two models have one folder name; write models as NAME: FOLDER")
    for path in found.values():
        if not Path(path, "config.json").is_file():
            raise ValueError(f"{path} is not the folder of a saved model: it has no config.json")
    return found


def _method(entry: Any) -> GridMethod:
    """A name; `method` and its settings; or `recipe`, a list of such; with any of them `label`, `keeps`, `recovery`."""
    own = {"label", "keeps", "recovery"}
    entry = {"method": entry} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or ("method" in entry) == ("recipe" in entry):
        raise ValueError(f"each of methods is a name, or has `method` and its settings, or `recipe`; got {entry!r}")
    settings = {name: value for name, value in entry.items() if name not in own}
    entries = [settings]
    if "recipe" in entry:
        _mapping("a recipe", settings, ["recipe", *sorted(own)])
        entries = [{"method": e} if isinstance(e, str) else e for e in _list("recipe", entry["recipe"])]
    for each in entries:
        if not isinstance(each, Mapping) or each.get("method") not in CONFIGS:
            raise ValueError(f"a recipe entry needs `method`, one of {', '.join(sorted(CONFIGS))}; got {each!r}")
    return GridMethod(
        label=str(entry.get("label") or " + ".join(each["method"] for each in entries)),
        entries=tuple(dict(each) for each in entries),
        keeps=keep_values(entry["keeps"]) if "keeps" in entry else None,
        recovery=dict(_mapping("recovery", entry.get("recovery", {}), list(RECOVERY))),
    )


def _section(kind: type[T], name: str, given: Any, folder: Path) -> T:
    """A part of the grid as its dataclass, its files' paths resolved; a text alone stands for its file."""
    allowed = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    given = {"text": given} if isinstance(given, str) and "text" in allowed else given
    values = dict(_mapping(name, given, allowed))
    for file in ("text", "data"):
        if values.get(file) is not None:
            values[file] = _path(values[file], folder)
    if values.get("text"):
        read_text(values["text"])
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: {error}") from error


def _mapping(what: str, given: Any, allowed: list[str]) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what} takes {', '.join(allowed)}, got {given!r}")
    unknown = [str(name) for name in given if name not in allowed]
    if unknown:
        raise ValueError(f"{what} has no setting {unknown[0]!r}; it has {', '.join(allowed)}")
    return given


def _list(name: str, given: Any) -> list[Any]:
    if not isinstance(given, (list, tuple)) or not given:
        raise ValueError(f"{name} must be a list of at least one, got {given!r}")
    return list(given)


def _path(given: Any, folder: Path) -> str:
    """A path from the grid's folder, with `~` and environment variables."""
    text = os.path.expanduser(os.path.expandvars(str(given)))
    if "$" in text:
        raise ValueError(f"{given} names an environment variable that is not set; set it, or write the path")
    return str(folder / text)


def keep_values(given: Any) -> tuple[float, ...]:
    """Kept shares in (0, 1]."""
    values = given if isinstance(given, (list, tuple)) else [given]
    for value in values:
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
            raise ValueError(f"keeps must be in (0, 1], got {value!r}")
    return tuple(dict.fromkeys(float(value) for value in values))


def token_counts(given: Any) -> tuple[int, ...]:
    """Numbers of recovery tokens, each once; none given is 0."""
    values = given if isinstance(given, (list, tuple)) else [given]
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"recovery tokens must be integers of at least 0, got {value!r}")
    return tuple(dict.fromkeys(values)) or (0,)


def _seeds(given: Any) -> tuple[int, ...]:
    values = _list("seeds", given if isinstance(given, (list, tuple)) else [given])
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ValueError(f"seeds must be integers of at least 0, got {value!r}")
    return tuple(dict.fromkeys(values))


def _counts(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")


def _check_dtype(dtype: Any) -> None:
    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, got {dtype!r}")


def _open(entry: Mapping[str, Any]) -> bool:
    return bool(_size(entry, 1.0))


def _size(entry: Mapping[str, Any], keep: float) -> dict[str, float]:
    """What a share to keep adds to an entry that leaves it open."""
    return CONFIGS[entry["method"]].size(keep, entry)


def _has(entry: Mapping[str, Any], setting: str) -> bool:
    return any(f.name == setting for f in dataclasses.fields(CONFIGS[entry["method"]]))
