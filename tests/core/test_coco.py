"""COCO's numbers against cases worked out by hand, and against pycocotools."""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from ddetr.core.evaluation import columns
from ddetr.core.evaluation.coco import MEANINGS, CocoTally, Scorer, coco_metrics, coco_tally
from ddetr.core.evaluation.columns import DETECTION_DTYPE, to_coco
from ddetr.data.categories import Categories
from ddetr.data.truth import GroundTruth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def truth(*boxes: tuple[int, list[float]], category: int = 5) -> dict[str, Any]:
    """A COCO dictionary with one object per (image id, xywh)."""
    annotations = [
        {"id": number + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": 0}
        for number, (image, box) in enumerate(boxes)
    ]
    images = [{"id": image, "width": 640, "height": 480} for image in sorted({image for image, _ in boxes})]
    return {"images": images, "annotations": annotations, "categories": [{"id": category, "name": "thing"}]}


def found(image: int, box: list[float], score: float, category: int = 5) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_ground_truth_fed_back_is_perfect() -> None:
    boxes = [(1, [10.0, 20.0, 20.0, 20.0]), (1, [100.0, 50.0, 60.0, 50.0]), (2, [30.0, 30.0, 200.0, 150.0])]
    metrics = coco_metrics(truth(*boxes), [found(image, box, 0.9) for image, box in boxes])
    assert list(metrics) == list(MEANINGS)
    expected = dict.fromkeys(MEANINGS, 1.0) | {"AR1": 2 / 3}  # one detection of the first image's two objects
    assert metrics == pytest.approx(expected)


def test_one_box_of_known_overlap() -> None:
    # Shifted by 20 of 100 pixels: intersection 80, union 120, overlap 2/3: right at 0.50, 0.55, 0.60 and 0.65.
    metrics = coco_metrics(truth((1, [100.0, 100.0, 100.0, 100.0])), [found(1, [120.0, 100.0, 100.0, 100.0], 0.5)])
    assert metrics["AP"] == pytest.approx(0.4)
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP75"] == 0.0
    assert metrics["AP_large"] == pytest.approx(0.4)
    assert metrics["AP_small"] == metrics["AP_medium"] == metrics["AR_small"] == -1.0


def test_a_false_positive_ahead_halves_the_precision() -> None:
    box = [100.0, 100.0, 100.0, 100.0]
    metrics = coco_metrics(truth((1, box)), [found(1, [400.0, 300.0, 50.0, 50.0], 0.9), found(1, box, 0.8)])
    assert metrics["AP"] == pytest.approx(0.5)
    assert metrics["AR1"] == 0.0
    assert metrics["AR10"] == 1.0


def test_half_of_the_objects_found() -> None:
    first, second = [10.0, 10.0, 50.0, 50.0], [300.0, 200.0, 50.0, 50.0]
    metrics = coco_metrics(truth((1, first), (2, second)), [found(1, first, 0.9)])
    assert metrics["AP"] == pytest.approx(51 / 101)  # recall thresholds 0, 0.01 .. 0.5 of the 101
    assert metrics["AR100"] == 0.5


def test_no_detections_and_no_objects() -> None:
    assert coco_metrics(truth((1, [10.0, 10.0, 50.0, 50.0])), [])["AP"] == 0.0
    empty = {**truth((1, [10.0, 10.0, 50.0, 50.0])), "annotations": []}
    assert set(coco_metrics(empty, [found(1, [1.0, 1.0, 5.0, 5.0], 0.3)]).values()) == {-1.0}
    assert set(coco_metrics(empty, []).values()) == {-1.0}


def test_nothing_is_printed_or_changed(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, detections = truth((1, [10.0, 10.0, 50.0, 50.0])), [found(1, [10.0, 10.0, 50.0, 50.0], 0.9)]
    before = copy.deepcopy((ground_truth, detections))
    coco_metrics(ground_truth, detections)
    assert (ground_truth, detections) == before
    assert capsys.readouterr().out == ""


def of_pycocotools(ground_truth: dict, detections: list[dict], category_ids: list[int]) -> dict[str, float]:
    """The numbers as pycocotools' own example computes them, from a COCO dictionary with ordinary ids."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        scored = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        scored.params.catIds = category_ids
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return dict(zip(MEANINGS, scored.stats.tolist(), strict=True))


def drawn(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Five images (ids 1..5, the last one empty) with objects of three categories (1..3), crowds among them, and
    detections near some of them, far from others, of the wrong category, with equal scores."""
    random = np.random.default_rng(seed)
    annotations, detections = [], []
    for number in range(24):
        image, category = int(random.integers(1, 5)), int(random.integers(1, 4))
        x, y, *sides = (float(value) for value in random.uniform(4, 300, 4))
        area = sides[0] * sides[1] * float(random.uniform(0.3, 1))
        annotations.append({"id": number + 1, "image_id": image, "category_id": category, "bbox": [x, y, *sides]})
        annotations[-1] |= {"area": area, "iscrowd": int(number % 8 == 7)}
        for _ in range(int(random.integers(0, 4))):
            moved = [float(value) for value in np.array([x, y, *sides]) + random.normal(0, 12, 4)]
            guess = category if random.random() < 0.8 else int(random.integers(1, 4))
            detections.append(found(image, [*moved[:2], *map(abs, moved[2:])], round(float(random.random()), 1), guess))
    images = [{"id": image, "width": 640, "height": 640} for image in range(1, 6)]
    categories = [{"id": category, "name": f"class {category}"} for category in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def renamed(
    truth: dict[str, Any], detections: list[dict[str, Any]], image: Callable[[int], Any], category: Callable[[int], Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same set under other ids of images and categories."""

    def row(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "image_id": image(values["image_id"]), "category_id": category(values["category_id"])}

    images = [{**values, "id": image(values["id"])} for values in truth["images"]]
    categories = [{**values, "id": category(values["id"])} for values in truth["categories"]]
    annotations = [row(values) for values in truth["annotations"]]
    new = {"images": images, "annotations": annotations, "categories": categories}
    return new, [row(values) for values in detections]


ANNOTATION_IDS: dict[str, Callable[[int], Any]] = {
    "from 0": lambda n: n,
    "all 0": lambda n: 0,
    "all equal": lambda n: 7,
    "in pairs": lambda n: n // 2,
    "negative": lambda n: -n,
    "large": lambda n: 2**63 - 1 - n,
    "of numpy": np.int64,
    "texts": str,
    "missing": lambda n: None,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ids", ANNOTATION_IDS)
def test_the_ids_of_annotations_change_no_number(ids: str, seed: int) -> None:
    truth, detections = drawn(seed)
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    assert 0 < expected["AP"] < 1
    assert coco_metrics(truth, detections) == expected
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = ANNOTATION_IDS[ids](number)
        if annotation["id"] is None:
            del annotation["id"]
    assert coco_metrics(truth, detections) == expected


def test_an_object_with_id_0_that_is_found_is_found() -> None:
    ground_truth = truth((1, [100.0, 100.0, 50.0, 50.0]))
    ground_truth["annotations"][0]["id"] = 0
    assert coco_metrics(ground_truth, [found(1, [100.0, 100.0, 50.0, 50.0], 0.9)])["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("image", "category"),
    [
        (lambda i: i - 1, lambda c: c - 1),
        (lambda i: i, lambda c: c - 3),
        (np.int64, np.int32),
        (lambda i: 2**63 - 9 + i, lambda c: c - 2**63),
    ],
    ids=["from 0", "negative", "of numpy", "large"],
)
def test_the_ids_of_images_and_categories_change_no_number(
    image: Callable[[int], Any], category: Callable[[int], Any], seed: int
) -> None:
    truth, detections = drawn(seed)
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    assert coco_metrics(*renamed(truth, detections, image, category)) == expected


def test_fields_beside_those_of_boxes_change_no_number() -> None:
    truth, detections = drawn(0)
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    for number, annotation in enumerate(truth["annotations"]):
        annotation |= {"ignore": number % 2, "_ignore": 1, "segmentation": [], "score": 0.0}
    noise = {"ignore": 1, "id": 0, "area": -1.0, "iscrowd": 1, "segmentation": [], "caption": "none"}
    assert coco_metrics(truth, [{**detection, **noise} for detection in detections]) == expected


def test_a_missing_area_or_crowd_flag_is_what_packing_makes_of_it() -> None:
    truth, detections = drawn(1)
    for annotation in truth["annotations"]:
        annotation |= {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    for annotation in truth["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert coco_metrics(truth, detections) == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("listed", [[1, 2], [3]])
def test_detections_of_categories_that_the_set_does_not_list_do_not_count(listed: list[int], seed: int) -> None:
    whole, detections = drawn(seed)
    expected = of_pycocotools(whole, detections, listed)
    annotations = [row for row in whole["annotations"] if row["category_id"] in listed]
    categories = [row for row in whole["categories"] if row["id"] in listed]
    assert coco_metrics({**whole, "annotations": annotations, "categories": categories}, detections) == expected
    assert expected != of_pycocotools(whole, detections, [1, 2, 3])


ARRAYS = ("precision", "recall", "scores")
CATEGORIES = Categories((-3, 7, 2**62), ("minus", "lone \ud83d", "large\0"))  # names as untrusted files have them


def a_set(seed: int) -> list[tuple[GroundTruth, np.ndarray]]:
    """Images one by one, with what pycocotools' arrays may depend on: crowds, equal scores and boxes, sizes on both
    sides of the limits, areas that are not the box's, images without objects or detections, and many detections."""
    random = np.random.default_rng(seed)
    scale, on_grid = float(random.choice([6, 40, 250])), bool(random.random() < 0.5)
    ids = np.sort(random.choice(2**62, int(random.integers(1, 8)), replace=False))

    def boxes(count: int) -> np.ndarray:
        drawn = random.uniform(0, scale, (count, 4)) + np.array([0, 0, 0.1, 0.1])
        return (np.round(drawn) + np.array([0, 0, 1, 1]) if on_grid else drawn).astype(np.float32)

    images = []
    for image_id in ids.tolist():
        of_image = GroundTruth.of_coco({"images": [{"id": image_id}], "annotations": []})
        rows = np.zeros(int(random.choice([0, 1, 8, 20])), dtype=of_image.annotations.dtype)
        rows["id"], rows["image_id"], rows["bbox"] = np.arange(len(rows)), image_id, boxes(len(rows))
        rows["category_id"] = random.choice(CATEGORIES.ids, len(rows))
        rows["area"] = rows["bbox"][:, 2] * rows["bbox"][:, 3] * np.where(random.random(len(rows)) < 0.7, 1, 1.7)
        rows["iscrowd"] = random.random(len(rows)) < 0.15
        found = np.zeros(int(random.choice([0, 2, 30, 250])), dtype=DETECTION_DTYPE)
        found["image_id"], found["bbox"] = image_id, boxes(len(found))
        found["category_id"] = random.choice(CATEGORIES.ids, len(found))
        found["score"] = random.choice([0.1, 0.5, 0.9], len(found)) if on_grid else random.random(len(found))
        if len(rows):
            right = random.random(len(found)) < 0.5
            chosen = random.integers(len(rows), size=len(found))[right]
            found["bbox"][right], found["category_id"][right] = rows["bbox"][chosen], rows["category_id"][chosen]
        images.append((GroundTruth(of_image.images, rows), found))
    return images


def judged(images: list[tuple[GroundTruth, np.ndarray]]) -> COCOeval:
    """What pycocotools makes of a set, under ids that it takes as they are: numbers from 1."""
    joined = GroundTruth.joined([truth for truth, _ in images]).to_coco(CATEGORIES)
    rows = to_coco(np.concatenate([found for _, found in images]))
    numbers = {image["id"]: number for number, image in enumerate(joined["images"], start=1)}
    truth, results = COCO(), COCO()
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, items in ((truth, joined["annotations"]), (results, rows)):
            annotations = [{"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, **row} for row in items]
            for number, row in enumerate(annotations, start=1):
                row |= {"id": number, "image_id": numbers[row["image_id"]]}
            coco.dataset = {
                "images": [{"id": number} for number in numbers.values()],
                "annotations": annotations,
                "categories": joined["categories"],
            }
            coco.createIndex()
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def counted(images: list[tuple[GroundTruth, np.ndarray]], processes: int, random: np.random.Generator) -> CocoTally:
    """The tally of processes that evaluate the images in any order, and in parts of any size."""
    ids = np.array([image["id"] for truth, _ in images for image in truth.images])
    tallies = [CocoTally(ids, CATEGORIES) for _ in range(processes)]
    order = random.permutation(len(images))
    for part in np.split(order, np.sort(random.integers(0, len(images) + 1, 3))):
        truth = GroundTruth.joined([images[i][0] for i in part])
        found = np.concatenate([np.empty(0, DETECTION_DTYPE), *(images[i][1] for i in part)])
        tallies[int(random.integers(processes))].add(truth, found)
    first, *others = tallies
    first.merge([tally.to_bytes() for tally in others])
    return first


def assert_equal_arrays(seeds: range) -> None:
    for seed in seeds:
        images, random = a_set(seed), np.random.default_rng(seed)
        expected = judged(images)
        for processes in (1, 3):
            tally = counted(images, processes, random)
            found = tally.evaluation().eval
            assert found is not None
            for name in ARRAYS:
                assert np.array_equal(found[name], expected.eval[name]), (seed, processes, name)
            assert list(tally.scores().values()) == expected.stats.tolist(), (seed, processes)


def test_the_arrays_of_any_set_are_those_of_pycocotools_however_it_is_divided() -> None:
    assert_equal_arrays(range(100))


@pytest.mark.slow
def test_the_arrays_of_a_thousand_sets_are_those_of_pycocotools() -> None:
    assert_equal_arrays(range(100, 1100))


@pytest.mark.parametrize("scorer", ["hotcoco", "pycocotools"])
def test_processes_without_images_add_nothing(scorer: Scorer) -> None:
    images = a_set(4)
    ids = np.array([image["id"] for truth, _ in images for image in truth.images])
    tallies = [coco_tally(ids, CATEGORIES, scorer) for _ in range(3)]
    for truth, found in images:
        tallies[1].add(truth, found)
    tallies[0].merge([tally.to_bytes() for tally in tallies[1:]])
    scores = tallies[0].scores()
    assert list(scores.values()) == judged(images).stats.tolist()
    assert 0 < scores["AP"] < 1


@pytest.mark.parametrize("scorer", ["hotcoco", "pycocotools"])
def test_what_is_no_tally_is_refused(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match=r"not a (tally|StreamingEval state)"):
        coco_tally(np.array([1]), CATEGORIES, scorer).merge([b"what another program sends"])


def test_detections_are_written_as_one_json(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.concatenate([found for _, found in a_set(8)])
    assert len(rows) > 100
    for at_once in (1, 7, len(rows), 10**6):
        monkeypatch.setattr(columns, "_ROWS_AT_ONCE", at_once)
        assert b"".join(columns.as_text(rows)) == json.dumps(to_coco(rows)).encode()
    assert json.loads(b"".join(columns.as_text(rows[:0]))) == []


@pytest.mark.parametrize("scorer", ["hotcoco", "pycocotools"])
def test_detections_that_are_not_finite_do_not_count(scorer: Scorer) -> None:
    ground_truth, detections = drawn(2)
    expected = coco_metrics(ground_truth, detections, scorer)
    box = ground_truth["annotations"][0]["bbox"]
    bad = [found(1, box, value, 1) for value in (np.nan, np.inf)]
    bad += [found(1, [box[0], value, *box[2:]], 0.95, 1) for value in (np.nan, -np.inf)]
    assert coco_metrics(ground_truth, bad + detections, scorer) == expected
