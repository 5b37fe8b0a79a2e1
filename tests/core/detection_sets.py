"""Small sets of objects and detections: drawn, and as other programs take them."""

import contextlib
import io
from typing import Any

import numpy as np
from ddetr.core.evaluation.columns import DETECTION_DTYPE, to_coco
from ddetr.data.categories import Categories
from ddetr.data.truth import ANNOTATION_DTYPE, GroundTruth
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

CATEGORIES = Categories((7, 3, 90), ("cat", "dog", "cow"))


def objects(*rows: tuple[Any, ...], images: int = 1) -> GroundTruth:
    """Rows of (image, category, x, y, width, height) or with a 1 behind for a crowd, in images 1 to `images`."""
    table = np.zeros(len(rows), dtype=ANNOTATION_DTYPE)
    for number, (image, category, *box) in enumerate(rows):
        x, y, w, h, *crowd = box
        table[number] = (number + 1, image, category, (x, y, w, h), w * h, bool(crowd and crowd[0]))
    listed = [{"id": id_, "file_name": f"{id_}.jpg", "height": 100, "width": 100} for id_ in range(1, images + 1)]
    return GroundTruth(listed, table)


def detected(*rows: tuple[Any, ...]) -> np.ndarray:
    """Rows of (image, category, score, x, y, width, height)."""
    values = [(image, category, tuple(box), score) for image, category, score, *box in rows]
    return np.array(values, dtype=DETECTION_DTYPE)


def drawn(
    seed: int, images: int = 25, *, crowds: float = 0.0, ids: int = 1, equal_scores: bool = True
) -> tuple[GroundTruth, np.ndarray]:
    """Boxes of whole pixels, scores of 1/50 so that many are equal, or none; `ids` apart are the ids of images."""
    draw = np.random.default_rng(seed)
    rows, found = [], []
    for image in range(1, images + 1):
        for _ in range(draw.integers(0, 7)):
            category = int(draw.choice(CATEGORIES.ids))
            box = [int(value) for value in (*draw.integers(0, 60, 2), *draw.integers(8, 40, 2))]
            rows.append((image, category, *box, int(draw.random() < crowds)))
            for _ in range(draw.integers(0, 4)):
                near = [max(1, int(value + draw.integers(-5, 6))) for value in box]
                other = category if draw.random() < 0.7 else int(draw.choice(CATEGORIES.ids))
                found.append((image, other, draw.integers(10, 50) / 50, *near))
        for _ in range(draw.integers(0, 6)):
            box = [int(value) for value in (*draw.integers(0, 60, 2), *draw.integers(8, 40, 2))]
            found.append((image, int(draw.choice(CATEGORIES.ids)), draw.integers(1, 30) / 50, *box))
    truth, detections = objects(*rows, images=images), detected(*found)
    order = draw.permutation(len(detections))
    if not equal_scores:
        detections["score"] += order / 1e5
    truth.annotations["image_id"] *= ids
    detections["image_id"] *= ids
    for image in truth.images:
        image["id"] *= ids
    return truth, detections[order]


def by_pycocotools(truth: GroundTruth, detections: np.ndarray, categories: Categories = CATEGORIES) -> COCOeval:
    """Evaluated and accumulated."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth.to_coco(categories)
        coco.createIndex()
        rows = [{**row, "id": number} for number, row in enumerate(to_coco(detections), start=1)]
        evaluation = COCOeval(coco, coco.loadRes(rows), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation
