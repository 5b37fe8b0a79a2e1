"""JSON and YAML that may come from a stranger: whatever is wrong with them is a ValueError."""

import json
import math
from functools import partial
from typing import Any

import yaml


def parse_json(text: str | bytes | bytearray) -> Any:
    """Raises ValueError for what is no JSON, and for brackets within brackets without end."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


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


MOST_BYTES = 1 << 20  # of a stranger's YAML: a hundred configurations; its parser takes minutes for more


class _WithoutAliases(yaml.SafeLoader):
    """A few lines of aliases of aliases stand for billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("it has aliases (*name), which stand for more than is written: write them out")
        return super().compose_node(parent, index)


def parse_yaml(text: str | bytes, *, aliases: bool = False) -> Any:
    """Raises ValueError for what is no YAML and for nesting without end.

    Where aliases are not allowed, the text is a stranger's: then for more than 1 MiB of it, too. No tag of it makes an
    object, let alone runs anything.
    """
    if not aliases and len(text) > MOST_BYTES:
        raise ValueError(f"it is {len(text) / 2**20:.1f} MiB long, more than {MOST_BYTES >> 20} MiB")
    try:
        return yaml.load(text, yaml.SafeLoader if aliases else _WithoutAliases)
    except yaml.YAMLError as error:
        raise ValueError(f"not valid YAML: {error}") from error
    except (AttributeError, LookupError, TypeError, OverflowError) as error:  # its loader, of `!!bool x` and the like
        raise ValueError("not valid YAML: a tag (!!name) does not fit its value") from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
