"""Messages between ranks: JSON of a declared type, validated when it arrives, and never a pickle."""

import builtins
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from ...data.text import visible

MOST_BYTES = 1 << 30  # of one rank's message
ERRORS: Mapping[str, type[Exception]] = {
    name: kind
    for name, kind in vars(builtins).items()
    if isinstance(kind, type) and issubclass(kind, OSError) and kind.__name__ == name
} | {"ValueError": ValueError}  # those that a rank passes on


@dataclass(frozen=True)
class Failure:
    """An error of one rank, for the others to raise as well: its type and text, and an OSError's other arguments."""

    kind: str
    text: str
    errno: int | None
    strerror: str | None
    names: list[tuple[str, bool]]  # of the files, and whether it was a Path

    @staticmethod
    def of(error: Exception) -> "Failure":
        kind = next(base.__name__ for base in type(error).__mro__ if ERRORS.get(base.__name__) is base)
        text = _writable(str(error))
        if not isinstance(error, OSError) or error.errno is None or error.strerror is None:
            return Failure(kind, text, None, None, [])
        found = [name for name in (error.filename, error.filename2) if isinstance(name, str | bytes | Path)]
        names = [(_writable(os.fsdecode(name)), isinstance(name, Path)) for name in found]
        return Failure(kind, text, error.errno, error.strerror, names)

    def error(self) -> Exception:
        """The error again; from its text alone when the other arguments do not give the same text."""
        kind = ERRORS.get(self.kind, OSError)
        if self.errno is not None:
            names = [Path(name) if is_path else name for name, is_path in self.names]
            places = [names[0]] if len(names) == 1 else [names[0], None, names[1]] if len(names) == 2 else []
            again = kind(self.errno, self.strerror, *places)
            if str(again) == self.text:
                return again
        return kind(self.text)


def encoded(value: Any, kind: Any) -> bytes:
    """`value` as JSON; floats exactly, NaN and infinities too. Raises ValueError when it is not of that kind."""
    try:
        plain = _adapter(kind).dump_python(value, mode="json", warnings="error")
    except PydanticSerializationError as error:
        raise ValueError(f"not {_named(kind)}, which the ranks expect: {error}") from error
    return json.dumps(plain, ensure_ascii=False, separators=(",", ":")).encode()


def decoded(content: bytes, kind: Any, sender: str) -> Any:
    """The value that `encoded` was given. Raises OSError that names the sender when it is not of that kind."""
    try:
        return _adapter(kind).validate_json(content, strict=True)
    except ValidationError as error:
        mistake = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{part}]" for part in mistake["loc"])
        raise OSError(
            f"{sender} sent {visible(repr(content[:40]))}{'...' * (len(content) > 40)}, which is not {_named(kind)}: "
            f"{visible(place + ' ' * bool(place) + mistake['msg'])}. It is no rank of this version of ddetr, or "
            "somebody else reaches the ports of the run"
        ) from None


def _writable(text: str) -> str:
    """Text that UTF-8 can write: a file's name may hold bytes that it cannot."""
    return text.encode(errors="backslashreplace").decode()


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(kind)


def _named(kind: Any) -> str:
    return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__args__") else str(kind)
