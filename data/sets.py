"""The types of an annotated set: what its annotations say, and what of that can be used."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .categories import Categories
from .config import MOST_PIXELS
from .findings import Finding
from .protocols import ProtocolName


@dataclass(frozen=True)
class Reading:
    """How annotations are read: the options that `pack` and `check` share.

    allow_outside: images may lie outside their folder, by .., by a link or by an absolute name. most_pixels: as
    data.most_pixels. renumber: annotations get new ids, in their order. orientation: what boxes of an image with an
    EXIF orientation refer to where its size does not decide: the stored pixels, or the picture as shown. classes: where
    the names of the classes are, of VOC and YOLO. workers: processes, 0 for one per core. protocol: by which the set
    is evaluated, in place of the one that the annotations show.
    """

    allow_outside: bool = False
    most_pixels: int = MOST_PIXELS
    renumber: bool = False
    orientation: Literal["stored", "shown"] | None = None
    classes: Path | None = None
    workers: int = 0
    protocol: ProtocolName | None = None


@dataclass(frozen=True)
class Source:
    """What annotations say, as entries of a COCO json, before any of it is believed.

    places: where each annotation stands, if not by its id. from_corners: each bbox was corners, as VOC has it.
    relative: each bbox is in shares of the picture as shown. shown: where nothing decides, boxes refer to the picture
    as shown (`Reading.orientation`).
    """

    categories: Any
    images: list[Any]
    annotations: list[Any]
    findings: list[Finding] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    from_corners: bool = False
    relative: bool = False
    shown: bool = False


@dataclass(frozen=True)
class CocoImage:
    """One image with the annotations that can be used, reduced to what a detector needs.

    height, width: pixels of the picture, which is the stored one turned by `orientation` (1 to 8, as EXIF has them).
    annotations: {"id", "bbox" (xywh in pixels of the picture), "category_id", "area", "iscrowd"} each.
    neg_category_ids, not_exhaustive_category_ids: where the set's protocol has these lists.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    annotations: list[dict[str, Any]]
    orientation: int = 1
    neg_category_ids: list[int] | None = None
    not_exhaustive_category_ids: list[int] | None = None

    @property
    def key(self) -> str:
        """The sample's name in its shard."""
        return f"{self.image_id:012d}"

    @property
    def where(self) -> str:
        """The image, as a finding names it."""
        return f"image {self.image_id} ({self.file_name})"


@dataclass(frozen=True)
class CocoSet:
    """Categories, images by ascending id, and everything found wrong on the way.

    path: of the annotations. folder: of the images. without_area: category id -> how many boxes have no area, which
    `images` are without. protocol: by which detections in it are scored.
    """

    path: Path

    categories: Categories
    images: list[CocoImage]
    findings: list[Finding]
    folder: Path
    without_area: Mapping[int, int]
    protocol: ProtocolName = "coco"


@dataclass(frozen=True)
class Part:
    """One part of a set. annotations: a json, a CSV, or the folder of xml or txt files. images: of its images.

    listed: the images that belong to it, where not all in the folder do: their names for YOLO, without suffix for VOC.
    classes: the file that names its classes, where the layout has one. absent: splits that are named but not there.
    """

    name: str
    kind: Literal["coco", "voc", "yolo", "openimages"]
    annotations: Path
    images: Path
    listed: tuple[str, ...] | None = None
    classes: Path | None = None
    absent: tuple[str, ...] = ()
