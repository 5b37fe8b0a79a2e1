"""COCO's twelve numbers for boxes, by pycocotools."""

import contextlib
import io
from typing import Any

# In the order of COCOeval.stats.
MEANINGS = {
    "AP": "precision, IoU 0.50 to 0.95",
    "AP50": "precision, IoU 0.50",
    "AP75": "precision, IoU 0.75",
    "AP_small": "precision, area under 32² px",
    "AP_medium": "precision, 32² to 96² px",
    "AP_large": "precision, over 96² px",
    "AR1": "recall, 1 box per image",
    "AR10": "recall, 10 boxes per image",
    "AR100": "recall, 100 boxes per image",
    "AR_small": "recall, area under 32² px",
    "AR_medium": "recall, 32² to 96² px",
    "AR_large": "recall, over 96² px",
}


def coco_metrics(ground_truth: dict, detections: list[dict]) -> dict[str, float]:
    """The twelve numbers of COCOeval for boxes; -1 where no ground truth falls into the range, as pycocotools has it.

    ground_truth: a COCO dictionary; the ids of its annotations, and `ignore` in them, have no meaning, and a missing
    area or iscrowd is as `ddetr data pack` completes it. Detections of categories that it does not list do not count.
    detections: COCO's result format. Neither is changed.
    """
    from pycocotools.cocoeval import COCOeval

    assert {row["image_id"] for row in detections} <= {image["id"] for image in ground_truth["images"]}
    found = [{name: row[name] for name in ("image_id", "category_id", "bbox", "score")} for row in detections]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints, and writes into what it is given
        truth, results = _indexed(ground_truth, ground_truth["annotations"]), _indexed(ground_truth, found)
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(MEANINGS, evaluation.stats, strict=True)}


def _indexed(ground_truth: dict, rows: list[dict]) -> Any:
    """A pycocotools.coco.COCO of annotations or detections in the images of a COCO dictionary.

    They get new numbers, from 1: COCOeval takes a match with id 0 for none, and sees one of those with equal ids.
    """
    from pycocotools.coco import COCO

    completed = ({"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, **row} for row in rows)
    numbered: Any = {**ground_truth, "annotations": [{**row, "id": n} for n, row in enumerate(completed, start=1)]}
    coco = COCO()
    coco.dataset = numbered
    coco.createIndex()
    return coco
