"""Reading a COCO json and saying all that is wrong with it.

`ddetr data pack` refuses what has errors, `ddetr data check` lists them; both by the findings made here.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .categories import Categories
from .documents import parse_json
from .text import visible
from .values import MOST_SIDE, described, is_number, is_whole

MOST_COORDINATE = 1e9  # pixels

# What a user does about each kind of finding.
FIXES = {
    "degenerate box": "correct or delete the annotation, or pack with --drop-degenerate, which leaves such boxes out",
    "overhanging box": "nothing to do: the stream clips it to the image",
    "unknown category": 'add the category to "categories" of the json, or delete the annotation',
    "duplicate id": "give every image and every annotation its own id",
    "duplicate file name": "keep one of the image entries: the image would count twice",
    "duplicate content": "keep one of the files if the images are really the same",
    "unknown image": "delete the annotation, or add its image",
    "outside image": "move the image into the folder and correct file_name; --allow-outside reads it where it is",
    "not a file": "put an ordinary file in its place: pipes and devices are not read",
    "too large image": "scale the image down, or allow more pixels: --most-pixels here, data.most_pixels for training",
    "missing image": "put the file into the images folder, or remove the image from the json",
    "undecodable image": "replace the file, or remove the image from the json",
    "wrong size": "correct height and width in the json; boxes refer to the stored pixels, EXIF rotation not applied",
    "bad entry": "correct the entry, or delete it",
    "missing shard": "run `ddetr data pack` again: it makes only what is missing",
    "extra shard": "delete the file, or pack into an empty folder",
    "wrong bytes": "pack the shard again (delete it first), or copy it again from where it is from",
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
        values = parse_json(path.read_bytes())
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
        lines += [f"    {visible(finding.where)}: {visible(finding.what)[:1000]}" for finding in some]
        lines += [f"    ... and {count - each} more"] if count > each else []
        lines.append(f"    fix: {FIXES[kind]}")
    return "\n".join(lines)


def box_fault(bbox: Any, height: int, width: int) -> tuple[Literal["degenerate box", "overhanging box"], str] | None:
    """What is wrong with a box (xywh in pixels) by the rule of `boxes.py`, or None."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(_is_coordinate(value) for value in bbox)):
        return "degenerate box", f"bbox {described(bbox)} is not four finite numbers up to {MOST_COORDINATE:g}"
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
        where = f"image {described(image_id)}"
        if not (is_whole(image_id) and isinstance(name, str) and name):
            findings.append(Finding("bad entry", where, f"needs a whole id >= 0 and a file_name: {described(entry)}"))
        elif not (is_whole(height, 1, MOST_SIDE) and is_whole(width, 1, MOST_SIDE)):
            what = f"height {described(height)} and width {described(width)} must be whole, > 0"
            findings.append(Finding("bad entry", where, what))
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
        where = f"annotation {described(annotation_id)} of image {described(image_id)}"
        image = images.get(image_id) if is_whole(image_id) else None
        if not is_whole(annotation_id):
            findings.append(Finding("bad entry", where, f"needs a whole id >= 0: {described(entry)}"))
            continue
        if annotation_id in seen:
            findings.append(Finding("duplicate id", where, "the id belongs to an earlier annotation too"))
            continue
        seen.add(annotation_id)
        if image is None:
            findings.append(Finding("unknown image", where, "no such image in the json"))
            continue
        if type(category_id) is not int or category_id not in categories:
            findings.append(Finding("unknown category", where, f"category_id {described(category_id)}"))
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
                "area": area if is_number(area) else bbox[2] * bbox[3],
                "iscrowd": int(bool(iscrowd)),
            }
        )
    return findings


def _get(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_coordinate(value: Any) -> bool:
    return is_number(value) and abs(value) <= MOST_COORDINATE
