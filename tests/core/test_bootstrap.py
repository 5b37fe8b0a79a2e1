"""Differences between detectors, against pycocotools on sets of images that were really drawn again and again."""

import threading

import numpy as np
import pytest
from ddetr.core.evaluation import bootstrap
from ddetr.core.evaluation.bootstrap import compare
from ddetr.core.evaluation.matching import matches
from ddetr.data.truth import GroundTruth

from tests.core.detection_sets import CATEGORIES, by_pycocotools, drawn, objects


def moved(detections: np.ndarray, pixels: float) -> np.ndarray:
    """The same detections with worse boxes."""
    worse = detections.copy()
    worse["bbox"][:, :2] += np.random.default_rng(1).uniform(-pixels, pixels, (len(worse), 2)).astype(np.float32)
    return worse


def repeated(truth: GroundTruth, detections: np.ndarray, images: np.ndarray) -> tuple[GroundTruth, np.ndarray]:
    """A set in which each draw of an image is an image of its own."""
    listed, annotations, found = [], [], []
    for number, image in enumerate(images.tolist(), start=1):
        listed.append({**truth.images[0], "id": number})
        for rows, parts in ((truth.annotations, annotations), (detections, found)):
            part = rows[rows["image_id"] == image].copy()
            part["image_id"] = number
            parts.append(part)
    return GroundTruth(listed, np.concatenate(annotations)), np.concatenate(found)


def scores(truth: GroundTruth, detections: np.ndarray) -> np.ndarray:
    """AP, AP50, AP75, then AP of the classes in the order of their ids; NaN without objects."""
    precision = by_pycocotools(truth, detections).eval["precision"][:, :, :, 0, 2]
    averages = np.where(precision < 0, np.nan, precision).mean(axis=1)  # (T, K)
    return np.array([np.nanmean(averages), np.nanmean(averages[0]), np.nanmean(averages[5]), *averages.mean(axis=0)])


def test_intervals_are_those_of_really_repeated_images() -> None:
    truth, first = drawn(2, images=14, crowds=0.1, equal_scores=False)
    second = moved(first, 6)
    ours = compare(matches(truth, first, CATEGORIES), matches(truth, second, CATEGORIES), resamples=40, seed=7)
    draws = []
    for sample in range(40):
        images = np.random.default_rng((7, sample)).integers(0, 14, 14) + 1
        draws.append(scores(*repeated(truth, second, images)) - scores(*repeated(truth, first, images)))
    low, high = np.nanquantile(draws, (0.025, 0.975), axis=0)
    ids = sorted(CATEGORIES.ids)
    found = [*ours.scores.values(), *(ours.classes[id_] for id_ in ids)]
    assert [row.low for row in found] == pytest.approx(low.tolist(), abs=1e-9)
    assert [row.high for row in found] == pytest.approx(high.tolist(), abs=1e-9)
    assert [row.first for row in found] == pytest.approx(scores(truth, first).tolist(), abs=1e-9)
    assert [row.second for row in found] == pytest.approx(scores(truth, second).tolist(), abs=1e-9)
    differences = [row.difference for row in ours.classes.values()]
    assert differences == sorted(differences)


def test_equal_detectors_differ_by_noise_and_a_far_worse_one_does_not() -> None:
    truth, detections = drawn(4, images=60)
    good, worse = (matches(truth, rows, CATEGORIES) for rows in (detections, moved(detections, 12)))
    same = compare(good, good, resamples=50)
    assert {(row.low, row.high, row.is_noise) for row in same.scores.values()} == {(0.0, 0.0, True)}
    ap = compare(good, worse, resamples=50).scores["AP"]
    assert ap.high < 0
    assert not ap.is_noise
    back = compare(worse, good, resamples=50).scores["AP"]
    assert (back.low, back.high) == pytest.approx((-ap.high, -ap.low))


def test_the_interval_depends_on_the_seed_alone() -> None:
    truth, detections = drawn(3)
    pair = matches(truth, detections, CATEGORIES), matches(truth, moved(detections, 5), CATEGORIES)
    assert compare(*pair, resamples=30, seed=1) == compare(*pair, resamples=30, seed=1)
    assert compare(*pair, resamples=30, seed=1) != compare(*pair, resamples=30, seed=2)


def test_different_images_are_refused() -> None:
    truth, detections = drawn(3)
    other = matches(objects((1, 7, 0, 0, 9, 9), images=2), detections[:0], CATEGORIES)
    with pytest.raises(ValueError, match="different images: 23 of them, such as 3, by one alone"):
        compare(matches(truth, detections, CATEGORIES), other)


def test_a_machine_of_many_cores_does_not_hold_a_draw_on_each(monkeypatch: pytest.MonkeyPatch) -> None:
    truth, detections = drawn(4, images=10)
    found = matches(truth, detections, CATEGORIES)
    monkeypatch.setattr(bootstrap, "available_cores", lambda: 200)
    before, seen = threading.active_count(), []
    compare(found, found, resamples=40, advance=lambda: seen.append(threading.active_count()))
    assert 2 <= max(seen) - before <= 16
