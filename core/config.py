"""The configuration: a YAML preset or file, then dotted overrides, checked as a whole before anything starts."""

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..data.documents import MOST_BYTES, parse_yaml
from ..data.location import Location
from .mistakes import ConfigError, brief, described, listed
from .overrides import assign, read, switches_for_numbers
from .ownership import ORDERS, check_own, is_shortened
from .sections import Config, EvalConfig, ModelConfig, OptimConfig, TrainConfig

__all__ = [
    "Config",
    "ConfigError",
    "EvalConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "came_with_weights",
    "changed",
    "dump",
    "load",
    "parse",
    "preset_names",
    "without_logins",
]

PRESETS = Path(__file__).resolve().parent / "presets"


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def load(preset_or_path: str | Path, overrides: Iterable[str] = (), *, of_run: bool = False) -> Config:
    """Read a preset (by name) or a YAML file, apply `section.key=value` overrides, check everything.

    `model.queries=100`, `optim.drop_epochs=[30,40]`, `train.name=123`, `data.train=null`: core/overrides.py.
    of_run: the file is a run's, even where it does not look so.
    Raises ConfigError that lists every mistake with its path and, for a misspelt key, the nearest one, and
    ForeignSettingError when the file came with weights and gives orders that are not the user's.
    """
    overrides = list(overrides)
    path = _path(preset_or_path)
    foreign = path.parent != PRESETS and (of_run or came_with_weights(path))
    config = _checked(_read(path, aliases=not foreign), overrides, str(preset_or_path))
    if foreign:
        check_own(config, ORDERS, overrides, path)
    return config


def parse(text: str, source: str, overrides: Iterable[str] = ()) -> Config:
    """What `dump` has written, perhaps in a stranger's file; `source` names it in the error. Raises ConfigError."""
    try:
        values = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{source}: its configuration cannot be read: {error}") from error
    return _checked(_sections(values, source), overrides, source)


def changed(config: Config, overrides: Iterable[str], source: str) -> Config:
    """`config` with overrides applied, checked as `load` does; `source` names it in the error."""
    return _checked(config.model_dump(mode="json"), overrides, source)


def dump(config: Config, *, for_others: bool = False) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one.

    for_others: the addresses in it without logins and queries, for what is printed or handed on.
    """
    values = config.model_dump(mode="json")
    return yaml.safe_dump(without_logins(values) if for_others else values, sort_keys=False)


def without_logins(values: Any) -> Any:
    """Values of a configuration, its addresses as they may be shown."""
    if isinstance(values, dict):
        return {key: without_logins(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_logins(value) for value in values]
    hides = isinstance(values, str) and Location(values).is_remote and is_shortened(values)
    return Location(values).shown if hides else values


def _checked(values: dict[str, Any], overrides: Iterable[str], source: str) -> Config:
    mistakes: list[str] = []
    for override in overrides:
        try:
            assign(values, *read(override, Config))
        except ValueError as error:
            mistakes.append(brief(str(error)))
    mistakes += map(brief, switches_for_numbers(values, Config))
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        mistakes += described(error, Config, as_paths=True)
    if mistakes:
        raise listed(source, mistakes)
    return config


def _path(preset_or_path: str | Path) -> Path:
    path = PRESETS / f"{preset_or_path}.yaml"
    if not os.path.isfile(path):  # unlike Path.is_file, it takes any text for a name
        path = Path(preset_or_path)
    if not os.path.isfile(path):
        near = difflib.get_close_matches(str(preset_or_path), preset_names(), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        name = brief(str(preset_or_path))
        raise ConfigError(f"{name}: no such preset or file.{hint} Presets: {', '.join(preset_names())}")
    return path


def _read(path: Path, *, aliases: bool) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            values = parse_yaml(file.read(MOST_BYTES + 1), aliases=aliases)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error
    return _sections(values, str(path))


def _sections(values: Any, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(
            f"{source}: expected sections ({', '.join(Config.model_fields)}), got {type(values).__name__}"
        )
    return values


def came_with_weights(file: Path) -> bool:
    """Whether a file, or what it is a link to, lies somewhere in a run directory or beside a model.safetensors."""
    places = [Path(os.path.abspath(file)), file.resolve()]
    if places[0].is_relative_to("/proc/self/fd"):  # handed over by the program that started this one
        return False
    if any((place.parent / "model.safetensors").exists() for place in places):
        return True
    return any(
        any((folder / name).exists() for name in ("metrics.jsonl", "events.jsonl"))
        or any(folder.glob("checkpoints/step_*"))
        for folder in {folder for place in places for folder in place.parents}
    )
