"""Where a detector fails: each kind of error and each column by hand, then against the libraries that define them."""

import json
from pathlib import Path

import hotcoco
import numpy as np
import pytest
from ddetr.core.evaluation import analysis as analyses
from ddetr.core.evaluation.analysis import Analysis
from ddetr.core.evaluation.errors import errors_of
from ddetr.core.evaluation.failures import Failures, failures
from ddetr.core.evaluation.matching import matches
from ddetr.data.categories import Categories
from ddetr.data.truth import GroundTruth
from ddetr.data.values import MOST_ID

from tests.core.detection_sets import CATEGORIES, by_pycocotools, detected, drawn, objects

CAT, DOG, COW = CATEGORIES.ids
OBJECT = (10, 10, 40, 40)
CLOSE = (10, 10, 40, 36)  # IoU 0.9 with it
FAR = (10, 10, 40, 10)  # IoU 0.25


def of(truth: GroundTruth, detections: np.ndarray, categories: Categories = CATEGORIES) -> Failures:
    found = failures(truth, detections, categories)
    assert found is not None
    return found


def counts(truth: GroundTruth, detections: np.ndarray) -> dict[str, int]:
    return {name: count for name, count in errors_of(matches(truth, detections, CATEGORIES)).counts.items() if count}


@pytest.mark.parametrize(
    ("rows", "kinds"),
    [
        ([(1, CAT, 0.9, *CLOSE)], {}),
        ([(1, DOG, 0.9, *CLOSE)], {"classification": 1}),
        ([(1, CAT, 0.9, *FAR)], {"localisation": 1}),
        ([(1, DOG, 0.9, *FAR)], {"both": 1, "missed": 1}),
        ([(1, CAT, 0.9, *CLOSE), (1, CAT, 0.8, *OBJECT)], {"duplicate": 1}),
        ([(1, CAT, 0.9, 60, 60, 20, 20)], {"background": 1, "missed": 1}),
        ([], {"missed": 1}),
        # The limits of TIDE: an IoU of 0.5 is localisation, of 0.1 with another class background.
        ([(1, CAT, 0.9, *OBJECT), (1, CAT, 0.8, 10, 10, 40, 20)], {"localisation": 1}),
        ([(1, DOG, 0.9, 10, 10, 40, 4)], {"background": 1, "missed": 1}),
    ],
)
def test_each_kind_of_error(rows: list[tuple[float, ...]], kinds: dict[str, int]) -> None:
    assert counts(objects((1, CAT, *OBJECT)), detected(*rows)) == kinds


def test_a_detection_in_a_crowd_of_its_class_is_no_error() -> None:
    truth = objects((1, CAT, *OBJECT), (1, CAT, 60, 60, 40, 40, 1))
    inside = (65, 65, 10, 10)
    assert counts(truth, detected((1, CAT, 0.9, *CLOSE), (1, CAT, 0.8, *inside))) == {}
    assert counts(truth, detected((1, CAT, 0.9, *CLOSE), (1, DOG, 0.8, *inside))) == {"background": 1}


def test_what_mending_brings_by_hand() -> None:
    """Cats: two objects, one found after a false one: precision 1/2 up to recall 1/2, so AP50 51 / 101 * 1/2.

    Without the false one it is 51 / 101; without the missed one the found one is all: 1/2.
    """
    truth = objects((1, CAT, *OBJECT), (2, CAT, *OBJECT), images=2)
    found = detected((1, CAT, 0.9, 70, 70, 10, 10), (1, CAT, 0.8, *CLOSE))
    value = of(truth, found).analysis
    assert value.ap50 == pytest.approx(51 / 202, abs=1e-6)
    gains = {kind.name: kind.gain for kind in value.errors}
    assert gains.pop("background") == pytest.approx(51 / 202, abs=1e-6)
    assert gains.pop("missed") == pytest.approx(1 / 2 - 51 / 202, abs=1e-6)
    assert set(gains.values()) == {0}


# tidecv 1.0.1 (Bolya et al., ECCV 2020, the authors' own), TIDERun(..., 0.5, 0.1, "bbox", 100) on the same sets: errors
# and what mending them adds to AP50, in its order.
KINDS = ("classification", "localisation", "both", "duplicate", "background", "missed")
BY_TIDECV = {
    0: ((21, 31, 17, 22, 33, 13), (0.091767, 0.209234, 0.00223, 0.030362, 0.003556, 0.082444)),
    1: ((10, 43, 22, 22, 31, 16), (0.037643, 0.2348, 0.008339, 0.033575, 0.004128, 0.095493)),
    3: ((11, 43, 26, 14, 30, 16), (0.09672, 0.237269, 0.008983, 0.01581, 0.012401, 0.073593)),
    7: ((9, 50, 19, 27, 44, 11), (0.074174, 0.241693, 0.008031, 0.019075, 0.010395, 0.054176)),
}


@pytest.mark.parametrize("seed", BY_TIDECV)
def test_errors_and_their_cost_are_those_of_tidecv(seed: int) -> None:
    found = errors_of(matches(*drawn(seed, equal_scores=False), CATEGORIES))
    numbers, gains = BY_TIDECV[seed]
    assert tuple(found.counts[name] for name in KINDS) == numbers
    assert [found.gains[name] for name in KINDS] == pytest.approx(gains, abs=1e-6)


def test_the_row_of_a_class_by_hand() -> None:
    """Four cats, detections 0.9 right, 0.8 wrong, 0.7 right, 0.6 wrong: F1 is 2/5, 2/6, 4/7, 4/8."""
    truth = objects(*[(image, CAT, *OBJECT) for image in (1, 2, 3, 4)], (1, DOG, *OBJECT, 1), images=4)
    away = (70, 70, 10, 10)
    found = detected(
        (1, CAT, 0.9, *OBJECT), (1, CAT, 0.8, *away), (2, CAT, 0.7, *OBJECT), (2, CAT, 0.6, *away), (3, COW, 0.9, *away)
    )
    value = of(truth, found).analysis
    (row,) = value.classes  # neither the crowd of dogs nor the cow without objects
    assert (row.id, row.name, row.objects, value.num_classes, value.objects) == (CAT, "cat", 4, 1, 4)
    assert row.threshold == pytest.approx(0.7)
    assert row.f1 == pytest.approx(4 / 7, abs=1e-6)
    assert row.recall == 0.5
    # Precision 1 up to recall 1/4 (26 of 101 recalls), 2/3 up to 1/2 (25 more).
    assert row.ap == row.ap50 == pytest.approx((26 + 25 * 2 / 3) / 101, abs=1e-6)
    assert row.curve == [1.0] * 6 + [round(2 / 3, 3)] * 5 + [0.0] * 10


def test_one_threshold_does_not_separate_equal_scores() -> None:
    truth = objects((1, CAT, *OBJECT))
    found = detected((1, CAT, 0.5, *OBJECT), (1, CAT, 0.5, 70, 70, 10, 10), (1, CAT, 0.5, 70, 20, 10, 10))
    (row,) = of(truth, found).analysis.classes
    assert row.f1 == 0.5


@pytest.mark.parametrize("crowds", [0.0, 0.25])
def test_classes_and_curves_are_those_of_pycocotools(crowds: float) -> None:
    truth, detections = drawn(5, crowds=crowds)
    value, precision = of(truth, detections).analysis, by_pycocotools(truth, detections).eval["precision"][..., 0, 2]
    for row in value.classes:
        place = sorted(CATEGORIES.ids).index(row.id)
        assert row.ap == pytest.approx(precision[:, :, place].mean(), abs=1e-6)
        assert row.ap50 == pytest.approx(precision[0, :, place].mean(), abs=1e-6)
    assert [row.ap for row in value.classes] == sorted(row.ap for row in value.classes)
    for iou, place in (("0.50", 0), ("0.75", 5)):
        assert value.curves[iou] == pytest.approx(precision[place].mean(axis=1), abs=1e-4)


def test_calibration_by_hand() -> None:
    """0.05 is wrong, 0.95 right, 0.85 one right and one wrong: (0.05 + 0.05 + 2 * 0.35) / 4."""
    truth = objects((1, CAT, *OBJECT), (2, CAT, *OBJECT), images=2)
    away = (70, 70, 10, 10)
    found = detected((1, CAT, 0.95, *OBJECT), (2, CAT, 0.85, *OBJECT), (1, CAT, 0.85, *away), (2, CAT, 0.05, *away))
    value = of(truth, found).analysis
    assert value.calibration_error == pytest.approx((0.05 + 0.05 + 2 * 0.35) / 4, abs=1e-6)
    assert [part.count for part in value.bins] == [1, 0, 0, 0, 0, 0, 0, 0, 2, 1]
    assert (value.bins[8].score, value.bins[8].right) == (pytest.approx(0.85, abs=1e-6), 0.5)


def evaluated(truth: GroundTruth, detections: np.ndarray) -> hotcoco.COCOeval:
    coco = hotcoco.COCO(truth.to_coco(CATEGORIES))
    table = [detections["image_id"], detections["bbox"], detections["score"], detections["category_id"]]
    evaluation = hotcoco.COCOeval(coco, coco.load_res(np.column_stack(table).astype(np.float64)), "bbox")
    evaluation.evaluate()
    return evaluation


@pytest.mark.parametrize("seed", range(3))
def test_calibration_and_confusions_are_those_of_hotcoco(seed: int) -> None:
    truth, detections = drawn(seed, crowds=0.1, equal_scores=False)
    found = of(truth, detections)
    value, theirs = found.analysis, evaluated(truth, detections).calibration()
    assert value.calibration_error == pytest.approx(theirs["ece"], abs=1e-6)
    assert [part.count for part in value.bins] == [part["count"] for part in theirs["bins"]]
    thresholds = {row.id: row.threshold or np.inf for row in value.classes}
    sure = [row["score"] >= np.float32(thresholds.get(int(row["category_id"]), np.inf)) - 1e-6 for row in detections]
    matrix = evaluated(truth, detections[sure]).confusion_matrix()["matrix"].astype(int)
    names = [CATEGORIES.names[CATEGORIES.label(id_)] for id_ in sorted(CATEGORIES.ids)]
    wanted = {(names[i], names[j]): matrix[i, j] for i in range(3) for j in range(3) if i != j and matrix[i, j]}
    assert {(pair.truth, pair.found): pair.count for pair in value.confusions} == wanted
    assert wanted
    (missed,) = (kind.confident for kind in value.errors if kind.name == "missed")
    assert missed == matrix[:-1, -1].sum()


def test_the_worst_images_by_hand() -> None:
    truth = objects((1, CAT, *OBJECT), (2, CAT, *OBJECT), (3, CAT, *OBJECT), (3, CAT, 60, 60, 30, 30), images=4)
    found = detected(
        (1, CAT, 0.9, *OBJECT), (2, CAT, 0.9, *OBJECT), (2, CAT, 0.8, 70, 70, 9, 9), (3, CAT, 0.8, *OBJECT)
    )
    failing = of(truth, found)
    assert [(row.id, row.right, row.wrong, row.missed) for row in failing.analysis.worst] == [
        (3, 1, 0, 1),
        (2, 1, 1, 0),
    ]
    seen = failing.seen_in(3)
    assert seen.is_found.tolist() == [True, False]
    assert seen.is_right.tolist() == [True]
    assert failing.seen_in(2).detections["score"].tolist() == pytest.approx([0.8, 0.9])
    assert failing.seen_in(2).is_right.tolist() == [False, True]


def test_groups_by_size_and_by_number_of_objects() -> None:
    few = [(1, CAT, 10, 10, 40, 40)]
    many = [(image, DOG, 10, 10, 40, 40) for image in range(1, 13)]
    found = detected(*[(image, category, 0.9, *box) for image, category, *box in many])
    value = failures(objects(*few, *many, images=12), found, CATEGORIES, scores={"AP_small": 0.25, "AP_large": -1.0})
    assert value is not None
    assert [(group.name, group.ap) for group in value.analysis.by_size] == [("small", 0.25)]
    groups = [(group.name, group.classes, group.ap) for group in value.analysis.by_frequency]
    assert groups == [("1 to 10 objects", 1, 0.0), ("11 to 100 objects", 1, 1.0)]


def test_a_set_without_objects_has_no_analysis_and_one_without_detections_has() -> None:
    assert failures(objects((1, CAT, *OBJECT, 1)), detected((1, CAT, 0.9, *OBJECT)), CATEGORIES) is None
    value = of(objects((1, CAT, *OBJECT)), detected()).analysis
    (row,) = value.classes
    assert (row.ap, row.recall, row.threshold, row.f1) == (0, 0, None, 0)
    assert value.calibration_error == 0


def many_classes() -> Analysis:
    """1,203 classes with names as long as they may be, each confused with the next."""
    number = 1203
    categories = Categories(tuple(range(1, number + 1)), tuple(f"<{n}>&\"'" * 20 for n in range(number)))
    rows = [(image, image, *OBJECT) for image in range(1, number + 1)]
    found = [(image, category, 0.9, *OBJECT) for image, category, *_ in rows]
    wrong = [(image, category % number + 1, 0.95, *OBJECT) for image, category, *_ in rows]
    return of(objects(*rows, images=number), detected(*found, *wrong), categories).analysis


def test_1203_classes_are_written_within_the_bound_and_read_back(tmp_path: Path) -> None:
    value = many_classes()
    analyses.write(tmp_path, value)
    assert (tmp_path / analyses.FILE_NAME).stat().st_size < 1 << 20
    assert analyses.read(tmp_path) == value
    assert len(value.classes) == 1203
    assert len(value.confusions) == analyses.MOST_CONFUSIONS
    assert all(len(row.name) <= analyses.LONGEST_NAME for row in value.classes)


def test_what_is_no_analysis_is_refused(tmp_path: Path) -> None:
    file = tmp_path / analyses.FILE_NAME
    analyses.write(tmp_path, of(*drawn(1)).analysis)
    good = json.loads(file.read_text())
    changes: list[tuple[dict[str, object], str]] = [
        ({"version": 2}, "version 2, this release reads 1"),
        ({"ap": 1.5}, "ap: "),
        ({"ap": None}, "ap: "),
        ({"images": "7"}, "images: "),
        ({"extra": 1}, "extra: "),
        ({"shards": "x" * 81}, "shards: "),
        ({"confusions": [good["confusions"][0]] * 201}, "confusions: "),
        ({"curves": {"0.50": [0.5] * 1000}}, "curves.0.50: "),
    ]
    for change, message in changes:
        file.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=message) as refusal:
            analyses.read(tmp_path)
        assert str(refusal.value).startswith(f"{file} cannot be read (")
    for content in (b"[]", b"[" * 100_000, b"{", b"\xff", b" " * (analyses.MOST_BYTES + 1)):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="cannot be read"):
            analyses.read(tmp_path)


def test_the_largest_analysis_can_be_read(tmp_path: Path) -> None:
    """A json spells a character outside Unicode's first plane with twelve."""
    name, share = "\N{CAT FACE}" * analyses.LONGEST_NAME, 0.123456
    row = {"id": -MOST_ID, "name": name, "objects": MOST_ID, "ap": share, "ap50": share, "recall": share}
    row |= {"threshold": share, "f1": share, "curve": [0.123] * analyses.CURVE_RECALLS}
    pair = {"truth": name, "found": name, "count": MOST_ID, "share": share}
    values = of(*drawn(1)).analysis.model_dump()
    values |= {"classes": [row] * analyses.MOST_CLASSES, "confusions": [pair] * analyses.MOST_CONFUSIONS}
    largest = Analysis.model_validate(values)
    analyses.write(tmp_path, largest)
    assert analyses.read(tmp_path) == largest
