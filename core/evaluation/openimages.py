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

from collections.abc import Sequence

import numpy as np

from ...data.categories import Categories
from ...data.truth import GroundTruth
from .columns import packed, unpacked_rows
from .tally import Tally

MEANINGS = {"AP": "precision, IoU 0.50, mean over the classes"}
OVERLAP = 0.5
# One row a detection that is right or wrong, once for each class that it is of. class_: its number.
OUTCOME_DTYPE = np.dtype([("image_id", np.int64), ("class_", np.int64), ("score", np.float32), ("right", np.bool_)])


class OpenImagesTally(Tally):
    """Open Images' protocol. The hierarchy is that of the categories."""

    def __init__(self, categories: Categories) -> None:
        self._ids = np.sort(np.array(categories.ids, dtype=np.int64))
        lineages = [np.searchsorted(self._ids, categories.above(id_)) for id_ in self._ids.tolist()]
        # (K, the longest lineage): each class and those above it, by number; -1 where there is no more.
        self._lineages = np.full((len(lineages), max(map(len, lineages), default=1)), -1)
        for number, lineage in enumerate(lineages):
            self._lineages[number, : len(lineage)] = lineage
        self._objects = np.zeros(len(self._ids), dtype=np.int64)  # of each class
        self._outcomes = [np.empty(0, dtype=OUTCOME_DTYPE)]

    def add(self, truth: GroundTruth, detections: np.ndarray) -> None:
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
        outcomes = np.empty(len(guesses), dtype=OUTCOME_DTYPE)
        outcomes["image_id"], outcomes["score"], outcomes["right"] = guesses["image_id"], guesses["score"], right
        if len(image_ids):
            outcomes["class_"] = of_guesses // len(image_ids)
            self._objects += np.bincount(of_objects // len(image_ids), minlength=len(self._ids))
        self._outcomes.append(outcomes[counts])

    def to_bytes(self) -> bytes:
        return packed(self._objects.tobytes(), np.concatenate(self._outcomes).tobytes())

    def merge(self, others: Sequence[bytes]) -> None:
        for other in others:
            objects, outcomes = unpacked_rows(other, self._objects.dtype, OUTCOME_DTYPE)
            if len(objects) != len(self._objects):
                raise ValueError(f"a tally of {len(objects)} classes, not of {len(self._objects)}")
            self._objects += objects
            self._outcomes.append(outcomes)

    def scores(self) -> dict[str, float]:
        found = list(self.by_class().values())
        return {"AP": float(np.mean(found)) if found else -1.0}

    def by_class(self) -> dict[int, float]:
        """AP of each class that has objects, by category id."""
        outcomes = np.concatenate(self._outcomes)
        # By class, the best first; of equal ones, whoever evaluated the images, in the order of these.
        outcomes = outcomes[np.lexsort((outcomes["image_id"], -outcomes["score"], outcomes["class_"]))]
        ends = np.searchsorted(outcomes["class_"], np.arange(len(self._ids)), side="right")
        right = np.split(outcomes["right"], ends)[:-1]
        classes = zip(self._ids.tolist(), right, self._objects.tolist(), strict=True)
        return {id_: average_precision(hits, objects) for id_, hits, objects in classes if objects}

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
