"""What is wrong with a configuration or a sweep, in lines: where, what, and the nearest key where one is misspelt."""

import difflib
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel, ValidationError

from ..data.addresses import shown
from ..data.text import shortened
from .overrides import model_at

LONGEST_MISTAKE = 1200  # characters


class ConfigError(ValueError):
    """Every mistake found in a configuration, one line each."""


def listed(source: str, found: Iterable[str]) -> ConfigError:
    """The error that says all that was found; what a run says of itself may have several lines."""
    lines = ["\n    ".join(brief(line) for line in mistake.split("\n")) for mistake in found]
    return ConfigError(f"{len(lines)} mistake(s) in {brief(source)}:\n" + "\n".join(f"  {line}" for line in lines))


def described(
    error: ValidationError, configuration: type[BaseModel], *, as_paths: bool, besides: tuple[str, ...] = ()
) -> list[str]:
    """One line for each mistake in values for a configuration.

    as_paths: a suggestion is the whole path of a key, as in an override, perhaps in another section; otherwise the key.
    besides: keys that may stand beside the sections.
    """
    return [brief(line) for item in error.errors() for line in _described(item, configuration, as_paths, besides)]


def brief(mistake: str) -> str:
    """A mistake on one line, however long the value is that it repeats, without logins of addresses."""
    return shortened(shown(mistake), LONGEST_MISTAKE)


def _described(item: Any, configuration: type[BaseModel], as_paths: bool, besides: tuple[str, ...]) -> list[str]:
    location = [str(part) for part in item["loc"]]
    where = ".".join(location) or configuration.__name__.lower()
    if item["type"] != "extra_forbidden":
        complaint = _complaint(item)  # what does not fit together may have several lines
        return [
            f"{where}: {line}" for line in (complaint.split("\n") if item["type"] == "value_error" else [complaint])
        ]
    *path, key = location
    if path and key in besides:
        return [f"{where}: no such key. {key} stands beside the sections, not in one."]
    near = difflib.get_close_matches(key, [*_keys(path, configuration), *(() if path else besides)], n=1)
    if as_paths:
        sections = [section for section in configuration.model_fields if key in _keys([section], configuration)]
        near = [".".join([*path, near[0]])] if near else [f"{section}.{key}" for section in sections[:1]]
    return [f"{where}: no such key." + (f" Did you mean {near[0]}?" if near else "")]


def _keys(path: list[str], configuration: type[BaseModel]) -> list[str]:
    model = model_at(path, configuration)
    return list(model.model_fields) if model else []


def _complaint(item: Any) -> str:
    """What pydantic has against a value."""
    value = item["input"]
    if item["type"] in ("model_type", "dict_type"):
        given = "nothing; take the line out" if value is None else repr(value)
        return f"expected settings (key: value), got {given}"
    if item["type"] == "invalid_key":
        return "expected a text for a key; put quotes around it"
    if item["type"] == "string_type" and not isinstance(value, dict | list):
        return f"expected text, got {value}, which is none in YAML without quotes around it"
    message = item["msg"].removeprefix("Value error, ")
    return message if item["type"] in ("value_error", "missing") else f"{message}, got {value!r}"
