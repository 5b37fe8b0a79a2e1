"""Protocols of scores: what a user's own may be wrong about is said before anything is computed."""

from typing import Any

import pytest
from ddetr.core.evaluation import scores
from ddetr.core.evaluation.scores import COCO, Protocol, check_protocols, in_brief, scored


def with_protocols(monkeypatch: pytest.MonkeyPatch, *protocols: Protocol) -> None:
    monkeypatch.setattr(scores, "PROTOCOLS", list(protocols))


def of(found: dict[str, float], **others: Any) -> Protocol:
    """One that always gives these numbers."""
    meanings = dict.fromkeys(found, "a number")
    given = {"meanings": meanings, "headline": next(iter(found)), "brief": (), "score": lambda truth, rows: found}
    return Protocol(**{**given, **others})


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (of({"AP": 0.5}), "the name 'AP' is taken"),
        (of({"step": 0.5}), "the name 'step' is taken"),
        (of({"hits": 0.5}, headline="hit"), r"a protocol of \['hits'\] has no 'hit' to show"),
        (of({"hits": 0.5}, brief=("misses",)), "has no 'misses' to show"),
        (of({"h" * 61: 0.5}), "is no name that can be shown"),
        (of({"a\nb": 0.5}), r"a\\nb is no name that can be shown"),
    ],
)
def test_a_protocol_that_cannot_work_is_named(
    protocol: Protocol, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_protocols(monkeypatch, COCO, protocol)
    with pytest.raises(ValueError, match=message):
        check_protocols()


def test_the_scores_of_all_protocols_come_in_the_order_of_their_meanings(monkeypatch: pytest.MonkeyPatch) -> None:
    backwards = of({"b": 0.25, "a": 0.5}, meanings={"a": "first", "b": "second"})
    with_protocols(monkeypatch, of({"c": 1.0}, brief=("c",)), backwards)
    check_protocols()
    assert list(scored({}, []).items()) == [("c", 1.0), ("a", 0.5), ("b", 0.25)]
    assert (scores.headline(), scores.meanings()["b"]) == ("c", "second")
    assert in_brief({"c": 1.0, "a": 0.5, "d": 0.125}, "c") == "c 1.000, d 0.125"


def test_scores_that_were_not_promised_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with_protocols(monkeypatch, of({"a": 0.5}, meanings={"a": "first", "b": "second"}, headline="a"))
    with pytest.raises(ValueError, match=r"promises the scores \['a', 'b'\] and computed \['a'\]"):
        scored({}, [])
