"""Reading a COCO json and saying all that is wrong with it.

`ddetr data pack` refuses what has errors, `ddetr data check` lists them; both by the findings made here.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .categories import Categories

# What a user does about each kind of finding.
FIXES = {
    "degenerate box": "correct or delete the annotation, or pack with --drop-degenerate, which leaves such boxes out",
    "overhanging box": "nothing to do: the stream clips it to the image",
    "unknown category": 'add the category to "categories" of the json, or delete the annotation',
    "duplicate id": "give every image and every annotation its own id",
    "duplicate file name": "keep one of the image entries: the image would count twice",
    "duplicate content": "keep one of the files if the images are really the same",
    "unknown image": "delete the annotation, or add its image",
    "missing image": "put the file into the images folder, or remove the image from the json",
    "undecodable image": "replace the file, or remove the image from the json",
    "wrong size": "correct height and width in the json; boxes refer to the stored pixels, EXIF rotation not applied",
    "bad entry": "correct the entry, or delete it",
    "missing shard": "run `ddetr data pack` again: it makes only what is missing",
    "extra shard": "delete the file, or pack into an empty folder",
    "wrong bytes": "delete the shard and run `ddetr data pack` again: it makes only what is missing",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind (a key of FIXES), where it is, and what was found there."""

    kind: str
    where: str
    what: str
    severity: Literal["error", "warning"] = "error"


@dataclass(frozen=True)
class CocoImage:
    """One image of the json with the annotations that can be used, reduced to what a detector needs.

    annotations: {"id", "bbox" (xywh in pixels), "category_id", "area", "iscrowd"} each.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    annotations: list[dict[str, Any]]

    @property
    def key(self) -> str:
        """The sample's name in its shard."""
        return f"{self.image_id:012d}"


@dataclass(frozen=True)
class CocoSet:
    """A COCO json: categories, images by ascending id, and everything found wrong on the way."""

    categories: Categories
    images: list[CocoImage]
    findings: list[Finding]


def read_coco(path: Path) -> CocoSet:
    """Read a COCO instance json.

    Raises FileNotFoundError without the file, and ValueError when it is not a COCO json at all; single bad entries
    become findings, and are left out of the images and annotations returned.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a COCO json")
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); expected a COCO json") from error
    return coco_set(path, values)


def coco_set(path: Path, values: Any) -> CocoSet:
    """The content of a COCO json, read from `path`. Raises ValueError as `read_coco`."""
    missing = [k for k in ("images", "annotations", "categories") if not isinstance(_get(values, k), list)]
    if missing:
        raise ValueError(f"{path}: not a COCO json: no list {' and no list '.join(repr(k) for k in missing)}")
    try:
        categories = Categories.from_coco(values["categories"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not categories or not values["images"]:
        raise ValueError(f"{path}: no {'images' if categories else 'categories'} in it")
    images, findings = _images(values["images"])
    findings += _annotate(images, values["annotations"], categories)
    return CocoSet(categories, sorted(images.values(), key=lambda image: image.image_id), findings)


def summary(findings: Sequence[Finding], each: int = 5) -> str:
    """Findings grouped by kind: how many, the first few, and the fix."""
    lines = []
    for kind, count in Counter(finding.kind for finding in findings).items():
        some = [finding for finding in findings if finding.kind == kind][:each]
        lines.append(f"  {kind}: {count}")
        lines += [f"    {finding.where}: {finding.what}" for finding in some]
        lines += [f"    ... and {count - each} more"] if count > each else []
        lines.append(f"    fix: {FIXES[kind]}")
    return "\n".join(lines)


def box_fault(bbox: Any, height: int, width: int) -> tuple[Literal["degenerate box", "overhanging box"], str] | None:
    """What is wrong with a box (xywh in pixels) by the rule of `boxes.py`, or None."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is_number(value) for value in bbox)):
        return "degenerate box", f"bbox {bbox!r} is not four finite numbers"
    left, top, w, h = bbox
    inside_w = min(left + w, width) - max(left, 0)
    inside_h = min(top + h, height) - max(top, 0)
    if inside_w <= 0 or inside_h <= 0:
        return "degenerate box", f"bbox {bbox} covers nothing of the {width} x {height} image"
    # Rounded coordinates leave fractions of a pixel outside; only more is worth a word.
    if max(-left, -top, left + w - width, top + h - height) > 1:
        return "overhanging box", f"bbox {bbox} leaves the {width} x {height} image"
    return None


def _images(entries: Iterable[Any]) -> tuple[dict[int, CocoImage], list[Finding]]:
    images: dict[int, CocoImage] = {}
    findings: list[Finding] = []
    image_by_name: dict[str, int] = {}
    for entry in entries:
        image_id, name = _get(entry, "id"), _get(entry, "file_name")
        height, width = _get(entry, "height"), _get(entry, "width")
        where = f"image {image_id}"
        if not (_is_count(image_id) and isinstance(name, str) and name):
            findings.append(Finding("bad entry", where, f"needs a whole id >= 0 and a file_name: {_short(entry)}"))
        elif not (_is_count(height) and _is_count(width) and height and width):
            findings.append(Finding("bad entry", where, f"height {height!r} and width {width!r} must be whole, > 0"))
        elif image_id in images:
            findings.append(Finding("duplicate id", where, f"stands for {images[image_id].file_name} and for {name}"))
        else:
            if name in image_by_name:
                what = f"{name} is also image {image_by_name[name]}"
                findings.append(Finding("duplicate file name", where, what))
            image_by_name[name] = image_id
            images[image_id] = CocoImage(image_id, name, height, width, [])
    return images, findings


def _annotate(images: dict[int, CocoImage], entries: Iterable[Any], categories: Categories) -> list[Finding]:
    """Hand the annotations to their images, in the json's order."""
    findings: list[Finding] = []
    seen: set[int] = set()
    for entry in entries:
        annotation_id, image_id = _get(entry, "id"), _get(entry, "image_id")
        category_id, bbox = _get(entry, "category_id"), _get(entry, "bbox")
        where = f"annotation {annotation_id} of image {image_id}"
        image = images.get(image_id) if _is_count(image_id) else None
        if not _is_count(annotation_id):
            findings.append(Finding("bad entry", where, f"needs a whole id >= 0: {_short(entry)}"))
            continue
        if annotation_id in seen:
            findings.append(Finding("duplicate id", where, "the id belongs to an earlier annotation too"))
            continue
        seen.add(annotation_id)
        if image is None:
            findings.append(Finding("unknown image", where, "no such image in the json"))
            continue
        if not isinstance(category_id, int) or category_id not in categories:
            findings.append(Finding("unknown category", where, f"category_id {category_id!r}"))
            continue
        fault = box_fault(bbox, image.height, image.width)
        if fault:
            kind, what = fault
            is_error = kind == "degenerate box"
            findings.append(Finding(kind, where, what, "error" if is_error else "warning"))
            if is_error:
                continue
        area, iscrowd = _get(entry, "area"), _get(entry, "iscrowd")
        image.annotations.append(
            {
                "id": annotation_id,
                "bbox": bbox,
                "category_id": category_id,
                "area": area if _is_number(area) else bbox[2] * bbox[3],
                "iscrowd": int(bool(iscrowd)),
            }
        )
    return findings


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _short(entry: Any) -> str:
    text = json.dumps(entry)
    return text if len(text) <= 80 else text[:77] + "..."
