"""COCO's twelve numbers for boxes.

hotcoco computes them, and its arrays equal those of pycocotools, which stays the judge (docs/decisions.md). It counts
image by image, so each process counts those that it has evaluated.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import hotcoco
import numpy as np

from ...data.categories import Categories
from ...data.truth import GroundTruth
from .columns import counted, of_coco
from .tally import Tally, Whole

Scorer = Literal["hotcoco", "pycocotools"]

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


def coco_metrics(
    ground_truth: dict[str, Any], detections: list[dict[str, Any]], scorer: Scorer = "hotcoco"
) -> dict[str, float]:
    """The twelve numbers of COCOeval for boxes; -1 where no ground truth falls into the range, as pycocotools has it.

    ground_truth: a COCO dictionary; the ids of its annotations, and `ignore` in them, have no meaning, and a missing
    area or iscrowd is as `ddetr data pack` completes it. detections: COCO's result format; those of categories that
    ground_truth does not list, or with numbers that are not finite, do not count. Neither is changed.
    """
    image_ids = np.array([image["id"] for image in ground_truth["images"]], dtype=np.int64)
    ids = sorted(int(category["id"]) for category in ground_truth["categories"])
    categories = Categories(tuple(ids), tuple(map(str, ids)))
    tally = coco_tally(image_ids, categories, scorer)
    found = of_coco(detections)
    assert np.isin(found["image_id"], image_ids).all(), "a detection in no image of the set"
    tally.add(GroundTruth.of_coco(ground_truth), counted(found, categories))
    return tally.scores()


def coco_tally(image_ids: np.ndarray, categories: Categories, scorer: Scorer) -> Tally:
    """An empty tally of COCO's protocol for a set with these images."""
    if scorer == "pycocotools":
        return Whole(_by_pycocotools, categories)
    return CocoTally(image_ids, categories)


class CocoTally(Tally):
    """COCO's protocol by hotcoco. image_ids: of all images of the set.

    names: of the scores, in hotcoco's order. federated: whether it counts as LVIS does.
    """

    names: tuple[str, ...] = tuple(MEANINGS)
    federated = False

    def __init__(self, image_ids: np.ndarray, categories: Categories) -> None:
        self._categories = categories
        # Their numbers in the order of the ids, in which pycocotools counts; the ids may exceed what a float64 holds.
        self._image_ids = np.sort(image_ids)
        self._category_ids = np.sort(np.array(categories.ids, dtype=np.int64))
        # Without their names, which may be no text that hotcoco takes.
        listed: list[dict[str, Any]] = [
            {"id": n, "name": str(n), **({"frequency": found} if (found := categories.frequencies.get(id_)) else {})}
            for n, id_ in enumerate(self._category_ids.tolist())
        ]
        self._counting = hotcoco.StreamingEval(listed, "bbox", lvis_style=self.federated)
        self._evaluation: hotcoco.COCOeval | None = None

    def add(self, truth: GroundTruth, detections: np.ndarray) -> None:
        rows = truth.annotations
        columns = (
            self._image(rows["image_id"]).tolist(),
            self._category(rows["category_id"]).tolist(),
            *(rows[name].tolist() for name in ("bbox", "area")),
            rows["iscrowd"].astype(int).tolist(),
        )
        names = ("image_id", "category_id", "bbox", "area", "iscrowd")
        annotations = [
            {"id": n, **dict(zip(names, row, strict=True))} for n, row in enumerate(zip(*columns, strict=True), start=1)
        ]
        categories = self._category(detections["category_id"])
        table = [self._image(detections["image_id"]), detections["bbox"], detections["score"], categories]
        self._counting.update(self._images(truth), annotations, np.column_stack(table).astype(np.float64))

    def to_bytes(self) -> bytes:
        return self._counting.to_bytes()

    def merge(self, others: Sequence[bytes]) -> None:
        counts = [hotcoco.StreamingEval.from_bytes(other) for other in others]  # ValueError for anything else
        self._counting = hotcoco.StreamingEval.merge([self._counting, *counts])

    def scores(self) -> dict[str, float]:
        self.evaluation().summary_lines()  # makes `stats`
        return {name: float(value) for name, value in zip(self.names, self.evaluation().stats, strict=True)}

    def evaluation(self) -> hotcoco.COCOeval:
        """What hotcoco made of it: images and categories by their place in the order of the ids."""
        evaluation = self._evaluation
        if evaluation is None:
            self._evaluation = evaluation = self._counting.finalize()
            evaluation.accumulate()
        return evaluation

    def _images(self, truth: GroundTruth) -> list[dict[str, Any]]:
        """The images' entries under their numbers."""
        return [{"id": n} for n in self._image(np.array([image["id"] for image in truth.images], np.int64)).tolist()]

    def _image(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._image_ids, ids)

    def _category(self, ids: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._category_ids, ids)


def _by_pycocotools(ground_truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        truth, results = _indexed(ground_truth, ground_truth["annotations"]), _indexed(ground_truth, detections)
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(MEANINGS, evaluation.stats, strict=True)}


def _indexed(ground_truth: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Any:
    """A pycocotools.coco.COCO of annotations or detections in the images of a COCO dictionary.

    They get new numbers, from 1: COCOeval takes a match with id 0 for none, and sees one of those with equal ids.
    """
    from pycocotools.coco import COCO

    completed = ({"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, **row} for row in rows)
    coco: Any = COCO()
    coco.dataset = {**ground_truth, "annotations": [{**row, "id": n} for n, row in enumerate(completed, start=1)]}
    coco.createIndex()
    return coco
