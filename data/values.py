"""Values out of an untrusted file.

`member` and `whole` are for our own formats: each is what it must be, or a ValueError says what it is. `as_number`,
`as_whole` and `as_flag` are for everybody's annotations: a value is read where only one thing can be meant.
"""

import re
import reprlib
from typing import Any

from .text import visible

MOST_ID = 2**63 - 1  # what an array of numbers holds
MOST_SIDE = 2**31 - 1  # pixels
_MOST = 1e18  # of a number that is computed with; far more than any coordinate or area
_MOST_EXACT = 2**53  # up to here each whole number is a float of its own
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_LONGEST_NUMBER = 400  # characters
_WORDS = {"": False, "false": False, "no": False, "unspecified": False, "true": True, "yes": True}


def is_whole(value: object, least: int = 0, most: int = MOST_ID) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: object) -> bool:
    """Whether `value` is a finite int or float within +-_MOST; a bool is not."""
    return type(value) in (int, float) and -_MOST <= value <= _MOST  # type: ignore[operator]


def as_number(value: object) -> int | float | None:
    """The number that is meant: 12, 12.5, "12", " 12.50 ". None for anything else, true and "nan" among it."""
    if isinstance(value, str):
        value = _written_number(value)
    return value if is_number(value) else None  # type: ignore[return-value]


def as_whole(value: object, least: int = 0, most: int = MOST_ID) -> int | None:
    """The whole number that is meant: 12, 12.0, "12", "12.0". None for anything else, and outside the limits."""
    if isinstance(value, str):
        value = _written_number(value)
    if isinstance(value, float) and value.is_integer() and abs(value) <= _MOST_EXACT:
        value = int(value)
    return value if is_whole(value, least, most) else None  # type: ignore[return-value]


def as_flag(value: object) -> bool | None:
    """The yes or no that is meant: true, 1, 1.0, "1", "true", "yes", and their opposites; null is no. None: unclear."""
    if value is None or isinstance(value, bool):
        return bool(value)
    if isinstance(value, str) and (word := value.strip().lower()) in _WORDS:
        return _WORDS[word]
    number = as_number(value)
    return bool(number) if number in (0, 1) else None


def _written_number(text: str) -> int | float | None:
    text = text.strip()
    if len(text) > _LONGEST_NUMBER or not _NUMBER.fullmatch(text):
        return None
    return int(text) if text.lstrip("+-").isdigit() else float(text)


def member(values: object, name: str, kind: type) -> Any:
    """values[name], of exactly that type: true is no number. Raises ValueError for anything else."""
    if not isinstance(values, dict):
        raise ValueError(f"{described(values)} stands where an object with {name!r} should")
    if name not in values:
        raise ValueError(f"{name!r} is missing")
    if type(values[name]) is not kind:
        raise ValueError(f"{name!r} is {described(values[name])}")
    return values[name]


def whole(values: object, name: str, least: int = 0, most: int = MOST_ID) -> int:
    """values[name], a whole number from `least` to `most`. Raises ValueError for anything else."""
    value = member(values, name, int)
    if not least <= value <= most:
        raise ValueError(f"{name!r} is {described(value)}, not a whole number from {least} to {most}")
    return value


def described(value: object) -> str:
    """A value as a message may repeat it, however long or deep it is."""
    return visible(reprlib.repr(value))
