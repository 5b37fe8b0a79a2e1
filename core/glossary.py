"""What each setting means: its type, bounds, unit and default, read off where it is declared."""

import difflib
import types
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ..data.setting import unit
from .overrides import in_one_line
from .sections import Config

_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", dict: "mapping"}


@dataclass(frozen=True)
class Entry:
    """One setting. kind: its type with its bounds or choices. default: as it is written in YAML."""

    key: str
    kind: str
    unit: str | None
    default: str
    meaning: str
    is_number: bool


def section_names() -> list[str]:
    return list(Config.model_fields)


def section_meaning(section: str) -> str:
    return (_model(section).__doc__ or "").strip().partition("\n")[0]


def entries(section: str) -> list[Entry]:
    """Of all settings of a section, as they are declared."""
    return [_entry(f"{section}.{key}", field) for key, field in _model(section).model_fields.items()]


def found(name: str) -> list[Entry]:
    """The setting `section.key`, or those of a section. Raises ValueError that names the nearest one."""
    if name in Config.model_fields:
        return entries(name)
    known = {entry.key: entry for section in section_names() for entry in entries(section)}
    if name in known:
        return [known[name]]
    raise ValueError(f"{name}: no such setting.{_hint(name, list(known))} Sections: {', '.join(section_names())}")


def _model(section: str) -> type[BaseModel]:
    model = Config.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model


def _hint(name: str, keys: list[str]) -> str:
    """A key in another section or without one comes before a similar one."""
    last = name.rpartition(".")[2]
    near = [key for key in keys if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(name, [*keys, *section_names()], n=1)
    if not near and (short := difflib.get_close_matches(last, [key.rpartition(".")[2] for key in keys], n=1)):
        near = [key for key in keys if key.rpartition(".")[2] == short[0]]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _entry(key: str, field: FieldInfo) -> Entry:
    default = field.get_default(call_default_factory=True)
    written = in_one_line(list(default) if isinstance(default, tuple) else default)
    annotation = field.annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    (kind,) = (kind for kind in kinds if kind is not types.NoneType)
    words = _named(kind) + _bounded(kind, field.metadata) + ", or null" * (types.NoneType in kinds)
    return Entry(key, words, unit(field), written, field.description or "", _of_items(kind)[0] in (int, float))


def _of_items(kind: Any) -> tuple[Any, list[Any]]:
    """The type of a list's items and what bounds each; the type itself of another."""
    item = get_args(kind)[0] if get_origin(kind) is tuple else kind
    if get_origin(item) is not Annotated:
        return item, []
    item, field = get_args(item)
    return item, field.metadata


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        *first, last = map(str, get_args(kind))
        return f"{', '.join(first)} or {last}"
    if get_origin(kind) is tuple:
        name, items = _NAMES[_of_items(kind)[0]], get_args(kind)
        return f"list of {name}s" if items[-1] is ... else f"list of {len(items)} {name}s"
    kind = get_origin(kind) or kind
    return next(name for known, name in _NAMES.items() if issubclass(kind, known))


def _bounded(kind: Any, of_field: list[Any]) -> str:
    item, of_item = _of_items(kind)
    least: Any = None
    above: Any = None
    most = below = None
    for bound in of_item or of_field:
        if isinstance(bound, Gt):
            above = bound.gt
        elif isinstance(bound, Ge):
            least = bound.ge
        elif isinstance(bound, Lt):
            below = bound.lt
        elif isinstance(bound, Le):
            most = bound.le
    if item is int and above is not None:
        least, above = above + 1, None
    if least is not None and most is not None:
        words = [f"{_number(least)} to {_number(most)}"]
    else:
        given = {"at least": least, "above": above, "at most": most, "below": below}
        words = [f"{word} {_number(bound)}" for word, bound in given.items() if bound is not None]
    each = " each" if of_item else ""
    return "".join(f", {word}{each}" for word in words)


def _number(bound: Any) -> str:
    return f"{bound:_}" if bound >= 1_000_000 else f"{bound}"
