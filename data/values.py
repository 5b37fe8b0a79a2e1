"""Values out of a JSON that a stranger may have written: each is what it must be, or a ValueError says what it is."""

import reprlib
from typing import Any

from .text import visible

MOST_ID = 2**63 - 1  # what an array of numbers holds
MOST_SIDE = 2**31 - 1  # pixels
_MOST = 1e18  # of a number that is computed with; far more than any coordinate or area


def is_whole(value: object, least: int = 0, most: int = MOST_ID) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: object) -> bool:
    """A number that can be computed with: neither true nor false, neither endless nor beyond any use."""
    return type(value) in (int, float) and -_MOST <= value <= _MOST  # type: ignore[operator]


def member(values: object, name: str, kind: type) -> Any:
    """values[name], of exactly that type: true is no number."""
    if not isinstance(values, dict):
        raise ValueError(f"{described(values)} stands where an object with {name!r} should")
    if name not in values:
        raise ValueError(f"{name!r} is missing")
    if type(values[name]) is not kind:
        raise ValueError(f"{name!r} is {described(values[name])}")
    return values[name]


def whole(values: object, name: str, least: int = 0, most: int = MOST_ID) -> int:
    value = member(values, name, int)
    if not least <= value <= most:
        raise ValueError(f"{name!r} is {described(value)}, not a whole number from {least} to {most}")
    return value


def described(value: object) -> str:
    """A value as a message may repeat it, however long or deep it is."""
    return visible(reprlib.repr(value))
