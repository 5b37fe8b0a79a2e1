"""Untrusted text, JSON and YAML: whatever is wrong with them is a ValueError."""

import codecs
import json
import math
import re
from functools import partial
from typing import Any

import yaml

from .text import shortened, visible

_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


def decoded(data: bytes) -> str:
    """Text in UTF-8, or in UTF-16 with the mark that says so; without a mark. Raises ValueError for any other."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"it is not text in UTF-8 (byte {error.start} is {data[error.start]:#x}): save it as UTF-8"
        ) from None


def parse_json(text: str | bytes | bytearray, *, each_key_once: bool = False) -> Any:
    """Parse JSON. Raises ValueError for anything else, and for brackets nested too deeply.

    each_key_once: also for a key that stands twice in one object, of which only the last would count.
    """
    try:
        return json.loads(text, object_pairs_hook=_each_once if each_key_once else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        for key, value in pairs:
            if values[key] != value:
                raise ValueError(f"the key {visible(repr(key))} stands twice in one object, with two values")
    return values


def as_json(value: Any, *, indent: int | None = None) -> str:
    """JSON that every reader takes: infinities and NaN, for which it has no words, are null."""
    written = partial(json.dumps, indent=indent, allow_nan=False)
    try:
        return written(value)
    except ValueError:  # rare, and looking for them beforehand takes longer than writing
        return written(_without_nan(value))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


MOST_BYTES = 1 << 20  # of YAML: a hundred configurations; its parser takes minutes for more
MOST_DIGITS = 80  # of a number of 64 bits, in any base


class _EachKeyOnce:
    """Of a key that stands twice in one mapping, only the last would count."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)  # type: ignore[misc]
        seen: dict[tuple[str, str], int] = {}
        for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
            line = key.start_mark.line + 1
            if before := seen.get((key.tag, key.value)):
                where = f"in line {line}" if before == line else f"in lines {before} and {line}"
                raise ValueError(f"the key {shortened(key.value, 40)} stands twice, {where}: take one out")
            seen[key.tag, key.value] = line
        return node


class _NoAliases:
    """A few lines of aliases of aliases stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):  # type: ignore[attr-defined]
            raise ValueError("it has aliases (*name), which stand for more than is written: write them out")
        return super().compose_node(parent, index)  # type: ignore[misc]


class _Values(_EachKeyOnce, yaml.SafeLoader):
    """YAML 1.1 has numbers that nobody means: 010 is 8 and 1:30 is 90."""

    def construct_yaml_int(self, node: Any) -> int:
        text, line = self.construct_scalar(node), node.start_mark.line + 1
        if ":" in text or re.match(r"[-+]?0[0-9_]", text):
            raise ValueError(
                f"{shortened(text, 40)} (line {line}) is octal or sexagesimal in YAML: write it in decimal"
            )
        try:
            number = super().construct_yaml_int(node) if len(text) <= MOST_DIGITS else None
        except ValueError:
            raise ValueError(f"{shortened(text, 40)} (line {line}) is no number") from None
        if number is None or not -(2**63) <= number < 2**63:
            raise ValueError(f"{shortened(text, 40)} (line {line}) is too large: a number has 64 bits at most")
        return number

    def construct_yaml_float(self, node: Any) -> float:
        text = self.construct_scalar(node)
        if ":" in text:
            raise ValueError(
                f"{shortened(text, 40)} (line {node.start_mark.line + 1}) is sexagesimal: write it in decimal"
            )
        return super().construct_yaml_float(node)

    def construct_yaml_timestamp(self, node: Any) -> Any:
        try:
            return super().construct_yaml_timestamp(node)
        except ValueError:
            text, line = visible(self.construct_scalar(node)), node.start_mark.line + 1
            raise ValueError(f"{text} (line {line}) is no date: put quotes around a text") from None


for _kind in ("int", "float", "timestamp"):
    _Values.add_constructor(f"tag:yaml.org,2002:{_kind}", getattr(_Values, f"construct_yaml_{_kind}"))


class _ValuesWithoutAliases(_NoAliases, _Values):
    pass


class _Texts(_NoAliases, _EachKeyOnce, yaml.BaseLoader):
    """Every value is text: `no`, `on` and `1` may be names."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        tag = getattr(self.peek_event(), "tag", None)
        if tag is not None:
            raise ValueError(f"it has a tag ({visible(str(tag))}), which says what a value is: leave it out")
        return super().compose_node(parent, index)


def parse_yaml(text: str | bytes, *, aliases: bool = False, texts: bool = False) -> Any:
    """Parse YAML. Raises ValueError for anything else, for nesting that is too deep and for more than 1 MiB.

    Also for a key that stands twice in one mapping, of which only the last would count, and for numbers that are
    octal or sexagesimal or need more than 64 bits. Without `aliases` the text is untrusted, and aliases raise, too.
    Tags make plain values only, and run nothing. texts: every value stays the text that is written; tags are refused.
    """
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES >> 20} MiB")
    if isinstance(text, bytes):
        text = decoded(text)
    try:
        return yaml.load(text, _Texts if texts else _Values if aliases else _ValuesWithoutAliases)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {_yaml_problem(error)}") from error
    except (AttributeError, LookupError, TypeError, OverflowError) as error:  # its loader, of `!!bool x` and the like
        raise ValueError("not valid YAML: a tag (!!name) does not fit its value") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong and where, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"{visible(error.problem or 'it ends too early')} (line {mark.line + 1}, column {mark.column + 1})"
    return visible(" ".join(str(error).split()))
