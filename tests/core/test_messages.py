"""What ranks tell each other arrives as it was, and what no rank of ours sent is refused."""

import json
import math
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddetr.core.training.messages import Failure, decoded, encoded
from ddetr.core.training.state import Fragment
from ddetr.core.training.verdict import Beat, Identity
from hypothesis import given
from hypothesis import strategies as st


@given(st.lists(st.floats()))
def test_floats_arrive_bit_by_bit(values: list[float]) -> None:
    for sent, arrived in zip(values, decoded(encoded(values, list[float]), list[float], "rank 1"), strict=True):
        assert struct.pack("d", sent) == struct.pack("d", arrived) or (math.isnan(sent) and math.isnan(arrived))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ((Path("/runs/ä \n b"), True), tuple[Path, bool]),
        (None, Path | None),
        ([Identity("node0", 7, "machine")], list[Identity]),
        ([Fragment("class_embed.0.weight", 0, 1, 2, 3)], list[Fragment]),
        ({"AP": math.inf, "AP50": 0.1 + 0.2}, dict[str, float]),
        (Beat(1, 2, "waiting", 0.5, [3], ["core/training/trainer.py:1 train"]), Beat),
    ],
)
def test_what_is_sent_arrives(value: Any, kind: Any) -> None:
    assert decoded(encoded(value, kind), kind, "rank 1") == value


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (pickle.dumps([1]), list[int]),
        (b"", list[int]),
        (b"\xff\x00", str),
        (b'["1"]', list[int]),
        (b"[1]", list[bool]),
        (b"[" * 100_000, list[int]),
        (b'{"host": "\x1b[2J", "pid": "1"}', Identity),
        (b'{"moves":1,"step":2,"activity":"","seconds":0.5,"images":[],"stack":[]}', Beat),
    ],
)
def test_what_no_rank_sent_is_refused(content: bytes, kind: Any) -> None:
    with pytest.raises(OSError, match=r"^rank 1 sent b.*, which is not .* somebody else reaches the ports") as refused:
        decoded(content, kind, "rank 1")
    assert str(refused.value).isprintable()


def test_what_the_others_do_not_expect_is_not_sent() -> None:
    for value, kind in ((["1"], list[int]), (Path("x"), list[str]), ("\udcff", str)):
        with pytest.raises(ValueError, match=r"which the ranks expect|surrogates not allowed"):
            encoded(value, kind)


def raised(function: Callable[[], object]) -> Exception:
    with pytest.raises((ValueError, OSError)) as caught:
        function()
    return caught.value


def test_errors_keep_kind_text_and_file(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    for error in (
        raised(absent.open),
        raised(absent.unlink),
        raised(lambda: os.rename(absent, tmp_path / "b")),
        raised(lambda: int("x")),
        FileNotFoundError("no checkpoint"),
        OSError(28, "No space left on device", absent),
        PermissionError(13, "Permission denied"),
        ValueError("two\nlines"),
    ):
        again = decoded(encoded(Failure.of(error), Failure), Failure, "rank 0").error()
        assert type(again) is type(error)
        assert str(again) == str(error)
        for name in ("errno", "strerror", "filename2"):
            assert getattr(again, name, None) == getattr(error, name, None)
        if isinstance(error, OSError) and isinstance(error.filename, str | Path):
            assert again.filename == error.filename  # type: ignore[attr-defined]
    special = decoded(encoded(Failure.of(raised(lambda: json.loads("{"))), Failure), Failure, "rank 0").error()
    assert type(special) is ValueError
    assert str(special).startswith("Expecting property name")
    unwritable = decoded(encoded(Failure.of(FileNotFoundError(2, "No", "/\udcff")), Failure), Failure, "rank 0").error()
    assert isinstance(unwritable, FileNotFoundError)
    assert r"\udcff" in str(unwritable)


def test_an_error_of_another_kind_is_not_made() -> None:
    """The kind is a name in a message: it calls nothing but these errors."""
    told = Failure("eval", "__import__('os').abort()", None, None, [])
    assert type(decoded(encoded(told, Failure), Failure, "rank 0").error()) is OSError
