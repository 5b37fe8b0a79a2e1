"""What a stranger may do to a valid file, and what holds for every reader of it.

A reader gives a value or refuses: `outcome`. It takes little memory and time, and writes nothing: `Effort`, `watched`.
"""

import contextlib
import copy
import os
import re
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ddetr.data.text import visible
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Value = TypeVar("Value")

HEADROOM_BYTES = 1 << 30  # that a reader may take
MOST_CPU_SECONDS = 20  # of one example; the slowest takes a tenth of a second
LONGEST_LINE = 4000  # characters of a message
ERRORS = {ValueError, OSError, FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError}

# Text that some part of a program takes for more than text.
NASTY = ["", " ", ".", "..", "/", "../x", "a\0b", "a\nb", "\x1b[31m", "\u202e", "\ud800", "null", "nan", "[x", "*a"]
NASTY += ["1", "-1", "1.0", "1e400", "12_0", "0x10", "\u0663", "9" * 5000, "x" * 5000, "\ufeff1", "true", "{", "%s{0}"]
HUGE = [
    -1 - 2**63,
    -(10**30),
    -(10**400),
    2**31 - 1,
    2**31,
    2**32,
    2**53 + 1,
    2**63 - 1,
    2**63,
    10**30,
    10**400,
    10**4000,
]


def _one_of(values: Sequence[Value]) -> st.SearchStrategy[Value]:
    """`sampled_from`, which prints them all with each failure."""
    return st.integers(0, len(values) - 1).map(lambda number: values[number])


NUMBERS = st.one_of(
    st.integers(-3, 300),
    _one_of(HUGE),
    st.floats(),
    st.sampled_from([0.5, -0.0, 1e18, 1e19, 1e300, 5e-324]),
)
TEXTS = st.one_of(_one_of(NASTY), st.text(max_size=8))
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
WILD = st.one_of(
    LEAVES,
    st.recursive(
        LEAVES,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    st.sampled_from([3, 50, 400]).map(lambda depth: _nested(depth)),
)


def _nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def changed(draw: st.DrawFn, document: Any, most: int = 3, values: st.SearchStrategy[Any] = WILD) -> Any:
    """A document with a few places changed: other values, keys left out, added and renamed, entries twice, moved."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, most))):
        place, key = _place(draw, document)
        if place is None:
            document = draw(values)
            continue
        operation = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "repeat", "exchange"]))
        if operation == "replace":
            place[key] = draw(values)
        elif operation == "remove":
            del place[key]
        elif operation == "add" and isinstance(place, dict):
            place[draw(TEXTS)] = draw(values)
        elif isinstance(place, list):
            place.insert(draw(st.integers(0, len(place))), copy.deepcopy(place[key]) if key < len(place) else None)
        else:
            other, other_key = _place(draw, document)
            if other is not None:
                place[key] = copy.deepcopy(other[other_key])
    return document


def _place(draw: st.DrawFn, document: Any) -> tuple[Any, Any]:
    """A container within a document and a key of it; none where the document has no parts."""
    place = key = None
    at = document
    while isinstance(at, dict | list) and at:
        place = at
        key = draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        at = place[key]
        if draw(st.integers(0, 3)) == 0:
            break
    return place, key


# Pieces that a parser stumbles over, among them.
PIECES = [
    b"[" * 100_000,
    b"{" * 3000,
    b"9" * 5000,
    b"NaN",
    b"1e999",
    b"\xff\xfe",
    b"\\ud800",
    b"\0",
    b"\x80",
    b"\n",
    b"-",
]
PIECES += [
    b"{}",
    b"[]",
    b'"',
    b"null",
    b"\xff" * 8,
    b"\x7f" + b"\xff" * 7,
    b"\r\n",
    b":",
    b"#",
    b"&a ",
    b"*a",
    b"!!",
    b"<",
]
Damage = list[tuple[str, int, int, bytes]]
_POSITIONS = st.one_of(st.integers(0, 700), st.integers(0, 1 << 24))
DAMAGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "set", "cut", "insert", "repeat", "end", "zero"]),
        _POSITIONS,
        st.one_of(st.integers(0, 40), st.integers(0, 5000)),
        st.one_of(st.binary(min_size=1, max_size=8), _one_of(PIECES)),
    ),
    min_size=1,
    max_size=4,
)


def damaged(data: bytes, damage: Damage) -> bytes:
    """Data after bits were flipped, bytes set, cut out, put in, repeated, zeroed, or the end lost."""
    for kind, position, size, piece in damage:
        at = position % (len(data) + 1)
        if kind == "flip" and data:
            at %= len(data)
            data = data[:at] + bytes([data[at] ^ 1 << size % 8]) + data[at + 1 :]
        elif kind == "set":
            data = data[:at] + piece + data[at + len(piece) :]
        elif kind == "cut":
            data = data[:at] + data[at + size :]
        elif kind == "insert":
            data = data[:at] + piece + data[at:]
        elif kind == "repeat":
            data = data[: at + size] + data[at:]
        elif kind == "end":
            data = data[:at]
        elif kind == "zero":
            data = data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
    return data


def outcome(read: Callable[[], Value], *names: str | Path, lines: bool = False) -> Value | None:
    """What `read` gives; None where it refuses, in one printable line that has one of `names` in it.

    lines: a list of mistakes may follow that line, each set in.
    """
    try:
        return read()
    except (ValueError, OSError) as error:
        refusal = error
    kind = type(refusal)
    assert kind in ERRORS or kind.__module__.startswith("ddetr."), f"{kind.__name__} was not wrapped: {refusal}"
    first, *more = str(refusal).split("\n")
    assert lines or not more, str(refusal)
    assert not names or any(str(name) in first for name in names), f"it names no file: {first}"
    for line in (first, *more):
        assert visible(line) == line, ascii(line)
        assert len(line) < LONGEST_LINE, line
    return None


def listing(folder: Path) -> dict[str, tuple[int, int, int]]:
    """What is in a folder, with size, time of the last change, and kind."""
    found = ((path, path.lstat()) for path in sorted(folder.rglob("*")))
    return {str(path): (status.st_size, status.st_mtime_ns, status.st_mode) for path, status in found}


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
_EVENTS |= {"os.chown", "os.utime", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork"}
_EVENTS |= {"socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto"}
_watching: int | None = None  # a thread
_seen: list[str] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching == threading.get_ident() and (
        event in _EVENTS or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITES)
    ):
        _seen.append(f"{event} {arguments!r}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Within it this thread may write no file anywhere, start no program and open no connection."""
    global _watching
    _seen.clear()
    _watching = threading.get_ident()
    try:
        yield
    finally:
        _watching = None
    assert not _seen, _seen


class _TooLong(BaseException):
    """No reader takes it for an error of a file."""


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    """Processor time and memory end."""

    def stop(*_: object) -> None:
        raise _TooLong

    mapped = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + HEADROOM_BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, MOST_CPU_SECONDS)
    try:
        yield
    except _TooLong:
        raise AssertionError(f"it takes more than {MOST_CPU_SECONDS} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclass(frozen=True)
class Effort:
    """How many examples of a property are tried: always the same ones, or for some time new ones.

    A failing example is printed with a `reproduce_failure` line, which goes onto the property that is inside the test.
    """

    examples: int | None = None
    seconds: float = 0

    def __call__(self, holds: Callable[..., None], *strategies: st.SearchStrategy[Any], cost: int = 1) -> None:
        """cost: of an example, in usual ones."""
        failed, end = False, time.monotonic() + self.seconds

        def tried(drawn: tuple[Any, ...]) -> None:
            nonlocal failed
            if self.examples is None and not failed and time.monotonic() > end:
                return
            try:
                with _bounded():
                    holds(*drawn)
            except Exception:
                failed = True  # it is made smaller, however long that takes
                raise

        options: dict[str, Any] = {"database": None, "deadline": None, "print_blob": True}
        options |= {"suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
        if self.examples is not None:
            settings(max_examples=self.examples // cost, derandomize=True, **options)(
                given(st.tuples(*strategies))(tried)
            )()
        while self.examples is None and time.monotonic() < end:
            settings(max_examples=500, **options)(given(st.tuples(*strategies))(tried))()
