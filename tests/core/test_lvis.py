"""LVIS' numbers against cases worked out by hand, and against lvis-api, whose evaluation is the published one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ddetr.core.evaluation.columns import DETECTION_DTYPE, to_coco
from ddetr.core.evaluation.failures import failures
from ddetr.core.evaluation.lvis import MEANINGS, LvisTally
from ddetr.core.evaluation.matching import matches
from ddetr.core.evaluation.precision import Ranking
from ddetr.data.categories import Categories
from ddetr.data.protocols import IMAGE_LISTS
from ddetr.data.truth import ANNOTATION_DTYPE, GroundTruth

IDS = (-3, 5, 7, 12, 2**40, 2**62)
CATEGORIES = Categories(IDS, tuple(map(str, IDS)), dict(zip(IDS, "rcffrc", strict=True)))
BOX = (10.0, 20.0, 30.0, 40.0)


def image(id_: int, boxes: Sequence[int], neg: Sequence[int] = (), not_exhaustive: Sequence[int] = ()) -> GroundTruth:
    """One with an object of each of these categories at BOX, and these lists."""
    annotations = [{"image_id": id_, "category_id": category, "bbox": list(BOX)} for category in boxes]
    entry = {"id": id_, **dict(zip(IMAGE_LISTS, (list(neg), list(not_exhaustive)), strict=True))}
    return GroundTruth.of_coco({"images": [entry], "annotations": annotations})


def found(*rows: tuple[int, int, tuple[float, ...], float]) -> np.ndarray:
    """(image, category, box, score) each."""
    return np.array(list(rows), dtype=DETECTION_DTYPE)


def tallied(truths: list[GroundTruth], detections: np.ndarray) -> LvisTally:
    tally = LvisTally(np.array([image["id"] for truth in truths for image in truth.images]), CATEGORIES)
    for truth in truths:
        tally.add(truth, detections[detections["image_id"] == truth.images[0]["id"]])
    return tally


@pytest.mark.parametrize(
    ("lists", "expected"),
    [
        ({}, 1.0),  # nobody looked for category 5 on the second image
        ({"neg": [5]}, 0.5),  # somebody did, and there is none: the better detection is a false positive
        ({"neg": [7]}, 1.0),  # of another category
        ({"neg": [5], "not_exhaustive": [5]}, 1.0),  # there may be more of it
        ({"neg": [2**61]}, 1.0),  # no category of the set
    ],
)
def test_detections_count_where_the_image_was_labelled_for_their_category(
    lists: dict[str, list[int]], expected: float
) -> None:
    detections = found((1, 5, BOX, 0.5), (2, 5, BOX, 0.9))
    scores = tallied([image(1, [5]), image(2, [7], **lists)], detections).scores()
    # Categories 5 ("c") and 7 ("f") have objects; 7 is not found.
    assert scores["AP_common"] == pytest.approx(expected)
    assert scores["AP"] == pytest.approx(expected / 2)
    assert (scores["AP_frequent"], scores["AP_rare"], scores["AR300"]) == (0.0, -1.0, 0.5)


def test_images_without_lists_or_frequencies_count_their_own_categories_alone() -> None:
    truth = GroundTruth.of_coco(
        {"images": [{"id": 4}], "annotations": [{"image_id": 4, "category_id": 1, "bbox": BOX}]}
    )
    tally = LvisTally(np.array([4]), Categories((1, 2), ("one", "two")))
    tally.add(truth, found((4, 1, BOX, 0.5), (4, 2, BOX, 0.9)))
    scores = tally.scores()
    assert list(scores) == list(MEANINGS)
    assert scores["AP"] == pytest.approx(1.0)
    assert scores["AP_rare"] == scores["AP_common"] == scores["AP_frequent"] == -1.0


def a_set(seed: int) -> list[tuple[GroundTruth, np.ndarray]]:
    """Images one by one: sizes on both sides of the limits, equal scores, up to 250 detections, federated lists."""
    random = np.random.default_rng(seed)
    scale, on_grid = float(random.choice([6, 40, 250])), bool(random.random() < 0.5)

    def boxes(count: int) -> np.ndarray:
        drawn = random.uniform(0, scale, (count, 4)) + np.array([0, 0, 0.1, 0.1])
        return (np.round(drawn) + np.array([0, 0, 1, 1]) if on_grid else drawn).astype(np.float32)

    images = []
    for id_ in np.sort(random.choice(2**50, int(random.integers(1, 8)), replace=False)).tolist():
        lists = [random.choice(IDS, int(random.integers(0, 4)), replace=False).tolist() for _ in IMAGE_LISTS]
        rows = np.zeros(
            int(random.choice([0, 1, 8, 20])),
            dtype=ANNOTATION_DTYPE,
        )
        rows["id"], rows["image_id"], rows["bbox"] = np.arange(len(rows)), id_, boxes(len(rows))
        rows["category_id"] = random.choice(IDS[: int(random.integers(1, 7))], len(rows))
        rows["area"] = rows["bbox"][:, 2] * rows["bbox"][:, 3] * np.where(random.random(len(rows)) < 0.7, 1, 0.4)
        guesses = np.zeros(int(random.choice([0, 2, 30, 250])), dtype=DETECTION_DTYPE)
        guesses["image_id"], guesses["bbox"] = id_, boxes(len(guesses))
        guesses["category_id"] = random.choice(IDS, len(guesses))
        guesses["score"] = random.choice([0.1, 0.5, 0.9], len(guesses)) if on_grid else random.random(len(guesses))
        if len(rows):
            right = random.random(len(guesses)) < 0.5
            chosen = random.integers(len(rows), size=len(guesses))[right]
            guesses["bbox"][right], guesses["category_id"][right] = rows["bbox"][chosen], rows["category_id"][chosen]
        images.append((GroundTruth([{"id": id_, **dict(zip(IMAGE_LISTS, lists, strict=True))}], rows), guesses))
    return images


def judged(lvis: Any, images: list[tuple[GroundTruth, np.ndarray]], place: Path) -> Any:
    """What lvis-api makes of a set; None without a detection, which it does not take."""
    rows = to_coco(np.concatenate([guesses for _, guesses in images]))
    if not rows:
        return None
    truth = GroundTruth.joined([truth for truth, _ in images]).to_coco(CATEGORIES)
    place.write_text(json.dumps(truth))
    evaluation = lvis.LVISEval(lvis.LVIS(str(place)), rows, "bbox")
    evaluation.run()
    return evaluation


def assert_equal_arrays(lvis: Any, seeds: range, folder: Path) -> None:
    compared = 0
    for seed in seeds:
        images, random = a_set(seed), np.random.default_rng(seed)
        expected = judged(lvis, images, folder / "truth.json")
        if expected is None:
            continue
        ids = np.array([image["id"] for truth, _ in images for image in truth.images])
        first, *others = tallies = [LvisTally(ids, CATEGORIES) for _ in range(3)]
        for number in random.permutation(len(images)):
            tallies[int(random.integers(3))].add(*images[number])
        first.merge([tally.to_bytes() for tally in others])
        arrays = first.evaluation().eval
        assert arrays is not None
        assert np.array_equal(arrays["precision"][..., 0], expected.eval["precision"]), seed
        assert np.array_equal(arrays["recall"][..., 0], expected.eval["recall"]), seed
        assert list(first.scores().values()) == list(expected.get_results().values()), seed
        compared += 1
    assert compared > 0.8 * len(seeds)


def test_the_arrays_of_any_set_are_those_of_lvis_api(lvis_api: Any, tmp_path: Path) -> None:
    assert_equal_arrays(lvis_api, range(60), tmp_path)


@pytest.mark.slow
def test_the_arrays_of_many_sets_are_those_of_lvis_api(lvis_api: Any, tmp_path: Path) -> None:
    assert_equal_arrays(lvis_api, range(60, 1060), tmp_path)


def test_errors_are_analysed_on_the_same_matches() -> None:
    """AP of each class by the analysis, which a class table shows, is that of the protocol."""
    compared = 0
    for seed in range(60):
        images = a_set(seed)
        truth = GroundTruth.joined([part for part, _ in images])
        detections = np.concatenate([rows for _, rows in images])
        tally = tallied([part for part, _ in images], detections)
        arrays = tally.evaluation().eval
        assert arrays is not None
        precision = arrays["precision"]  # (T, R, K, areas, 1)
        expected = np.where(precision < 0, np.nan, precision)[:, :, :, 0].reshape(10, 101, -1).mean(axis=1)
        found = matches(truth, detections, CATEGORIES, "lvis")
        for threshold, (true, ignored) in enumerate(zip(found.true, found.ignored, strict=True)):
            ranking = Ranking(found.label, true, ignored, len(CATEGORIES))
            average = ranking.steps(found.num_objects).average(found.num_objects)
            assert average == pytest.approx(expected[threshold], abs=1e-9, nan_ok=True), (seed, threshold)
            compared += int(np.isfinite(average).sum())
    assert compared > 500


def test_classes_are_grouped_by_the_frequency_that_the_set_states() -> None:
    truth = [image(1, [5, 7]), image(2, [12])]
    for part in truth:
        part.images[0]["file_name"] = "a.jpg"
    detections = found((1, 5, BOX, 0.5), (1, 2**62, BOX, 0.9))  # nobody looked for the other one there
    failing = failures(GroundTruth.joined(truth), detections, CATEGORIES, protocol="lvis")
    assert failing is not None
    assert [(group.name, group.classes, group.ap) for group in failing.analysis.by_frequency] == [
        ("common", 1, 1.0),
        ("frequent", 2, 0.0),
    ]
    assert failing.analysis.detections == 1
