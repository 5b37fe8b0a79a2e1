"""Open Images' number, by the protocol of its challenge: mean over the classes of the AP at an overlap (IoU) of 0.50.

- A box of a class is one of all classes above it, too; so is a detection.
- On an image, the classes of its boxes and of its list `neg_category_ids` are verified. Detections of others do not
  count.
- A box around a group (the set's crowds) counts as one object: the best detection inside it has found it, further ones
  are neither right nor wrong. Inside means that half of the detection's own area is in the box.
- AP is the whole area under the curve, as in Pascal VOC 2010.

hotcoco has the matching and the area, and equals TensorFlow's evaluator there; the other rules are here.
Source: storage.googleapis.com/openimages/web/evaluation.html.
"""

import warnings

import hotcoco
import numpy as np

from ...data.categories import Categories
from ...data.truth import GroundTruth
from .tally import Kept

MEANINGS = {"AP": "precision, IoU 0.50, mean over the classes"}


class OpenImagesTally(Kept):
    """Open Images' protocol. The hierarchy is that of the categories."""

    def __init__(self, categories: Categories) -> None:
        super().__init__()
        self._ids = np.sort(np.array(categories.ids, dtype=np.int64))
        lineages = [np.searchsorted(self._ids, categories.above(id_)) for id_ in self._ids.tolist()]
        # (K, the longest lineage): each class and those above it, by number; -1 where there is no more.
        self._lineages = np.full((len(lineages), max(map(len, lineages), default=1)), -1)
        for number, lineage in enumerate(lineages):
            self._lineages[number, : len(lineage)] = lineage

    def scores(self) -> dict[str, float]:
        truth, detections = self.joined()
        image_ids = np.sort(np.array([image["id"] for image in truth.images], dtype=np.int64))
        objects, classes = self._expanded(truth.annotations)
        images = np.searchsorted(image_ids, objects["image_id"])
        names = ("id", "image_id", "category_id", "bbox", "area", "is_group_of")
        areas = objects["bbox"][:, 2] * objects["bbox"][:, 3]
        columns = (np.arange(1, len(objects) + 1), images, classes, objects["bbox"], areas, objects["iscrowd"])
        annotations = [
            dict(zip(names, row, strict=True)) for row in zip(*(column.tolist() for column in columns), strict=True)
        ]
        rows, guesses = self._expanded(detections)
        places = np.searchsorted(image_ids, rows["image_id"])
        verified = np.isin(
            self._pairs(places, guesses),
            np.concatenate([self._pairs(images, classes), self._verified(truth, image_ids)]),
        )
        table = np.column_stack([places, rows["bbox"], rows["score"], guesses]).astype(np.float64)[verified]
        listed = [{"id": n, "name": str(id_)} for n, id_ in enumerate(self._ids.tolist())]
        coco = hotcoco.COCO(
            {"images": [{"id": n} for n in range(len(image_ids))], "annotations": annotations, "categories": listed}
        )
        evaluation = hotcoco.COCOeval(coco, coco.load_res(table), "bbox", oid_style=True)
        with warnings.catch_warnings():  # that it does not know which classes are verified, which is done above
            warnings.simplefilter("ignore", UserWarning)
            evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summary_lines()  # makes `stats`
        return {"AP": float(evaluation.stats[0])}

    def _expanded(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row once for its class and each class above it, and the numbers of these classes."""
        lineages = self._lineages[np.searchsorted(self._ids, rows["category_id"])]
        of_row, _ = (lineages >= 0).nonzero()
        return rows[of_row], lineages[lineages >= 0]

    def _pairs(self, images: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """One number for an image and a class."""
        return images * len(self._ids) + classes

    def _verified(self, truth: GroundTruth, image_ids: np.ndarray) -> np.ndarray:
        """The pairs of the images' lists."""
        listed = [(image["id"], id_) for image in truth.images for id_ in image.get("neg_category_ids", ())]
        images, ids = np.array(listed, dtype=np.int64).reshape(-1, 2).T
        known = np.isin(ids, self._ids)
        return self._pairs(np.searchsorted(image_ids, images[known]), np.searchsorted(self._ids, ids[known]))
