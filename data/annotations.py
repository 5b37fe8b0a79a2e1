"""The annotations of a set: each handed to its image, or a finding that names its entry and field.

A value that can mean one thing only is read as that (`values.py`).
"""

from collections import Counter
from typing import Any, Literal

from .categories import Categories
from .conventions import Conventions
from .findings import Finding
from .sets import CocoImage, Reading, Source
from .values import MOST_ID, as_flag, as_number, as_whole, described, is_number

MOST_COORDINATE = 1e9  # pixels
# Whatever says of an annotation that it is not one object to be found: all make it a crowd (docs/data.md).
CROWD_FLAGS = (
    "iscrowd", "is_crowd", "isCrowd", "ignore", "difficult", "is_group_of", "IsGroupOf", "isgroup", "group_of",
)  # fmt: skip

BoxKind = Literal["degenerate box", "impossible box", "outside box", "overhanging box"]


def box_fault(bbox: Any, height: int, width: int) -> tuple[BoxKind, str] | None:
    """What is wrong with a box (xywh in pixels) by the rule of `boxes.py`, or None."""
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(map(_is_coordinate, bbox))):
        return "impossible box", f"bbox {described(bbox)} is not four finite numbers up to {MOST_COORDINATE:g}"
    left, top, w, h = bbox
    if w < 0 or h < 0:
        return "impossible box", f"bbox {bbox} has a negative width or height"
    if w == 0 or h == 0:
        return "degenerate box", f"bbox {bbox} has no area"
    inside_w = min(left + w, width) - max(left, 0)
    inside_h = min(top + h, height) - max(top, 0)
    if inside_w <= 0 or inside_h <= 0:
        return "outside box", f"bbox {bbox} covers nothing of the {width} x {height} image"
    # Rounded coordinates leave fractions of a pixel outside; only more is worth a word.
    if max(-left, -top, left + w - width, top + h - height) > 1:
        return "overhanging box", f"bbox {bbox} leaves the {width} x {height} image"
    return None


def annotate(
    images: dict[int, CocoImage],
    refused: set[str],
    source: Source,
    categories: Categories,
    reading: Reading,
    findings: list[Finding],
) -> Counter[int]:
    """Give the annotations to their images, in their order. Returns category id -> number of boxes without area."""
    without_area: Counter[int] = Counter()
    seen: set[int] = set()
    conventions = Conventions()
    found: list[Finding] = []
    for number, entry in enumerate(source.annotations, 1):
        image_id = as_whole(member_of(entry, "image_id"))
        annotation_id = number if reading.renumber else as_whole(member_of(entry, "id"))
        shown_id = number if reading.renumber else described(member_of(entry, "id"))
        where = f"annotation {shown_id} of image {described(member_of(entry, 'image_id'))}"
        if source.places:
            where = source.places[number - 1]
        if annotation_id is None:
            kind = "missing id" if isinstance(entry, dict) else "bad entry"
            found.append(Finding(kind, where, f"id is no whole number >= 0: {described(entry)}"))
            continue
        if annotation_id in seen:
            found.append(Finding("duplicate id", where, "the id belongs to an earlier annotation too"))
            continue
        seen.add(annotation_id)
        if image_id is None or image_id not in images:
            if described(member_of(entry, "image_id")) not in refused:  # else its entry is a finding already
                found.append(Finding("unknown image", where, "no such image in the annotations"))
            continue
        image = images[image_id]
        category_id = as_whole(member_of(entry, "category_id"), -MOST_ID)
        if category_id is None or category_id not in categories:
            what = f"category_id {described(member_of(entry, 'category_id'))}"
            found.append(Finding("unknown category", where, what))
            continue
        crowd, flag_fault = _is_crowd(entry)
        if flag_fault:
            found.append(Finding("bad entry", where, flag_fault))
            continue
        if not image.height:  # which size its boxes refer to is a finding already
            continue
        bbox = stated = _bbox(entry, where, found)
        if source.relative and isinstance(bbox, list):
            sides = (image.width, image.height) * 2
            x, y, w, h = bbox = [share * side for share, side in zip(bbox, sides, strict=True)]
            stated = [x + w / 2, y + h / 2, w, h]
        if not source.from_corners:
            conventions.see(image_id, bbox, stated, image.height, image.width)
        if fault := box_fault(bbox, image.height, image.width):
            kind, what = fault
            found.append(Finding(kind, where, what, "warning" if kind == "overhanging box" else "error"))
            without_area[category_id] += kind == "degenerate box"
            if kind != "overhanging box":
                continue
        image.annotations.append(
            {
                "id": annotation_id,
                "bbox": bbox,
                "category_id": category_id,
                "area": _area(entry, bbox, where, found),
                "iscrowd": int(crowd),
            }
        )
    findings += [*conventions.findings(), *found]
    return without_area


def _bbox(entry: Any, where: str, findings: list[Finding]) -> Any:
    """Four numbers, or what stands in their place. An annotation without a box may have an outline."""
    bbox = member_of(entry, "bbox")
    if bbox in (None, [], [0, 0, 0, 0]):
        outline = member_of(entry, "segmentation")
        corners = outline_corners(outline) if isinstance(outline, list) else None
        if corners:
            left, top, right, bottom = corners
            bbox = [left, top, right - left, bottom - top]
            findings.append(Finding("outline as box", where, f"there is no bbox; taken: {bbox}", "warning"))
        return bbox
    if not isinstance(bbox, list) or len(bbox) != 4:
        return bbox
    numbers = [as_number(value) for value in bbox]
    return bbox if None in numbers else numbers


def outline_corners(polygons: list[Any]) -> tuple[float, float, float, float] | None:
    """(left, top, right, bottom) of polygons, each x, y, x, y, ...; None where they are no such thing."""
    points: list[float] = []
    for polygon in polygons:
        numbers = [as_number(value) for value in polygon] if isinstance(polygon, list) else []
        if len(numbers) < 6 or len(numbers) % 2 or None in numbers:
            return None
        points += [number for number in numbers if number is not None]
    xs, ys = points[::2], points[1::2]
    return (min(xs), min(ys), max(xs), max(ys)) if points else None


def _is_crowd(entry: Any) -> tuple[bool, str]:
    """(whether any of CROWD_FLAGS is set, what is wrong with one)."""
    crowd = False
    for holder in (entry, member_of(entry, "attributes")):
        for name in CROWD_FLAGS if isinstance(holder, dict) else ():
            if name not in holder:
                continue
            value = as_flag(holder[name])
            if value is None and holder is not entry:
                continue  # attributes are free text in many programs
            if value is None:
                return False, f"{name} {described(holder[name])} is neither 0 nor 1"
            crowd |= value
    return crowd, ""


def _area(entry: Any, bbox: list[float], where: str, findings: list[Finding]) -> float:
    """The stated area if it is possible, otherwise the box's: one of 0 or less would hide the object from AP."""
    stated, width, height = member_of(entry, "area"), bbox[2], bbox[3]
    area = as_number(stated)
    # That of an outline drawn in whole pixels may be larger than that of its box.
    if area is not None and 0 < area <= (width + 1) * (height + 1):
        return area
    if stated is not None:
        what = f"area {described(stated)} of a box of {width:g} x {height:g}; taken: {width * height:g}"
        findings.append(Finding("replaced area", where, what, "warning"))
    return width * height


def member_of(entry: Any, key: str) -> Any:
    return entry.get(key) if isinstance(entry, dict) else None


def _is_coordinate(value: Any) -> bool:
    return is_number(value) and abs(value) <= MOST_COORDINATE
