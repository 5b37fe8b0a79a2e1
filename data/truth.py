"""The ground truth of images in columns, as an evaluation compares detections with it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .categories import Categories
from .protocols import IMAGE_LISTS

# One row an object. bbox: x, y, width, height in pixels of the picture; area: of the object, in square pixels.
ANNOTATION_DTYPE = np.dtype(
    [
        ("id", np.int64),
        ("image_id", np.int64),
        ("category_id", np.int64),
        ("bbox", np.float64, (4,)),
        ("area", np.float64),
        ("iscrowd", np.bool_),
    ]
)
_OF_IMAGE = ("file_name", "height", "width")


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """Images and their objects.

    images: an entry of a COCO json each, with "id", and the lists of LVIS and Open Images where the set has them.
    annotations: rows of ANNOTATION_DTYPE.
    """

    images: list[dict[str, Any]]
    annotations: np.ndarray

    @staticmethod
    def of(entries: Iterable[Mapping[str, Any]]) -> "GroundTruth":
        """The ground truth of samples, as `ShardReader` gives them."""
        images, rows = [], []
        for entry in entries:
            image_id = entry["image_id"]
            named = (*_OF_IMAGE, *(name for name in IMAGE_LISTS if name in entry))
            images.append({"id": image_id, **{name: entry[name] for name in named}})
            rows += [_row(annotation, image_id) for annotation in entry["annotations"]]
        return GroundTruth(images, np.array(rows, dtype=ANNOTATION_DTYPE))

    @staticmethod
    def of_coco(values: Mapping[str, Any]) -> "GroundTruth":
        """The ground truth of a COCO dictionary: a missing area is that of the box, a missing iscrowd 0.

        The ids of annotations have no meaning, and are numbered from 1.
        """
        rows = []
        for number, annotation in enumerate(values["annotations"], start=1):
            box = annotation["bbox"]
            completed = {"area": box[2] * box[3], "iscrowd": 0, **annotation, "id": number}
            rows.append(_row(completed, annotation["image_id"]))
        return GroundTruth(list(values["images"]), np.array(rows, dtype=ANNOTATION_DTYPE))

    @staticmethod
    def joined(parts: Sequence["GroundTruth"]) -> "GroundTruth":
        """Several as one, in this order."""
        rows = [np.empty(0, dtype=ANNOTATION_DTYPE), *(part.annotations for part in parts)]
        return GroundTruth([image for part in parts for image in part.images], np.concatenate(rows))

    def to_coco(self, categories: Categories) -> dict[str, Any]:
        """A COCO dictionary.

        Annotations keep their ids, but where one is 0 or stands twice: pycocotools does not take these for objects of
        their own, so all are numbered from 1.
        """
        ids = self.annotations["id"]
        if (ids == 0).any() or len(np.unique(ids)) < len(ids):
            ids = np.arange(1, len(ids) + 1)
        columns = [ids, *(self.annotations[name] for name in (ANNOTATION_DTYPE.names or ())[1:])]
        rows = zip(*(column.tolist() for column in columns), strict=True)
        annotations = [
            {"id": id_, "bbox": bbox, "category_id": category, "area": area, "iscrowd": int(crowd), "image_id": image}
            for id_, image, category, bbox, area, crowd in rows
        ]
        return {"info": {}, "images": self.images, "annotations": annotations, "categories": categories.to_json()}


def _row(annotation: Mapping[str, Any], image_id: int) -> tuple[Any, ...]:
    values = (annotation[name] for name in ("category_id", "bbox", "area", "iscrowd"))
    category, bbox, area, crowd = values
    return annotation["id"], image_id, category, tuple(bbox), area, crowd
