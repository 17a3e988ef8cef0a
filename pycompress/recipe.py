"""Recipes: what to do to a model, as frozen dataclasses that check themselves, and their YAML form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

CONFIGS: dict[str, type[Config]] = {}


@dataclass(frozen=True)
class Config:
    """One method and its settings. Subclasses that are not `abstract` register themselves under their class name.

    `targets`: roles of linear layers ("q", "k", "down", …) or patterns over module names; None means every linear
    layer of the decoder blocks.
    """

    targets: tuple[str, ...] | None = field(default=None, kw_only=True)

    def __init_subclass__(cls, abstract: bool = False) -> None:
        if not abstract:
            CONFIGS[cls.__name__] = cls

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            object.__setattr__(self, "targets", (self.targets,))
        elif self.targets is not None:
            object.__setattr__(self, "targets", tuple(self.targets))
        if self.targets == ():
            raise ValueError(
                f"{self.name}.targets is empty; name at least one role or pattern, or leave it None for all"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether the method reads statistics of its targets' inputs."""
        return False

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def recorded(self) -> str | None:
        """The folder of weights along training that the method reads, as `TrajectoryTracker.save` wrote it."""
        return None

    def resolved(self) -> Config:
        """The config that does what this one says: itself, unless it stands for another method."""
        return self

    def of_any_size(self) -> Config:
        """The config that stands for all that measure the same of a model, whatever is kept of it."""
        kept = {"keep": 1.0} if _has_field(type(self), "keep") else {}
        return dataclasses.replace(self, targets=None, **kept)

    @classmethod
    def size(cls, keep: float, settings: Mapping[str, Any]) -> dict[str, float]:
        """What to add to these settings for a share `keep`; nothing where they say it, or where no share is taken."""
        return {"keep": keep} if _has_field(cls, "keep") and "keep" not in settings else {}

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain YAML or JSON values, the method's name first."""
        return {"method": self.name} | dataclasses.asdict(self)

    def check_choice(self, field: str, *allowed: str) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise ValueError(f"{self.name}.{field} must be one of {', '.join(map(repr, allowed))}, got {value!r}")

    def check_fraction(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1 or math.isnan(value):
            raise ValueError(f"{self.name}.{field} must be in (0, 1], got {value!r}")

    def check_count(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{self.name}.{field} must be an integer of at least {least}, got {value!r}")


Recipe = list[Config]


def _has_field(config: type[Config], name: str) -> bool:
    return any(f.name == name for f in dataclasses.fields(config))


def parse(recipe: Config | list[Config] | tuple[Config, ...] | str | Path) -> Recipe:
    """A recipe in any of its forms as a list of configs, each of the method that runs.

    `recipe`: a config, a list of configs, a method's name (taken with its defaults) or the path of a YAML file.
    Raises `TypeError` or `ValueError` with what is allowed.
    """
    return [config.resolved() for config in _configs(recipe)]


def _configs(recipe: Config | list[Config] | tuple[Config, ...] | str | Path) -> Recipe:
    if isinstance(recipe, Config):
        return [recipe]
    if isinstance(recipe, (list, tuple)):
        wrong = [type(entry).__name__ for entry in recipe if not isinstance(entry, Config)]
        if wrong or not recipe:
            raise TypeError(
                f"a recipe is a non-empty list of configs such as SWSC(keep=0.5), got {wrong or 'no entry'}"
            )
        return list(recipe)
    if isinstance(recipe, str) and recipe in CONFIGS:
        return [from_dict({"method": recipe})]
    if isinstance(recipe, (str, Path)):
        path = Path(recipe)
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(f"{str(recipe)!r} is neither a method ({', '.join(sorted(CONFIGS))}) nor a .yaml file")
        return load(path)
    raise TypeError(
        f"a recipe is a config, a list of configs, a method's name or a YAML path, got {type(recipe).__name__}"
    )


def from_dict(entry: dict[str, Any]) -> Config:
    """One config from its dictionary form, `{"method": name, setting: value, …}`."""
    settings = dict(entry) if isinstance(entry, dict) else {}
    method = settings.pop("method", None)
    if method not in CONFIGS:
        raise ValueError(f"a recipe entry needs `method`, one of {', '.join(sorted(CONFIGS))}; got {entry!r}")
    config = CONFIGS[method]
    allowed = [field.name for field in dataclasses.fields(config)]
    unknown = [name for name in settings if name not in allowed]
    if unknown:
        raise ValueError(f"{method} has no setting {unknown[0]!r}; it has {', '.join(allowed)}")
    try:
        return config(**settings)
    except TypeError as error:
        missing = [
            f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING and f.name not in settings
        ]
        raise ValueError(f"{method} needs {', '.join(missing)}; give it in the recipe") from error


def load(path: Path) -> Recipe:
    """Read a YAML file: one entry, or a list of entries, each `method:` and its settings."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"cannot read the recipe {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"the recipe {path} is not valid YAML: {error}") from error
    entries = content if isinstance(content, list) else [content]
    return [from_dict(entry) for entry in entries]


def save(recipe: Recipe, path: Path) -> None:
    """Write a recipe as the YAML that `load` reads."""
    entries = [{k: list(v) if isinstance(v, tuple) else v for k, v in c.to_dict().items()} for c in recipe]
    path.write_text(yaml.safe_dump(entries, sort_keys=False))
