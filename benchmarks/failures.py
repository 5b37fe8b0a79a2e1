"""What it takes to say where a detector fails and whether a difference is noise, against the same by hotcoco.

    python benchmarks/failures.py [--images 5000] [--draws 50]

On drawn sets as large as COCO's (80 classes, 100 detections an image) and LVIS' (1203 and 300): the scores of
`ddetr eval`, which are needed in any case; the analysis, against hotcoco's TIDE errors, calibration, confusion matrix
and per-image diagnostics, for which it evaluates once more; and a draw of the bootstrap, against hotcoco's. The width
of both intervals: hotcoco counts an image that is drawn twice only once.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import hotcoco
import numpy as np
from ddetr.core.evaluation import bootstrap
from ddetr.core.evaluation.coco import CocoTally
from ddetr.core.evaluation.columns import DETECTION_DTYPE
from ddetr.core.evaluation.failures import failures
from ddetr.core.evaluation.matching import matches
from ddetr.data.categories import Categories
from ddetr.data.truth import ANNOTATION_DTYPE, GroundTruth

OBJECTS = 7  # of an image, on average
TRIES = 3  # detections near an object


def drawn(images: int, classes: int, detections: int) -> tuple[GroundTruth, np.ndarray, Categories]:
    """Classes as frequent as 1, 1/2, ...; detections near objects, a quarter of them of any class, and anywhere."""
    draw = np.random.default_rng(0)
    frequency = 1 / np.arange(1, classes + 1)
    frequency /= frequency.sum()

    def boxes(number: int) -> np.ndarray:
        sides = np.exp(draw.normal(4, 0.9, (number, 2))).clip(4, 470)
        return np.concatenate([draw.uniform(0, 1, (number, 2)) * ((640, 480) - sides), sides], axis=1)

    counts = draw.poisson(OBJECTS, images)
    rows = np.zeros(counts.sum(), dtype=ANNOTATION_DTYPE)
    rows["id"], rows["image_id"] = np.arange(1, len(rows) + 1), np.repeat(np.arange(images), counts)
    rows["category_id"], rows["bbox"] = draw.choice(classes, len(rows), p=frequency), boxes(len(rows))
    rows["area"] = rows["bbox"][:, 2:].prod(axis=1)
    found = np.zeros(images * detections, dtype=DETECTION_DTYPE)
    found["image_id"] = np.repeat(np.arange(images), detections)
    found["category_id"], found["bbox"] = draw.choice(classes, len(found), p=frequency), boxes(len(found))
    found["score"] = draw.beta(1, 6, len(found))
    first = np.cumsum(counts) - counts
    for image in range(images):
        near = min(TRIES * int(counts[image]), detections)
        places = slice(image * detections, image * detections + near)
        objects = rows[first[image] + np.arange(near) % max(1, counts[image])]
        sides = objects["bbox"][:, 2:]
        moved = objects["bbox"] + draw.normal(0, 0.12, (near, 4)) * np.tile(sides, 2)
        moved[:, 2:] = moved[:, 2:].clip(1)
        found["bbox"][places], found["score"][places] = moved, draw.beta(3, 3, near)
        named = draw.random(near) < 0.75
        found["category_id"][places] = np.where(named, objects["category_id"], found["category_id"][places])
    listed = [{"id": id_, "file_name": "", "height": 480, "width": 640} for id_ in range(images)]
    return GroundTruth(listed, rows), found, Categories(tuple(range(classes)), tuple(map(str, range(classes))))


def timed(work: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[float, Any]:
    began = time.perf_counter()
    value = work(*arguments, **options)
    return time.perf_counter() - began, value


def tally_of(truth: GroundTruth, found: np.ndarray, categories: Categories) -> CocoTally:
    tally = CocoTally(np.arange(len(truth.images)), categories)
    tally.add(truth, found)
    tally.scores()
    return tally


def by_hotcoco(truth: GroundTruth, found: np.ndarray, categories: Categories) -> None:
    coco = hotcoco.COCO(truth.to_coco(categories))
    table = [found["image_id"], found["bbox"], found["score"], found["category_id"]]
    evaluation = hotcoco.COCOeval(coco, coco.load_res(np.column_stack(table).astype(np.float64)), "bbox")
    evaluation.evaluate()
    for diagnose in (
        evaluation.tide_errors,
        evaluation.calibration,
        evaluation.confusion_matrix,
        evaluation.image_diagnostics,
    ):
        diagnose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--draws", type=int, default=50)
    arguments = parser.parse_args()
    heads = ["classes", "detections an image", "scores, s", "analysis, s", "by hotcoco, s", "a draw, ms"]
    heads += ["by hotcoco, ms", "interval of AP", "of hotcoco"]
    print(f"| {' | '.join(heads)} |")
    print(f"|{' --- |' * len(heads)}")
    for classes, detections in ((80, 100), (1203, 300)):
        truth, found, categories = drawn(arguments.images, classes, detections)
        other = found.copy()
        other["bbox"][:, :2] += np.random.default_rng(1).normal(0, 2, (len(other), 2)).astype(np.float32)
        scoring, first = timed(tally_of, truth, found, categories)
        analysis, _ = timed(failures, truth, found, categories)
        theirs, _ = timed(by_hotcoco, truth, found, categories)
        pair = [matches(truth, rows, categories) for rows in (found, other)]
        second = tally_of(truth, other, categories)
        ours, comparison = timed(bootstrap.compare, *pair, resamples=arguments.draws)
        both = first.evaluation(), second.evaluation()
        drawing, compared = timed(hotcoco.compare, *both, n_bootstrap=arguments.draws)
        ap, interval = comparison.scores["AP"], compared["ci"]["AP"]
        cells = [f"{scoring:.1f}", f"{analysis:.1f}", f"{theirs:.1f}"]
        cells += [f"{1000 * seconds / arguments.draws:.0f}" for seconds in (ours, drawing)]
        cells += [f"{ap.high - ap.low:.5f}", f"{interval['upper'] - interval['lower']:.5f}"]
        print(f"| {classes} | {detections} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
