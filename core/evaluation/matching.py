"""Which detection is which object: the matching behind COCO's scores, kept detection by detection.

D detections, G objects, K classes, I images, T IoU thresholds.
"""

from dataclasses import dataclass

import numpy as np

from ...data.categories import Categories
from ...data.protocols import LISTS, ProtocolName
from ...data.truth import GroundTruth

THRESHOLDS = np.linspace(0.5, 0.95, 10)  # of IoU
MOST_OF_CLASS = 100  # detections of one class in one image, as COCO counts them
MOST_OF_IMAGE = 300  # of all classes together, as LVIS counts them
BACKGROUND = 0.1  # below this IoU with all objects a detection is of background (TIDE, section 2.2)
_PAIRS_AT_ONCE = 1 << 21


@dataclass(frozen=True, eq=False)
class Nearest:
    """Of each detection the object of some classes that it overlaps most: its row, -1 without any; and the IoU."""

    object: np.ndarray  # (D) int64
    iou: np.ndarray  # (D) float64; 0 for less than BACKGROUND


@dataclass(frozen=True, eq=False)
class Pairs:
    """P detections and objects of one image with their IoU."""

    detection: np.ndarray  # (P) rows
    object: np.ndarray  # (P) rows
    iou: np.ndarray  # (P) float64

    def of(self, which: np.ndarray) -> "Pairs":
        return Pairs(self.detection[which], self.object[which], self.iou[which])


@dataclass(frozen=True, eq=False)
class Matches:
    """The detections and objects of a set, and which belong together.

    Detections stand by class, in a class by score, the highest first, equal ones in the order of the images' ids: the
    order in which pycocotools counts them. Labels and images are places in `category_ids` and `image_ids`.
    """

    category_ids: np.ndarray  # (K), rising
    image_ids: np.ndarray  # (I), rising
    detections: np.ndarray  # (D) rows, those that the protocol counts
    label: np.ndarray  # (D)
    image: np.ndarray  # (D)
    objects: np.ndarray  # (G) rows of ANNOTATION_DTYPE
    object_label: np.ndarray  # (G)
    object_image: np.ndarray  # (G)
    is_doubtful: np.ndarray  # (D) bool: not all objects of that class have boxes in that image
    matched: np.ndarray  # (T, D) int32: the row of the object that a detection is, -1 for none
    same: Nearest  # objects of the detection's class, without crowds
    other: Nearest  # objects of other classes, without crowds
    near: Pairs  # those of any classes with an IoU of at least THRESHOLDS[0], without crowds

    @property
    def true(self) -> np.ndarray:
        """(T, D): the detection is an object."""
        return (self.matched >= 0) & ~self.ignored

    @property
    def ignored(self) -> np.ndarray:
        """(T, D): the detection is neither true nor false: it lies in a crowd of its class, or is doubtful."""
        crowd = np.append(self.objects["iscrowd"], False)  # the last one is for -1
        return crowd[self.matched] | ((self.matched < 0) & self.is_doubtful)

    @property
    def is_object(self) -> np.ndarray:
        """(G): the rows that are to be found, which crowds are not."""
        return ~self.objects["iscrowd"]

    @property
    def num_objects(self) -> np.ndarray:
        """(K): objects of each class."""
        return np.bincount(self.object_label[self.is_object], minlength=len(self.category_ids))


def matches(
    truth: GroundTruth, detections: np.ndarray, categories: Categories, protocol: ProtocolName = "coco"
) -> Matches:
    """Match detections with objects at every IoU threshold, as COCOeval does.

    In each image and class the detections choose in the order of their scores. Each takes the object with the highest
    IoU that is still free, at least the threshold; one that finds none may lie in a crowd, which any number may share.
    In LVIS and Open Images only detections of classes count that the image was labelled for. Open Images' hierarchy,
    and its own rule for groups, are left out.

    detections: rows of DETECTION_DTYPE in images of `truth`, finite, of the set's categories.
    """
    category_ids = np.sort(np.array(categories.ids, dtype=np.int64))
    image_ids = np.sort(np.array([image["id"] for image in truth.images], dtype=np.int64))
    objects = truth.annotations[np.argsort(truth.annotations["image_id"], kind="stable")]
    object_label = np.searchsorted(category_ids, objects["category_id"])
    object_image = np.searchsorted(image_ids, objects["image_id"])
    rows = _most_certain(detections, protocol)
    label, image = np.searchsorted(category_ids, rows["category_id"]), np.searchsorted(image_ids, rows["image_id"])
    order = np.lexsort((image, -rows["score"], label))
    is_doubtful = np.zeros(len(rows), dtype=bool)
    if LISTS[protocol]:
        labelled, partly = (
            _cells(truth, name, image_ids, category_ids) for name in ("neg_category_ids", "not_exhaustive_category_ids")
        )
        cells = image * len(category_ids) + label
        labelled = np.append(labelled, object_image * len(category_ids) + object_label)
        order = order[np.isin(cells[order], labelled)]
        is_doubtful = np.isin(cells, partly)
    rows, label, image, is_doubtful = rows[order], label[order], image[order], is_doubtful[order]

    pairs = _pairs(rows, image, objects, object_image, len(image_ids))
    same = label[pairs.detection] == object_label[pairs.object]
    crowd = objects["iscrowd"][pairs.object]
    candidates = pairs.of(same & (pairs.iou >= THRESHOLDS[0]))
    candidates = candidates.of(by_choice(candidates, objects["iscrowd"], candidates.detection))
    matched = [
        chosen(candidates.of(candidates.iou >= threshold), objects["iscrowd"], len(rows)) for threshold in THRESHOLDS
    ]
    return Matches(
        category_ids=category_ids,
        image_ids=image_ids,
        detections=rows,
        label=label,
        image=image,
        objects=objects,
        object_label=object_label,
        object_image=object_image,
        is_doubtful=is_doubtful,
        matched=np.stack(matched),
        same=_nearest(pairs.of(same & ~crowd), len(rows)),
        other=_nearest(pairs.of(~same & ~crowd), len(rows)),
        near=pairs.of(~crowd & (pairs.iou >= THRESHOLDS[0])),
    )


def by_choice(pairs: Pairs, is_crowd: np.ndarray, *turns: np.ndarray) -> np.ndarray:
    """The order in which pairs are tried: by the detections' turns, the last one first of all.

    A detection prefers objects to crowds, then the highest IoU, then what stands last. is_crowd: (G) bool.
    """
    return np.lexsort((-pairs.object, -pairs.iou, is_crowd[pairs.object], *turns))


def chosen(pairs: Pairs, is_crowd: np.ndarray, num: int) -> np.ndarray:
    """(num) int32: the object of each detection, -1 for none. The pairs stand as they are to be tried."""
    found, crowds = np.full(num, -1, dtype=np.int32), is_crowd.tolist()
    taken, last = bytearray(len(crowds)), -1
    for detection, candidate in zip(pairs.detection.tolist(), pairs.object.tolist(), strict=True):
        if detection != last and not taken[candidate]:
            found[detection], taken[candidate], last = candidate, not crowds[candidate], detection
    return found


def _most_certain(detections: np.ndarray, protocol: ProtocolName) -> np.ndarray:
    """Those with the highest scores: of each class in each image, in LVIS of each image."""
    together = ("image_id",) if protocol == "lvis" else ("image_id", "category_id")
    order = np.lexsort((-detections["score"], *(detections[name] for name in reversed(together))))
    rows = detections[order]
    new = np.ones(len(rows), dtype=bool)
    for name in together:
        new[1:] &= rows[name][1:] == rows[name][:-1]
    new[1:] = ~new[1:]
    starts = np.flatnonzero(new)
    rank = np.arange(len(rows)) - np.repeat(starts, np.diff(np.append(starts, len(rows))))
    return rows[rank < (MOST_OF_IMAGE if protocol == "lvis" else MOST_OF_CLASS)]


def _cells(truth: GroundTruth, name: str, image_ids: np.ndarray, category_ids: np.ndarray) -> np.ndarray:
    """One number for each image and class in the images' lists of this name."""
    listed = [(image["id"], id_) for image in truth.images for id_ in image.get(name, ())]
    images, ids = np.array(listed, dtype=np.int64).reshape(-1, 2).T
    known = np.isin(ids, category_ids)
    return np.searchsorted(image_ids, images[known]) * len(category_ids) + np.searchsorted(category_ids, ids[known])


def _pairs(
    rows: np.ndarray, image: np.ndarray, objects: np.ndarray, object_image: np.ndarray, num_images: int
) -> Pairs:
    """Those that overlap by at least BACKGROUND.

    objects: by image. The IoU with a crowd is the share of the detection that lies in it.
    """
    first = np.searchsorted(object_image, np.arange(num_images))
    count = np.bincount(object_image, minlength=num_images)[image]
    boxes, object_boxes = rows["bbox"].astype(np.float64), objects["bbox"]
    ends = np.cumsum(count)
    cuts = np.searchsorted(ends, np.arange(_PAIRS_AT_ONCE, ends[-1] if len(ends) else 0, _PAIRS_AT_ONCE))
    found = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))]
    for part in np.split(np.arange(len(rows)), cuts):
        repeats = count[part]
        detection = np.repeat(part, repeats)
        within = np.arange(len(detection)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        object_ = first[image[detection]] + within
        iou = _overlap(boxes[detection], object_boxes[object_], objects["iscrowd"][object_])
        near = iou >= BACKGROUND
        found.append((detection[near], object_[near], iou[near]))
    return Pairs(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def _overlap(boxes_xywh: np.ndarray, others_xywh: np.ndarray, crowd: np.ndarray) -> np.ndarray:
    """IoU of boxes (N, 4), pair by pair, in pycocotools' order of operations, so that its thresholds cut the same."""
    x, y, w, h = boxes_xywh.T
    other_x, other_y, other_w, other_h = others_xywh.T
    width = np.minimum(x + w, other_x + other_w) - np.maximum(x, other_x)
    height = np.minimum(y + h, other_y + other_h) - np.maximum(y, other_y)
    both = np.maximum(width, 0) * np.maximum(height, 0)
    union = np.where(crowd, w * h, w * h + other_w * other_h - both)
    return np.divide(both, union, out=np.zeros_like(both), where=both > 0)


def _nearest(pairs: Pairs, num: int) -> Nearest:
    """Of equally near objects the first one."""
    pairs = pairs.of(np.lexsort((pairs.object, -pairs.iou, pairs.detection)))
    rows, firsts = np.unique(pairs.detection, return_index=True)
    nearest, value = np.full(num, -1, dtype=np.int64), np.zeros(num)
    nearest[rows], value[rows] = pairs.object[firsts], pairs.iou[firsts]
    return Nearest(nearest, value)
