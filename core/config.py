"""The configuration: a YAML preset or file, then dotted overrides, checked as a whole before anything starts."""

import re
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..data.addresses import shown
from ..data.documents import parse_yaml
from .layers import BASE, came_with_weights, layers, merged, preset_names, sections
from .mistakes import ConfigError, brief, described, listed
from .overrides import assign, read, switches_for_numbers, written
from .ownership import ORDERS, ForeignSettingError, check_own, is_shortened
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
    "gives_classes",
    "load",
    "parse",
    "preset_names",
    "with_classes",
    "without_logins",
]


def load(
    preset_or_path: str | Path | Sequence[str | Path],
    overrides: Iterable[str] = (),
    *,
    of_run: bool = False,
    named_in: Path | None = None,
    acts: Collection[str] = tuple(ORDERS),
) -> Config:
    """Read a preset (by name) or a YAML file, apply `section.key=value` overrides, check everything.

    Of several, later ones win, setting by setting; so does a file over its `base: PRESET_OR_FILE`.
    `model.queries=100`, `optim.drop_epochs=[30,40]`, `train.name=123`, `data.train=null`: core/overrides.py.
    of_run: treat the file as part of a run directory, and so as untrusted, wherever it lies. named_in: the file that
    names it; relative paths are relative to its folder. acts: the privileged settings that the command acts on; none
    if the configuration is only shown.
    Raises ConfigError that lists every mistake with its key and, for a misspelt key, the nearest valid one. Raises
    ForeignSettingError for privileged settings in untrusted files that are not the user's own.
    """
    names = [preset_or_path] if isinstance(preset_or_path, str | Path) else preset_or_path
    overrides = list(overrides)
    found = [layer for name in names for layer in layers(name, of_run=of_run, named_in=named_in)]
    config = _checked(merged(found), overrides, " + ".join(map(str, found)) or "the settings")
    last = {key: layer for layer in found for key in layer.keys}
    refused = []
    for layer in found:
        if layer.foreign:
            try:
                check_own(config, [key for key in acts if last.get(key) is layer], overrides, layer.path)
            except ForeignSettingError as error:
                refused.append(str(error))
    if refused:
        raise ForeignSettingError("\n".join(refused))
    return config


def parse(text: str, source: str, overrides: Iterable[str] = ()) -> Config:
    """What `dump` has written, perhaps in an untrusted file; `source` names it in the error. Raises ConfigError."""
    try:
        values = sections(parse_yaml(text), source)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{source}: its configuration cannot be read: {error}") from error
    if BASE in values:
        raise ConfigError(
            f"{source}: its configuration names a {BASE}, but one that comes with a run or weights is whole"
        )
    return _checked(values, overrides, source)


def changed(config: Config, overrides: Iterable[str], source: str) -> Config:
    """`config` with overrides applied, checked as `load` does; `source` names it in the error."""
    return _checked(_given(config), overrides, source)


def gives_classes(config: Config) -> bool:
    """Whether model.num_classes is set: otherwise it is the default, which the training set replaces."""
    return "num_classes" in config.model.model_fields_set


def with_classes(config: Config, num_classes: int) -> Config:
    """`config` for a training set of so many classes: the same one where their number is set."""
    if gives_classes(config):
        return config
    return changed(config, [written("model.num_classes", num_classes)], "the training set")


def dump(config: Config, *, for_others: bool = False) -> str:
    """The whole configuration as YAML that `load` reads back to an equal one.

    A number of classes that is not set is left out, so that the training set decides it then, too.
    for_others: the addresses in it without logins and queries, for what is printed or handed on.
    """
    values = _given(config)
    return yaml.dump(without_logins(values) if for_others else values, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Lists in one line."""


_Dumper.add_representer(
    list, lambda dumper, values: dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=True)
)


def _given(config: Config) -> dict[str, Any]:
    """All values, but not a number of classes that is not set."""
    values = config.model_dump(mode="json")
    if not gives_classes(config):
        del values["model"]["num_classes"]
    return values


def without_logins(values: Any) -> Any:
    """Values of a configuration, its addresses as they may be shown."""
    if isinstance(values, dict):
        return {key: without_logins(value) for key, value in values.items()}
    if isinstance(values, list):
        return [without_logins(value) for value in values]
    return shown(values) if isinstance(values, str) and is_shortened(values) else values


def _checked(values: dict[str, Any], overrides: Iterable[str], source: str) -> Config:
    mistakes: list[str] = []
    for override in overrides:
        try:
            assign(values, *read(override, Config))
        except ValueError as error:
            mistakes.append(brief(str(error)))
    mistakes += map(brief, switches_for_numbers(values, Config))
    config, found = _validated(values)
    if config is None or mistakes:
        raise listed(source, [*mistakes, *found])
    return config


def _validated(values: dict[str, Any]) -> tuple[Config | None, list[str]]:
    """The configuration, or all mistakes.

    What is wrong by itself gives way to its default, so that one hears at once what else does not fit together.
    """
    mistakes: list[str] = []
    wrong: set[tuple[str, str]] = set()  # section and key
    left: dict[Any, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    while True:
        try:
            config = Config.model_validate(left)
        except ValidationError as error:
            lines = described(error, Config, as_paths=True, besides=(BASE,))
            mistakes += [line for line in lines if not any(_names(line, *setting) for setting in wrong)]
            places = {item["loc"][:2] for item in error.errors()} - {()}
            if not places:
                return None, mistakes
            for section, *keys in places:
                if keys and isinstance(left[section], dict) and keys[0] in left[section]:
                    del left[section][keys[0]]
                    wrong.add((str(section), str(keys[0])))
                else:
                    del left[section]
        else:
            return (None if mistakes else config), mistakes


def _names(mistake: str, section: str, key: str) -> bool:
    """Whether a mistake is about this setting, in a line `section: ... key ...` or `config: ... section.key ...`."""
    where, _, text = mistake.partition(": ")
    names = re.findall(r"\w+(?:\.\w+)*", text)
    return f"{section}.{key}" in names or (where == section and key in names)
