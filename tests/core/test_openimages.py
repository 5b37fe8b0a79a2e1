"""Open Images' number against the example of its published evaluator, cases by hand, and hotcoco where it agrees.

The definition is that of storage.googleapis.com/openimages/web/evaluation.html; the example is of the tests of
`OpenImagesChallengeEvaluator` in TensorFlow's Object Detection API (object_detection_evaluation_test.py), whose groups
weigh 0.5 there. The challenge has 1, so the numbers of classes with groups are worked out anew.
"""

import warnings

import hotcoco
import numpy as np
import pytest
from ddetr.core.evaluation.columns import DETECTION_DTYPE
from ddetr.core.evaluation.openimages import OpenImagesTally
from ddetr.data.categories import Categories
from ddetr.data.truth import ANNOTATION_DTYPE, GroundTruth

CAT, DOG, ELEPHANT = 2**62, -4, 9
ANIMALS = Categories((CAT, DOG, ELEPHANT), ("cat", "dog", "elephant"))
Box = tuple[float, float, float, float]


def xywh(x0: float, y0: float, x1: float, y1: float) -> Box:
    return x0, y0, x1 - x0, y1 - y0


def image(id_: int, *objects: tuple[int, Box] | tuple[int, Box, bool], verified: tuple[int, ...] = ()) -> GroundTruth:
    """objects: (category, box, whether it is around a group) each."""
    annotations = [
        {"image_id": id_, "category_id": row[0], "bbox": list(row[1]), "iscrowd": int(row[2:] == (True,))}
        for row in objects
    ]
    return GroundTruth.of_coco(
        {"images": [{"id": id_, "neg_category_ids": list(verified)}], "annotations": annotations}
    )


def found(*rows: tuple[int, int, Box, float]) -> np.ndarray:
    """(image, category, box, score) each."""
    return np.array(list(rows), dtype=DETECTION_DTYPE)


def by_class(categories: Categories, truths: list[GroundTruth], detections: np.ndarray) -> dict[int, float]:
    tally = OpenImagesTally(categories)
    for truth in truths:
        tally.add(truth, detections[detections["image_id"] == truth.images[0]["id"]])
    precisions = tally.by_class()
    assert tally.scores() == {"AP": pytest.approx(np.mean(list(precisions.values())) if precisions else -1)}
    return precisions


def test_the_example_of_the_published_evaluator() -> None:
    truths = [
        image(
            1, (CAT, xywh(0, 0, 1, 1)), (ELEPHANT, xywh(0, 0, 2, 2)), (CAT, xywh(0, 0, 3, 3), True),
            verified=(CAT, DOG, ELEPHANT),
        ),
        image(
            2, (CAT, xywh(10, 10, 11, 11)), (CAT, xywh(500, 500, 510, 510)), (ELEPHANT, xywh(10, 10, 12, 12), True)
        ),
        image(3, (DOG, xywh(0, 0, 1, 1))),
    ]  # fmt: skip
    detections = found(
        (1, DOG, xywh(10, 10, 11, 11), 0.7),
        (1, DOG, xywh(100, 100, 120, 120), 0.8),
        (2, CAT, xywh(10, 10, 11, 11), 0.7),
        (2, CAT, xywh(100, 100, 120, 120), 0.8),
        (2, DOG, xywh(100, 100, 220, 220), 0.5),
        (2, ELEPHANT, xywh(10, 10, 11, 11), 0.9),
        (3, DOG, xywh(0, 0, 1, 1), 0.5),
    )
    assert by_class(ANIMALS, truths, detections) == {
        # Wrong, wrong, right of one object, as published; on image 2 nobody has looked for dogs.
        DOG: pytest.approx(1 / 3),
        # Wrong, right of 3 objects and a group: 1/2 at a recall of 1/4 (published: of 3.5).
        CAT: pytest.approx(1 / 8),
        # Right, of an object and a group (published: half an object of 1.5).
        ELEPHANT: pytest.approx(1 / 2),
    }


@pytest.mark.parametrize(
    ("inside", "outside", "expected"),
    [
        ((), (), 0.0),  # missing it costs as much as an object
        ((0.9,), (), 1.0),
        ((0.9, 0.8, 0.7), (), 1.0),  # further ones are neither right nor wrong
        ((0.9,), (0.8,), 1.0),  # wrong, after all was found
        ((0.8,), (0.9,), 0.5),
    ],
)
def test_a_group_is_one_object(inside: tuple[float, ...], outside: tuple[float, ...], expected: float) -> None:
    rows = [(1, CAT, (10.0 * n, 0.0, 5.0, 5.0), score) for n, score in enumerate(inside)]
    rows += [(1, CAT, (300.0, 0.0, 5.0, 5.0), score) for score in outside]
    precisions = by_class(ANIMALS, [image(1, (CAT, (0, 0, 100, 100), True))], found(*rows))
    assert precisions == {CAT: pytest.approx(expected)}


@pytest.mark.parametrize(("left", "expected"), [(95.0, 1.0), (95.1, 0.0)])
def test_inside_a_group_means_half_of_the_detection(left: float, expected: float) -> None:
    precisions = by_class(ANIMALS, [image(1, (CAT, (0, 0, 100, 100), True))], found((1, CAT, (left, 0, 10, 10), 0.9)))
    assert precisions == {CAT: expected}


def test_an_object_within_a_group_is_found_before_the_group() -> None:
    objects = [(CAT, (0.0, 0.0, 100.0, 100.0), True), (CAT, (10.0, 10.0, 20.0, 20.0), False)]
    one = found((1, CAT, (10, 10, 20, 20), 0.9))
    assert by_class(ANIMALS, [image(1, *objects)], one) == {CAT: pytest.approx(1 / 2)}
    two = found((1, CAT, (10, 10, 20, 20), 0.9), (1, CAT, (10, 10, 20, 20), 0.8))
    assert by_class(ANIMALS, [image(1, *objects)], two) == {CAT: pytest.approx(1.0)}


def test_a_detection_goes_to_the_box_that_it_overlaps_most() -> None:
    """Pascal's rule: COCO's would give the second detection the second box, with an overlap of 0.74."""
    truth = image(1, (CAT, (0, 0, 100, 100)), (CAT, (20, 0, 100, 100)))
    precisions = by_class(ANIMALS, [truth], found((1, CAT, (0, 0, 100, 100), 0.9), (1, CAT, (5, 0, 100, 100), 0.8)))
    assert precisions == {CAT: pytest.approx(1 / 2)}


def test_the_area_under_the_curve_is_whole() -> None:
    """Right, wrong, right of three: 1/3 at 1 and 1/3 at 2/3. COCO's 101 points would give 0.554."""
    boxes = [(40.0 * n, 0.0, 20.0, 20.0) for n in range(4)]
    truth = image(1, *((CAT, box) for box in boxes[:3]))
    rows = [(1, CAT, boxes[n], score) for n, score in ((0, 0.9), (3, 0.8), (1, 0.7))]
    assert by_class(ANIMALS, [truth], found(*rows)) == {CAT: pytest.approx(5 / 9)}


HELMET, FOOTBALL, BICYCLE, CLOTHING, FRUIT, VEGETABLE, TOMATO = range(7)
KINDS = Categories(
    tuple(range(7)),
    ("Helmet", "Football helmet", "Bicycle helmet", "Clothing", "Fruit", "Vegetable", "Tomato"),
    parents={HELMET: (CLOTHING,), FOOTBALL: (HELMET,), BICYCLE: (HELMET,), TOMATO: (FRUIT, VEGETABLE)},
)


def test_boxes_and_detections_count_for_all_classes_above_their_own() -> None:
    left, right = (0.0, 0.0, 50.0, 50.0), (60.0, 0.0, 50.0, 50.0)
    truth = image(1, (FOOTBALL, left), (BICYCLE, right), (TOMATO, left))
    # A football helmet found, a bicycle helmet taken for a football helmet; a fruit that is not said to be a tomato.
    rows = found((1, FOOTBALL, left, 0.9), (1, FOOTBALL, right, 0.8), (1, FRUIT, left, 0.7))
    assert by_class(KINDS, [truth], rows) == {
        FOOTBALL: 1.0,
        BICYCLE: 0.0,
        HELMET: 1.0,
        CLOTHING: 1.0,
        FRUIT: 1.0,
        VEGETABLE: 0.0,
        TOMATO: 0.0,
    }


def test_classes_that_are_not_verified_on_an_image_do_not_count() -> None:
    """The classes above those of the boxes are verified, those below are not."""
    box, other = (0.0, 0.0, 50.0, 50.0), (60.0, 0.0, 50.0, 50.0)
    truths = [image(1, (HELMET, box)), image(2, (BICYCLE, box)), image(3, (FRUIT, box))]
    wrong = found((1, FOOTBALL, other, 0.9), (2, BICYCLE, box, 0.8), (1, HELMET, box, 0.7), (3, BICYCLE, box, 0.9))
    # The football helmet of image 1 is a wrong helmet all the same: wrong, right, right of two.
    helmets = pytest.approx((2 / 3 + 2 / 3) / 2)
    assert by_class(KINDS, truths, wrong) == {HELMET: helmets, BICYCLE: 1.0, CLOTHING: helmets, FRUIT: 0.0}
    truths[2] = image(3, (FRUIT, box), verified=(BICYCLE, 77))
    assert by_class(KINDS, truths, wrong)[BICYCLE] == pytest.approx(1 / 2)


def test_a_set_without_objects_has_no_score() -> None:
    assert OpenImagesTally(ANIMALS).scores() == {"AP": -1.0}
    assert by_class(ANIMALS, [image(1, verified=(CAT,))], found((1, CAT, (0, 0, 5, 5), 0.9))) == {}


def a_set(seed: int) -> tuple[list[GroundTruth], np.ndarray]:
    """Objects and groups on a grid, so that no detection overlaps two of them by half; every class is verified."""
    random = np.random.default_rng(seed)
    truths, detections = [], [np.empty(0, dtype=DETECTION_DTYPE)]
    for id_ in range(int(random.integers(1, 6))):
        places = random.choice(36, int(random.integers(0, 20)), replace=False)
        rows = np.zeros(len(places), dtype=ANNOTATION_DTYPE)
        rows["id"], rows["image_id"], rows["iscrowd"] = places + 1, id_, random.random(len(places)) < 0.3
        rows["category_id"] = random.choice(ANIMALS.ids, len(places))
        rows["bbox"] = np.column_stack([places % 6 * 100, places // 6 * 100, *random.uniform(30, 90, (2, len(places)))])
        truths.append(GroundTruth([{"id": id_, "neg_category_ids": list(ANIMALS.ids)}], rows))
        if len(rows):
            near = random.integers(len(rows), size=int(random.integers(0, 60)))
            guesses = np.zeros(len(near), dtype=DETECTION_DTYPE)
            guesses["image_id"], guesses["score"] = id_, random.random(len(near))
            guesses["category_id"] = np.where(
                random.random(len(near)) < 0.8, rows["category_id"][near], random.choice(ANIMALS.ids, len(near))
            )
            guesses["bbox"] = rows["bbox"][near] + random.uniform(-15, 5, (len(near), 4))
            detections.append(guesses)
    return truths, np.concatenate(detections)


def of_hotcoco(truths: list[GroundTruth], detections: np.ndarray) -> float:
    """Its Open Images mode, which knows groups and the whole area, but neither verified classes nor Pascal's rule."""
    numbers = {id_: number for number, id_ in enumerate(ANIMALS.ids)}
    joined = GroundTruth.joined(truths)
    images = [{"id": image["id"]} for image in joined.images]
    annotations = [
        {"id": n, "image_id": int(row["image_id"]), "category_id": numbers[int(row["category_id"])]}
        | {"bbox": row["bbox"].tolist(), "area": 1.0, "is_group_of": bool(row["iscrowd"])}
        for n, row in enumerate(joined.annotations, start=1)
    ]
    listed = [{"id": number, "name": str(number)} for number in numbers.values()]
    coco = hotcoco.COCO({"images": images, "annotations": annotations, "categories": listed})
    classes = [numbers[id_] for id_ in detections["category_id"].tolist()]
    table = np.column_stack([detections["image_id"], detections["bbox"], detections["score"], classes])
    evaluation = hotcoco.COCOeval(coco, coco.load_res(table.astype(np.float64)), "bbox", oid_style=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        evaluation.run()
    return float(evaluation.stats[0])


def test_the_number_of_sets_without_neighbours_is_that_of_hotcoco_however_it_is_divided() -> None:
    different, random = set(), np.random.default_rng(1)
    for seed in range(200):
        truths, detections = a_set(seed)
        ours, theirs = OpenImagesTally(ANIMALS), OpenImagesTally(ANIMALS)
        for truth in truths:
            chosen = detections[detections["image_id"] == truth.images[0]["id"]]
            (ours if random.random() < 0.5 else theirs).add(truth, chosen)
        ours.merge([theirs.to_bytes()])
        expected = of_hotcoco(truths, detections)
        assert ours.scores()["AP"] == pytest.approx(expected, abs=1e-12), seed
        different.add(expected)
    assert len(different) > 150


def test_what_is_no_tally_is_refused() -> None:
    tally = OpenImagesTally(ANIMALS)
    for other, message in (
        (b"what another program sends", "not a tally"),
        (OpenImagesTally(KINDS).to_bytes(), "a tally of 7 classes, not of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            tally.merge([other])
