"""Recipes: what to do to a model, as frozen dataclasses that check themselves, and their YAML form."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pycompress._brief import brief, clipped, listed

# Of a YAML file, its aliases expanded.
MOST_BYTES = 1 << 20
MOST_VALUES = 10_000
LONGEST = 1000

if TYPE_CHECKING:
    from torch import Tensor

# Matrices by name, with their weights and, of a trajectory, their importances; may be gone through again.
Matrices = Callable[[], "Iterable[tuple[str, Tensor, Tensor | None]]"]

CONFIGS: dict[str, type[Config]] = {}


class Checked:
    """Settings that check their fields, and say of a wrong one what was given and what is allowed."""

    @property
    def name(self) -> str:
        return type(self).__name__

    def check_choice(self, field: str, *allowed: str) -> None:
        value = getattr(self, field)
        if value not in allowed:
            raise ValueError(f"{self.name}.{field} must be one of {', '.join(map(repr, allowed))}, got {brief(value)}")

    def check_fraction(self, field: str) -> None:
        value = getattr(self, field)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1 or math.isnan(value):
            raise ValueError(f"{self.name}.{field} must be in (0, 1], got {brief(value)}")

    def check_count(self, field: str, least: int) -> None:
        value = getattr(self, field)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
            raise ValueError(f"{self.name}.{field} must be an integer of at least {least}, got {brief(value)}")


@dataclass(frozen=True)
class Config(Checked):
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
            plain = isinstance(self.targets, Collection) and not isinstance(self.targets, (bytes, Mapping))
            if not plain or not all(isinstance(target, str) for target in self.targets):
                raise ValueError(
                    f"{self.name}.targets must be roles or patterns, as in [q, down], got {brief(self.targets)}"
                )
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
    def structural(self) -> bool:
        """Whether the method makes dense matrices smaller, rather than packing them; such configs go first."""
        return False

    @property
    def final(self) -> bool:
        """Of a structural method: whether no other can follow it."""
        return False

    @property
    def shared(self) -> bool:
        """Whether one budget is allocated to all targets, by their rate-distortion curves."""
        return False

    @property
    def by_loss(self) -> bool:
        """Whether errors of a shared budget count in nats of the loss, where its sensitivity was measured."""
        return False

    @property
    def sensitive(self) -> bool:
        """Whether the method reads the loss's sensitivity to its targets' outputs."""
        return False

    @property
    def staged(self) -> bool:
        """Whether linears are calibrated on what those before them in their block give after compression, not only on
        what the blocks before theirs give.
        """
        return False

    def budgets(self, matrices: Matrices) -> dict[str, int] | None:
        """Bytes of every target, from the weights alone; None where the method sets none so."""
        return None

    def kept_bytes(self, nbytes: int) -> int:
        """Of a shared budget: how many of the targets' bytes may be kept."""
        raise NotImplementedError(f"{self.name} shares no budget")

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
                f"a recipe is a non-empty list of configs such as SWSC(keep=0.5), got {listed(wrong) or 'no entry'}"
            )
        return list(recipe)
    if isinstance(recipe, str) and recipe in CONFIGS:
        return [from_dict({"method": recipe})]
    if isinstance(recipe, (str, Path)):
        path = Path(recipe)
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(
                f"{brief(str(recipe))} is neither a method ({', '.join(sorted(CONFIGS))}) nor a .yaml file"
            )
        return load(path)
    raise TypeError(
        f"a recipe is a config, a list of configs, a method's name or a YAML path, got {type(recipe).__name__}"
    )


def from_dict(entry: dict[str, Any]) -> Config:
    """One config from its dictionary form, `{"method": name, setting: value, …}`."""
    settings = dict(entry) if isinstance(entry, dict) else {}
    method = settings.pop("method", None)
    if not isinstance(method, str) or method not in CONFIGS:
        raise ValueError(f"a recipe entry needs `method`, one of {', '.join(sorted(CONFIGS))}; got {brief(entry)}")
    config = CONFIGS[method]
    for name, nested in _nested(config).items():
        if isinstance(settings.get(name), dict):
            _check_known(f"{method}.{name}", nested, settings[name])
            settings[name] = nested(**settings[name])
    _check_known(method, config, settings)
    try:
        return config(**settings)
    except TypeError as error:
        missing = [
            f.name for f in dataclasses.fields(config) if f.default is dataclasses.MISSING and f.name not in settings
        ]
        why = f"needs {', '.join(missing)}; give it in the recipe" if missing else f"cannot be made: {clipped(error)}"
        raise ValueError(f"{method} {why}") from error


def _nested(config: type[Config]) -> dict[str, type[Any]]:
    """Settings of a config that are groups of settings themselves."""
    return {f.name: type(f.default) for f in dataclasses.fields(config) if isinstance(f.default, Checked)}


def _check_known(what: str, settings: type[Any], given: Mapping[str, Any]) -> None:
    """Raise `ValueError` for a name that is no field of `settings`."""
    allowed = [field.name for field in dataclasses.fields(settings)]
    unknown = [name for name in given if name not in allowed]
    if not unknown:
        return
    groups = _nested(settings) if issubclass(settings, Config) else {}
    of = [name for name, group in groups.items() if unknown[0] in {f.name for f in dataclasses.fields(group)}]
    raise ValueError(
        f"{what} has no setting {brief(unknown[0])}; it has {', '.join(allowed)}"
        + (f"; {unknown[0]} belongs to its {of[0]}" if of else "")
    )


def load(path: Path) -> Recipe:
    """Read a YAML file: one entry, or a list of entries, each `method:` and its settings."""
    content = read_yaml(path, "recipe")
    entries = content if isinstance(content, list) else [content]
    return [from_dict(entry) for entry in entries]


def read_yaml(path: Path, what: str) -> Any:
    """The plain values of a YAML file. `ValueError`, with `what` the file is, where it cannot be read or is damaged."""
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"cannot read the {what} {clipped(path)}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read the {what} {clipped(path)}: it is not UTF-8") from error
    except ValueError as error:
        raise ValueError(f"cannot read the {what} {clipped(path)}: {error}") from error
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"the {what} {clipped(path)} is not valid YAML: {error}") from error


def parse_yaml(text: str) -> Any:
    """The plain values of a YAML text; `ValueError` for more than MOST_VALUES of them, or a key that is there twice."""
    loader: Any = None
    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        if root is None:
            return None
        _check_nodes(root)
        return loader.construct_document(root)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError, OverflowError) as error:
        raise ValueError(clipped(error)) from error
    finally:
        if loader is not None:
            loader.dispose()


def _check_nodes(root: Any) -> None:
    left, count = [root], 0
    while left:
        node, count = left.pop(), count + 1
        if count > MOST_VALUES:
            raise ValueError(f"it has more than {MOST_VALUES} values, its aliases expanded")
        if isinstance(node, yaml.ScalarNode) and len(node.value) > LONGEST:
            raise ValueError(f"a value has {len(node.value)} characters, more than {LONGEST}")
        if isinstance(node, yaml.MappingNode):
            keys = Counter((key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            twice = [value for (_, value), times in keys.items() if times > 1]
            if twice:
                raise ValueError(f"the key {brief(twice[0])} is there twice")
            left += [each for pair in node.value for each in pair]
        elif isinstance(node, yaml.SequenceNode):
            left += node.value


def save(recipe: Recipe, path: Path) -> None:
    """Write a recipe as the YAML that `load` reads."""
    entries = [{k: list(v) if isinstance(v, tuple) else v for k, v in c.to_dict().items()} for c in recipe]
    path.write_text(yaml.safe_dump(entries, sort_keys=False), encoding="utf-8")
