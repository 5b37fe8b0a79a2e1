"""Protocols of scores: what a user's own may be wrong about is said before anything is computed."""

import math
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from ddetr.core.config import EvalConfig
from ddetr.core.evaluation import scores
from ddetr.core.evaluation.columns import DETECTION_DTYPE
from ddetr.core.evaluation.scores import OF_SETS, Protocol, Tallies, check_protocols, in_brief
from ddetr.core.evaluation.tally import Tally
from ddetr.data.categories import Categories
from ddetr.data.index import ShardIndex
from ddetr.data.layout import SAMPLE_DTYPE, Shard
from ddetr.data.truth import GroundTruth

COCO = OF_SETS["coco"]


def with_protocols(monkeypatch: pytest.MonkeyPatch, *protocols: Protocol) -> None:
    monkeypatch.setattr(scores, "PROTOCOLS", list(protocols))


def of(found: dict[str, float], **others: Any) -> Protocol:
    """One that always gives these numbers."""
    meanings = dict.fromkeys(found, "a number")
    given = {"meanings": meanings, "brief": (), "score": lambda truth, rows: found}
    return Protocol.of(**{**given, **others})


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    """Of a set of two images."""
    samples = np.zeros(2, dtype=SAMPLE_DTYPE)
    samples["image_id"] = (7, 3)
    shard = Shard(tmp_path / "shard-000000.tar", 1, "0" * 64, "0" * 64, samples)
    return ShardIndex(tmp_path, Categories((1, 2), ("one", "two")), {}, [shard])


def an_object(image_id: int) -> GroundTruth:
    box = {"image_id": image_id, "category_id": 2, "bbox": [10.0, 10.0, 20.0, 20.0]}
    return GroundTruth.of_coco({"images": [{"id": image_id}], "annotations": [box]})


def a_detection(image_id: int, category_id: int = 2) -> np.ndarray:
    return np.array([(image_id, category_id, (10.0, 10.0, 20.0, 20.0), 0.5)], dtype=DETECTION_DTYPE)


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (of({"AP": 0.5}), "the name 'AP' is taken"),
        (of({"AP_rare": 0.5}), "the name 'AP_rare' is taken"),
        (of({"step": 0.5}), "the name 'step' is taken"),
        (of({"hits": 0.5}, brief=("misses",)), r"a protocol of \['hits'\] has no 'misses' to show"),
        (of({"h" * 61: 0.5}), "is no name that can be shown"),
        (of({"a\nb": 0.5}), r"a\\nb is no name that can be shown"),
    ],
)
def test_a_protocol_that_cannot_work_is_named(
    protocol: Protocol, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_protocols(monkeypatch, protocol)
    with pytest.raises(ValueError, match=message):
        check_protocols()


def test_the_scores_of_all_protocols_come_in_the_order_of_their_meanings(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The set's own first."""
    backwards = of({"b": 0.25, "a": 0.5}, meanings={"a": "first", "b": "second"})
    with_protocols(monkeypatch, of({"c": 1.0}, brief=("c",)), backwards)
    check_protocols()
    found = Tallies(index, EvalConfig()).scores()
    assert list(found.items()) == [*dict.fromkeys(COCO.meanings, -1.0).items(), ("c", 1.0), ("a", 0.5), ("b", 0.25)]
    assert (scores.headline(), scores.meanings("coco")["b"]) == ("AP", "second")
    assert in_brief({"c": 1.0, "a": 0.5, "d": 0.125}, "c") == "c 1.000, d 0.125"


def test_scores_that_were_not_promised_are_named(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    with_protocols(monkeypatch, of({"a": 0.5}, meanings={"a": "first", "b": "second"}))
    with pytest.raises(ValueError, match=r"promises the scores \['a', 'b'\] and computed \['a'\]"):
        Tallies(index, EvalConfig()).scores()


def test_a_function_gets_what_all_processes_have_counted(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the images, whoever counted what; without detections in categories that the set does not list."""
    seen: list[Any] = []

    def score(truth: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
        seen.append((truth, rows))
        return {"own": 0.5}

    with_protocols(monkeypatch, of({"own": 0.5}, score=score))
    for swapped in (False, True):
        ours, theirs = Tallies(index, EvalConfig()), Tallies(index, EvalConfig())
        for tallies, image_id in zip((theirs, ours) if swapped else (ours, theirs), (7, 3), strict=True):
            tallies.add(an_object(image_id), np.concatenate([a_detection(image_id), a_detection(image_id, 99)]))
        ours.merge([theirs.to_bytes(), Tallies(index, EvalConfig()).to_bytes()])
        assert ours.scores() == dict.fromkeys(COCO.meanings, -1.0) | {"own": 0.5} | {
            name: pytest.approx(1.0) for name in COCO.meanings if not name.endswith(("_medium", "_large"))
        }
    assert seen[0] == seen[1]
    truth, rows = seen[0]
    assert [image["id"] for image in truth["images"]] == [3, 7]
    assert [(row["image_id"], row["category_id"]) for row in truth["annotations"]] == [(3, 2), (7, 2)]
    assert [(row["image_id"], row["category_id"], row["score"]) for row in rows] == [(3, 2, 0.5), (7, 2, 0.5)]


def test_tallies_of_other_protocols_are_refused(index: ShardIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Tallies(index, EvalConfig()).to_bytes()
    with_protocols(monkeypatch, of({"own": 0.5}))
    with pytest.raises(ValueError, match="tallies of other protocols than these"):
        Tallies(index, EvalConfig()).merge([other])


def test_an_evaluation_that_met_infinities_or_nan_has_no_score(index: ShardIndex) -> None:
    diverged, sound = (Tallies(index, EvalConfig()) for _ in range(2))
    for tallies in (diverged, sound):
        tallies.add(an_object(3), a_detection(3))
    found = diverged.scores(num_not_finite=3)
    assert list(found) == list(COCO.meanings)
    assert all(math.isnan(value) for value in found.values())
    assert sound.scores()["AP"] == pytest.approx(1.0)


def test_the_order_of_what_a_function_gets_does_not_depend_on_the_division_among_processes(
    index: ShardIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four shards of one process, or of two that evaluate every second one."""
    seen: list[Any] = []

    def score(truth: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, float]:
        ids = [image["id"] for image in truth["images"]]
        seen.append((ids, [row["image_id"] for row in truth["annotations"]], [row["image_id"] for row in rows]))
        return {"own": 0.5}

    whole = Protocol.of({"own": "a number"}, (), score)
    for processes in (1, 2):
        tallies = [whole.tally(index, EvalConfig()) for _ in range(processes)]
        for shard, image_ids in enumerate([(5, 1), (2, 6), (3,), (4,)]):
            truth = GroundTruth.joined([an_object(image_id) for image_id in image_ids])
            tallies[shard % processes].add(truth, np.concatenate([a_detection(image_id) for image_id in image_ids]))
        tallies[0].merge([tally.to_bytes() for tally in tallies[1:]])
        tallies[0].scores()
    assert seen == [([1, 2, 3, 4, 5, 6],) * 3] * 2


@pytest.mark.parametrize("kind", ["coco", "pycocotools", "openimages"])
def test_damaged_tallies_are_refused_by_one_error(index: ShardIndex, kind: str) -> None:
    """Whatever bytes another process sends: a tally, perhaps of other numbers, or ValueError."""

    def tally() -> Tally:
        scorer = "pycocotools" if kind == "pycocotools" else "hotcoco"
        return OF_SETS["openimages" if kind == "openimages" else "coco"].tally(index, EvalConfig(scorer=scorer))

    sound, random, refused = tally(), np.random.default_rng(1), 0
    sound.add(an_object(3), a_detection(3))
    data = sound.to_bytes()
    for attempt in range(600):
        damaged = bytearray(data[: random.integers(len(data)) if attempt % 4 == 0 else None])
        for place in random.integers(0, min(len(damaged) + 1, 300), attempt % 4):
            damaged[place : place + 1] = bytes([random.choice([0, 10, 49, 91, 125, 255])])
        try:
            tally().merge([bytes(damaged)])
        except ValueError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("scorer", ["hotcoco", "pycocotools"])
def test_a_set_that_has_an_image_twice_is_refused(index: ShardIndex, scorer: Literal["hotcoco", "pycocotools"]) -> None:
    """Scorers differ on it: one takes the objects of both for one image's, the other those of the last."""
    again = ShardIndex(index.location, index.categories, {}, [*index.shards, *index.shards[:1]])
    with pytest.raises(ValueError, match=r"2 images stand in it more than once.*the first one: 3\. Pack the set again"):
        Tallies(again, EvalConfig(scorer=scorer))
