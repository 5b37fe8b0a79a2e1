"""YAML as it is read: what PyYAML takes for something else than is written is refused."""

import datetime
from typing import Any

import pytest
from ddetr.data.documents import parse_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("{a: 0, b: -0, c: 1_000, d: 0x10, e: 0b11}", {"a": 0, "b": 0, "c": 1000, "d": 16, "e": 3}),
        ("[0.5, .5, 1.0e+5, -9223372036854775808]", [0.5, 0.5, 1e5, -(2**63)]),
        ("a: 2026-11-30", {"a": datetime.date(2026, 11, 30)}),
        ("a: &x {k: 1, l: 2}\nb: {<<: *x, k: 3}", {"a": {"k": 1, "l": 2}, "b": {"k": 3, "l": 2}}),
        (b"\xef\xbb\xbfa: 1", {"a": 1}),
        ("a: 1".encode("utf-16"), {"a": 1}),
        ("{1: a, '1': b}", {1: "a", "1": "b"}),
    ],
)
def test_values(text: str | bytes, value: Any) -> None:
    assert parse_yaml(text, aliases=True) == value


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\nb: 2\na: 1", "the key a stands twice, in lines 1 and 3"),
        ("x: {a: 1, a: 2}", "the key a stands twice, in line 1"),
        ("- - {a: {b: 1,\n  b: 1}}", "the key b stands twice, in lines 1 and 2"),
        ("? {a: 1, a: 2}\n: 1", "the key a stands twice"),
        ("a: 010", r"010 \(line 1\) is octal or sexagesimal in YAML: write it in decimal"),
        ("a: 1\nb: 1:30", r"1:30 \(line 2\) is octal or sexagesimal"),
        ("a: 1:30.5", "1:30.5 .* is sexagesimal"),
        ("a: !!int '010'", "is octal"),
        ("a: !!int x", r"x \(line 1\) is no number"),
        ("a: 9223372036854775808", "is too large: a number has 64 bits at most"),
        ("a: " + "9" * 5000, "99… .* is too large"),
        ("a: 0x" + "f" * 5000, "ff… .* is too large"),
        ("a: 2026-13-45", r"2026-13-45 \(line 1\) is no date: put quotes around a text"),
        (b"\xe9: 1", "it is not text in UTF-8"),
        ("#" * (1 << 20) + "\n", "it is longer than 1 MiB"),
    ],
)
def test_what_is_refused(text: str | bytes, said: str) -> None:
    for aliases in (True, False):
        with pytest.raises(ValueError, match=said) as refusal:
            parse_yaml(text, aliases=aliases)
        assert "\n" not in str(refusal.value)
        assert len(str(refusal.value)) < 200


def test_texts_are_what_is_written_and_no_key_twice() -> None:
    assert parse_yaml("{a: 010, b: 1:30, no: on}", texts=True) == {"a": "010", "b": "1:30", "no": "on"}
    with pytest.raises(ValueError, match="the key a stands twice, in lines 1 and 2"):
        parse_yaml("a: 1\na: 2", texts=True)
