"""What a protocol has counted of the images of a set so far; the tallies of several processes add up to one."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...data.categories import Categories
from ...data.documents import parse_json
from ...data.truth import ANNOTATION_DTYPE, GroundTruth
from .columns import DETECTION_DTYPE, packed, to_coco, unpacked_rows

MOST_SCORES, LONGEST_SCORE = 100, 60  # of a result, and characters of a name: what a table can show
Score = Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, float]]


class Tally(ABC):
    """A count over images that were evaluated, in whatever order and by whichever processes."""

    @abstractmethod
    def add(self, truth: GroundTruth, detections: np.ndarray) -> None:
        """Count further images: all their objects, and their detections in categories of the set.

        detections: rows of DETECTION_DTYPE, all of them finite.
        """

    @abstractmethod
    def to_bytes(self) -> bytes:
        """All of it, for `merge` in another process."""

    @abstractmethod
    def merge(self, others: Sequence[bytes]) -> None:
        """Count the images of others, too. Raises ValueError for bytes that are no tally of this kind."""

    @abstractmethod
    def scores(self) -> dict[str, float]:
        """The scores of all images that were counted, by name: 0 to 1, and -1 where nothing in them has one.

        Nothing can be added afterwards.
        """


class Whole(Tally):
    """Keeps everything, for a function that scores a COCO dictionary and detections in COCO's result format."""

    def __init__(self, score: Score, categories: Categories) -> None:
        self._score, self._categories = score, categories
        self._parts: list[tuple[GroundTruth, np.ndarray]] = []

    def add(self, truth: GroundTruth, detections: np.ndarray) -> None:
        if truth.images:
            self._parts.append((truth, detections))

    def to_bytes(self) -> bytes:
        truth, detections = self._joined()
        return packed(json.dumps(truth.images).encode(), truth.annotations.tobytes(), detections.tobytes())

    def merge(self, others: Sequence[bytes]) -> None:
        for other in others:
            images, annotations, detections = unpacked_rows(
                other, np.dtype(np.uint8), ANNOTATION_DTYPE, DETECTION_DTYPE
            )
            entries = parse_json(images.tobytes())
            if not (isinstance(entries, list) and all(isinstance(entry, dict) and "id" in entry for entry in entries)):
                raise ValueError("not a tally of this kind: no images")
            self.add(GroundTruth(entries, annotations), detections)

    def scores(self) -> dict[str, float]:
        truth, detections = self._joined()
        return self._score(truth.to_coco(self._categories), to_coco(detections))

    def _joined(self) -> tuple[GroundTruth, np.ndarray]:
        """By the ids of the images, so that the order does not depend on who evaluated what."""
        truth = GroundTruth.joined([truth for truth, _ in self._parts])
        images, objects = sorted(truth.images, key=lambda image: image["id"]), truth.annotations
        # Of one type: concatenating records of several corrupts memory (numpy 2.4.6).
        found = [detections for _, detections in self._parts] or [np.empty(0, dtype=DETECTION_DTYPE)]
        detections = np.concatenate(found)
        objects, detections = (rows[np.argsort(rows["image_id"], kind="stable")] for rows in (objects, detections))
        return GroundTruth(images, objects), detections
