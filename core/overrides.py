"""Overrides, `section.key=value`: read as they were typed, and written so that they are read back."""

import contextlib
import re
import types
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from ..data.documents import parse_yaml

_NONE = ("null", "Null", "NULL", "~")  # in YAML
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def read(override: str, configuration: type[BaseModel]) -> tuple[list[str], Any]:
    """The keys that lead to a setting, and its value.

    A setting that is text takes the text as typed, `123`, `on` and `[x` too, without blanks around it. Quotes around
    the whole text are YAML's, and `null` or `~` is none where the setting may be none. All others are YAML.
    configuration: knows which settings are text. Raises ValueError, one line.
    """
    key, equals, typed = override.partition("=")
    path = key.strip().split(".")
    if not equals or len(path) < 2 or not all(path):
        raise ValueError(f"{override!r}: an override is written section.key=value")
    kinds = _kinds(path, configuration)
    if not _is_unicode(typed):
        raise ValueError(f"{override!r}: not text in UTF-8")
    try:
        return path, _text(typed, kinds) if _is_text(kinds) else parse_yaml(typed) if typed else ""
    except ValueError as error:
        cause = error.__cause__
        reason = f"not valid YAML: {cause.problem}" if isinstance(cause, yaml.MarkedYAMLError) else str(error)
        raise ValueError(f"{override!r}: {' '.join(reason.split())}") from error


def written(key: str, value: Any) -> str:
    """The override that `read` takes for this value; a text as it is where that reads back."""
    return f"{key}={in_one_line(value)}"


def assign(values: dict[str, Any], path: list[str], value: Any) -> None:
    """Put a value into nested sections. Raises ValueError where what should hold it is none."""
    for depth, key in enumerate(path[:-1]):
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            raise ValueError(f"{'.'.join(path)}: {'.'.join(path[: depth + 1])} is not a section")
        values[key] = values = dict(inner)  # of an alias in YAML, the other place keeps its own
    values[path[-1]] = value


def switches_for_numbers(values: dict[str, Any], configuration: type[BaseModel]) -> list[str]:
    """Mistakes: `true`, `on` and `no` given where a number is expected, which Python would take for 1 and 0."""
    return [
        f"{section}.{key}: expected a number, got {str(value).lower()}"
        for section, keys in values.items()
        if isinstance(keys, dict)
        for key, value in keys.items()
        if isinstance(value, bool) and _is_number(_kinds([section, key], configuration))
    ]


def _is_number(kinds: set[Any]) -> bool:
    return all(
        kind in (int, float) or (get_origin(kind) is Literal and all(type(choice) is int for choice in get_args(kind)))
        for kind in kinds - {types.NoneType}
    )


def model_at(path: list[str], configuration: type[BaseModel]) -> type[BaseModel] | None:
    """The model of the values at a path; None where these are no model's."""
    return next((kind for kind in _kinds(path, configuration) if _is_model(kind)), None)


def _kinds(path: list[str], configuration: type[BaseModel]) -> set[Any]:
    """The types that a setting may have. One that does not exist is text: that it is missing is said of any value."""
    kinds: set[Any] = {configuration}
    for key in path:
        model = next(filter(_is_model, kinds), None)
        if model is None:  # inside of a free-form setting, or one value of a mapping
            kind = next((get_args(kind)[1] for kind in kinds if get_origin(kind) is dict), Any)
        elif key in model.model_fields:
            kind = model.model_fields[key].annotation
        else:
            return {str}
        kinds = set(get_args(kind)) if get_origin(kind) in (Union, types.UnionType) else {kind}
    return kinds


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _is_unicode(typed: str) -> bool:
    """False for bytes of a command line that are no UTF-8, which Python keeps as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in typed)


def _is_text(kinds: set[Any]) -> bool:
    return all(
        (isinstance(kind, type) and issubclass(kind, str))
        or (get_origin(kind) is Literal and all(isinstance(choice, str) for choice in get_args(kind)))
        for kind in kinds - {types.NoneType}
    )


def _text(typed: str, kinds: set[Any]) -> str | None:
    typed = typed.strip(" \t\r\n")
    if typed in _NONE and types.NoneType in kinds:
        return None
    return parse_yaml(typed) if _QUOTED.fullmatch(typed) else typed


def in_one_line(value: Any) -> str:
    """YAML of a value; a text as it is where that reads back."""
    if isinstance(value, str) and value:
        value = str(value)  # also of a location
        with contextlib.suppress(ValueError):
            if parse_yaml(value, aliases=True) == value:
                return value
    text = yaml.safe_dump([value], default_flow_style=True, width=2**31).strip()[1:-1]
    if "\n" in text:
        text = yaml.safe_dump([value], default_flow_style=True, default_style='"', width=2**31).strip()[1:-1]
    return text
