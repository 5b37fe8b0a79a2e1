"""Which detection is which object, and AP of it, against pycocotools."""

import numpy as np
import pytest
from ddetr.core.evaluation.matching import THRESHOLDS, matches
from ddetr.core.evaluation.precision import RECALLS, Ranking, reached
from ddetr.data.categories import Categories
from ddetr.data.truth import GroundTruth

from tests.core.detection_sets import CATEGORIES, by_pycocotools, detected, drawn, objects


def of_pycocotools(truth: GroundTruth, detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Precision (T, K, 101), AP (T, K), NaN without objects. Its second axis is the recall, its last two all, 100."""
    precision = by_pycocotools(truth, detections).eval["precision"][:, :, :, 0, 2].transpose(0, 2, 1)
    precision = np.where(precision < 0, np.nan, precision)
    return precision, precision.mean(axis=2)


def ours(truth: GroundTruth, detections: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = matches(truth, detections, CATEGORIES)
    num_objects = found.num_objects
    rankings = [Ranking(found.label, *rows, len(num_objects)) for rows in zip(found.true, found.ignored, strict=True)]
    steps = [ranking.steps(num_objects) for ranking in rankings]
    curves, averages = zip(*((part.curves(num_objects), part.average(num_objects)) for part in steps), strict=True)
    return np.stack(curves), np.stack(averages)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("crowds", [0.0, 0.25])
def test_every_class_and_threshold_has_the_precision_of_pycocotools(seed: int, crowds: float) -> None:
    truth, detections = drawn(seed, crowds=crowds, ids=1_000_003)
    for mine, theirs in zip(ours(truth, detections), of_pycocotools(truth, detections), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-9, equal_nan=True)


def test_each_detection_is_the_object_that_pycocotools_takes() -> None:
    truth, detections = drawn(11, crowds=0.25, equal_scores=False)
    found = matches(truth, detections, CATEGORIES)
    evaluation = by_pycocotools(truth, detections)
    checked = 0
    for entry in evaluation.evalImgs:
        if entry is None or entry["aRng"] != [0, 1e10]:
            continue
        for place in range(len(THRESHOLDS)):
            for score, match, aside in zip(
                entry["dtScores"], entry["dtMatches"][place], entry["dtIgnore"][place], strict=True
            ):
                here = (found.detections["image_id"] == entry["image_id"]) & (found.detections["score"] == score)
                (row,) = np.flatnonzero(here)
                object_ = found.matched[place, row]
                assert (found.objects["id"][object_] if object_ >= 0 else 0) == match
                assert found.ignored[place, row] == bool(aside)
                checked += 1
    assert checked > 300


def test_only_the_hundred_surest_of_a_class_in_an_image_count() -> None:
    truth = objects((1, 7, 0, 0, 10, 10), (1, 3, 0, 0, 10, 10))
    rows = [(1, 7, 0.9 - number / 1000, 50, 50, 10, 10) for number in range(100)]
    detections = detected(*rows, (1, 7, 0.1, 0, 0, 10, 10), (1, 3, 0.1, 0, 0, 10, 10))
    found = matches(truth, detections, CATEGORIES)
    assert len(found.detections) == 101
    for mine, theirs in zip(ours(truth, detections), of_pycocotools(truth, detections), strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-12, equal_nan=True)


def test_a_set_without_detections_or_without_objects() -> None:
    nothing = detected()
    _, averages = ours(objects((1, 7, 0, 0, 10, 10)), nothing)
    assert averages[0].tolist()[1] == 0
    assert np.isnan(averages[:, [0, 2]]).all()
    found = matches(objects(images=2), detected((2, 7, 0.5, 0, 0, 5, 5)), Categories((7,), ("cat",)))
    assert found.matched.max() == -1
    assert found.num_objects.tolist() == [0]


def test_recalls_are_counted_as_searchsorted_does() -> None:
    recalls = np.unique([part / whole for whole in range(1, 120) for part in range(whole + 1)])
    assert reached(recalls).tolist() == np.searchsorted(RECALLS, recalls, side="right").tolist()


def test_of_equally_near_objects_the_last_is_taken_as_by_pycocotools() -> None:
    truth = objects((1, 7, 0, 0, 10, 10), (1, 7, 0, 0, 10, 10), (1, 7, 0, 0, 10, 10, 1))
    detections = detected((1, 7, 0.9, 0, 0, 10, 9), (1, 7, 0.8, 0, 0, 10, 9), (1, 7, 0.7, 0, 0, 10, 9))
    found = matches(truth, detections, CATEGORIES)
    (entry,) = (entry for entry in by_pycocotools(truth, detections).evalImgs if entry and entry["aRng"] == [0, 1e10])
    assert entry["dtMatches"][0].tolist() == [2, 1, 3]
    assert found.objects["id"][found.matched[0]].tolist() == [2, 1, 3]
