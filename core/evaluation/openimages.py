"""Open Images' number, by the protocol of its challenge: mean over the classes of the AP at an overlap (IoU) of 0.50.

- A box of a class is one of all classes above it, too; so is a detection.
- On an image, the classes of its boxes and of its list `neg_category_ids` are verified. Detections of others do not
  count.
- A detection has found the box that it overlaps most, unless a better one has found it before (Pascal VOC 2010).
- A box around a group (the set's crowds) counts as one object. The best detection inside has found it, further ones
  are neither right nor wrong. Inside means that half of the detection's own area is in the box.
- AP is the whole area under the curve of precision over recall, made monotonic (Pascal VOC 2010).

Source: storage.googleapis.com/openimages/web/evaluation.html, with groups of weight 1.
"""

import numpy as np

from ...data.categories import Categories
from ...data.truth import GroundTruth
from .tally import Kept

MEANINGS = {"AP": "precision, IoU 0.50, mean over the classes"}
OVERLAP = 0.5


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
        found = list(self.by_class().values())
        return {"AP": float(np.mean(found)) if found else -1.0}

    def by_class(self) -> dict[int, float]:
        """AP of each class that has objects, by category id."""
        truth, detections = self.joined()
        image_ids = np.sort(np.array([image["id"] for image in truth.images], dtype=np.int64))
        objects, of_objects = self._expanded(truth.annotations, image_ids)
        guesses, of_guesses = self._expanded(detections, image_ids)
        verified = np.isin(of_guesses, np.concatenate([of_objects, self._listed(truth, image_ids)]))
        guesses, of_guesses = guesses[verified], of_guesses[verified]
        order = np.lexsort((-guesses["score"], of_guesses))  # by class and image, the best first
        guesses, of_guesses = guesses[order], of_guesses[order]
        right, counts = np.zeros(len(guesses), dtype=bool), np.ones(len(guesses), dtype=bool)
        cells, starts, lengths = np.unique(of_objects, return_index=True, return_counts=True)
        spans = np.searchsorted(of_guesses, cells), np.searchsorted(of_guesses, cells, side="right")
        for start, length, begin, stop in zip(starts, lengths, *spans, strict=True):
            if begin < stop:
                inside = objects[start : start + length]
                found = matched(guesses["bbox"][begin:stop].astype(np.float64), inside["bbox"], inside["iscrowd"])
                right[begin:stop], counts[begin:stop] = found
        precisions = {}
        images = max(1, len(image_ids))
        for number, num_objects in zip(*np.unique(of_objects // images, return_counts=True), strict=True):
            begin, stop = np.searchsorted(of_guesses, (number * images, (number + 1) * images))
            chosen = begin + np.flatnonzero(counts[begin:stop])
            best_first = chosen[np.argsort(-guesses["score"][chosen], kind="stable")]
            precisions[int(self._ids[number])] = average_precision(right[best_first], int(num_objects))
        return precisions

    def _expanded(self, rows: np.ndarray, image_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Each row once for its class and each class above it, in the order of their cells; and these."""
        lineages = self._lineages[np.searchsorted(self._ids, rows["category_id"])]
        of_row, _ = (lineages >= 0).nonzero()
        cells = self._cells(rows["image_id"][of_row], lineages[lineages >= 0], image_ids)
        order = np.argsort(cells, kind="stable")
        return rows[of_row[order]], cells[order]

    def _listed(self, truth: GroundTruth, image_ids: np.ndarray) -> np.ndarray:
        """The cells of the images' lists."""
        listed = [(image["id"], id_) for image in truth.images for id_ in image.get("neg_category_ids", ())]
        images, ids = np.array(listed, dtype=np.int64).reshape(-1, 2).T
        known = np.isin(ids, self._ids)
        return self._cells(images[known], np.searchsorted(self._ids, ids[known]), image_ids)

    @staticmethod
    def _cells(images: np.ndarray, classes: np.ndarray, image_ids: np.ndarray) -> np.ndarray:
        """One number for a class (by number) and an image (by id): those of a class are together."""
        return classes * len(image_ids) + np.searchsorted(image_ids, images)


def matched(guesses: np.ndarray, boxes: np.ndarray, are_groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each of D detections of a class in an image has found something, and whether it counts.

    guesses: (D, 4) as xywh, the best first. boxes: (G, 4) as xywh, of which some are around groups.
    """
    least, most = np.maximum(guesses[:, None, :2], boxes[None, :, :2]), guesses[:, :2] + guesses[:, 2:]
    most = np.minimum(most[:, None], (boxes[:, :2] + boxes[:, 2:])[None])
    common = np.clip(most - least, 0, None).prod(-1)  # (D, G) pixels
    areas, own = boxes[:, 2:].prod(-1), guesses[:, 2:].prod(-1)[:, None]
    right = _first_on_each((common / np.maximum(own + areas - common, 1e-12))[:, ~are_groups])[0]
    best, inside = _first_on_each((common / np.maximum(own, 1e-12))[:, are_groups] * ~right[:, None])
    return right | best, right | best | ~inside


def _first_on_each(overlaps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether each detection is the first on the box that it overlaps most; and whether it lies on that at all."""
    first = np.zeros(len(overlaps), dtype=bool)
    if not overlaps.shape[1]:
        return first, first
    chosen = overlaps.argmax(1)
    on_it = np.flatnonzero(overlaps.max(1) >= OVERLAP)
    first[on_it[np.unique(chosen[on_it], return_index=True)[1]]] = True
    return first, overlaps.max(1) >= OVERLAP


def average_precision(right: np.ndarray, num_objects: int) -> float:
    """The area under the curve. right: of each detection that counts, the best first."""
    hits = right.cumsum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float(precision[right].sum() / num_objects)
