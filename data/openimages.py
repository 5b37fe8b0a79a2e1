"""Open Images' CSV files as entries of a COCO json.

The file of boxes is named; the others lie beside it and are known by what they hold: the descriptions of the classes,
image-level labels of the same split, and the hierarchy (a json). Boxes are corners in shares of the picture. Image ids
count from 1 in the order of the images' names, category ids in the order of the descriptions.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .categories import Categories
from .documents import decoded, parse_json
from .findings import Finding
from .image_files import ImageFiles, files_in
from .images import open_file, read_file
from .protocols import with_attributes
from .sets import Source
from .values import as_flag, as_number, described

_HEAD_BYTES = 512
_CORNERS = ("XMin", "YMin", "XMax", "YMax")
_OF_BOXES, _OF_LABELS = {"ImageID", "LabelName", *_CORNERS}, {"ImageID", "LabelName", "Confidence"}
_CLASS = re.compile(r"/[mgt]/[0-9a-z_]+")
_SPLIT = re.compile(r"train|validation|test")


def is_boxes(file: Path) -> bool:
    """Whether a file is a CSV of Open Images' boxes, by its first line."""
    return file.suffix.lower() == ".csv" and _head(file) >= _OF_BOXES


def openimages_source(boxes: Path, images: ImageFiles) -> Source:
    """The boxes of a CSV, and what lies beside it. Raises ValueError for another file, and without descriptions."""
    if not is_boxes(boxes):
        raise ValueError(f"{boxes}: no CSV of Open Images' boxes: its first line lacks {', '.join(sorted(_OF_BOXES))}")
    findings: list[Finding] = []
    beside = [file for file in files_in(boxes.parent) if file != boxes]
    names = _descriptions(boxes, [file for file in beside if file.suffix.lower() == ".csv"])
    split = _SPLIT.search(boxes.name)
    labels = [file for file in beside if _head(file) >= _OF_LABELS and not is_boxes(file)]
    labels = [file for file in labels if not split or split[0] in file.name]
    tree = next(filter(None, (_hierarchy(file) for file in beside if file.suffix.lower() == ".json")), None)
    for there, what in ((labels, "image-level labels"), (tree, "the hierarchy")):
        if not there:
            findings.append(Finding("absent companion", boxes.name, f"no file of {what} beside it", "warning"))
    ids = {class_: number for number, class_ in enumerate(names, 1)}
    above = _parents(tree or {})
    categories = [
        {
            "id": ids[class_],
            "name": name,
            "supercategory": [names[parent] for parent in above.get(class_, ()) if parent in names],
        }
        for class_, name in names.items()
    ]
    try:
        classes = with_attributes(Categories.from_coco(categories), categories, "openimages", findings)
    except ValueError as error:
        raise ValueError(f"{boxes}: {error}") from error
    files: dict[str, str] = {}
    for name in images.names:
        if (other := files.setdefault(name.rpartition("/")[2].partition(".")[0], name)) != name:
            findings.append(Finding("ambiguous image", str(images.folder), f"{name} and {other} have one ImageID"))
    verified = _verified(labels, ids, classes, findings)
    named = {row["ImageID"] for _, row in _rows(boxes, _OF_BOXES)} | set(verified)
    numbers = {image: number for number, image in enumerate(sorted(named & set(files)), 1)}
    if not numbers:
        raise ValueError(f"{boxes}: none of its images is in {images.folder}, as IMAGEID.jpg")
    entries = [
        {"id": number, "file_name": files[image], "neg_category_ids": sorted(verified.get(image, ()))}
        for image, number in numbers.items()
    ]
    if absent := sorted(named - set(files)):
        what = f"{len(absent)} of {len(named)} images are not there: {', '.join(absent[:3])}"
        findings.append(Finding("absent image", str(images.folder), what, "warning"))
    if left := sorted(set(files) - named):
        what = f"{len(left)} images in it are in no file of boxes or labels: {', '.join(left[:3])}"
        findings.append(Finding("image left out", str(images.folder), what, "warning"))
    annotations, places = [], []
    for line, row in _rows(boxes, _OF_BOXES):
        if row["ImageID"] not in numbers:
            continue
        place, corners = f"{boxes.name}, line {line}", [as_number(row[name]) for name in _CORNERS]
        left_, top, right, bottom = (0.0 if corner is None else corner for corner in corners)
        if (
            None in corners
            or None in row
            or row["LabelName"] not in ids
            or (group := as_flag(row.get("IsGroupOf"))) is None
        ):
            findings.append(
                Finding(
                    "bad entry",
                    place,
                    f"needs a class that is described, numbers, and no more values than columns: {described(row)}",
                )
            )
            continue
        places.append(place)
        annotations.append(
            {
                "id": len(places),
                "image_id": numbers[row["ImageID"]],
                "category_id": ids[row["LabelName"]],
                "bbox": [left_, top, right - left_, bottom - top],
                "is_group_of": group,
            }
        )
    return Source(categories, entries, annotations, findings, places, from_corners=True, relative=True, shown=True)


def _head(file: Path) -> set[str]:
    """The names in the first line of a CSV."""
    if file.suffix.lower() != ".csv":
        return set()
    with file.open("rb") as opened:
        first = opened.read(_HEAD_BYTES).decode("utf-8-sig", "replace").partition("\n")[0]
    return {name.strip() for name in first.split(",")}


def _rows(file: Path, names: set[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """Line numbers and rows of a CSV with these names in its first line. Raises ValueError for what is none."""
    with io.TextIOWrapper(open_file(file), encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, restval="")
        try:
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            if absent := sorted(names - set(reader.fieldnames)):
                raise ValueError(f"{file}: its first line lacks {', '.join(absent)}")
            for row in reader:
                yield reader.line_num, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{file}, line {reader.line_num}: not a CSV in UTF-8: {error}") from error


def _descriptions(boxes: Path, files: Iterable[Path]) -> dict[str, str]:
    """The names of the classes by their codes, as /m/01yrx."""
    for file in files:
        try:
            lines = decoded(read_file(file)).split("\n") if _is_of_classes(file) else []
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error
        pairs = [line.strip().split(",", 1) for line in lines]
        found = {pair[0]: pair[1].strip('"') for pair in pairs if len(pair) == 2 and _CLASS.fullmatch(pair[0])}
        if found:
            return found
    raise ValueError(
        f"{boxes.parent}: the names of the classes are missing: put Open Images' class-descriptions-boxable.csv beside "
        f"{boxes.name}"
    )


def _is_of_classes(file: Path) -> bool:
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES).decode("utf-8-sig", "replace")
    return any(_CLASS.match(line) for line in head.split("\n")[:2])


def _hierarchy(file: Path) -> Any:
    """The tree in a json, if it is one of classes."""
    try:
        tree = parse_json(read_file(file))
    except ValueError:
        return None
    return tree if isinstance(tree, dict) and {"LabelName", "Subcategory"} <= tree.keys() else None


def _parents(tree: dict[str, Any]) -> dict[str, list[str]]:
    """The classes right above each one; a class may be in several places."""
    found: dict[str, list[str]] = {}
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        below = node.get("Subcategory") if isinstance(node, dict) else None
        for child in below if isinstance(below, list) else ():
            if isinstance(child, dict):
                found.setdefault(str(child.get("LabelName")), []).append(str(node.get("LabelName")))
                waiting.append(child)
    return found


def _verified(
    files: Iterable[Path], ids: dict[str, int], categories: Categories, findings: list[Finding]
) -> dict[str, set[int]]:
    """The categories that somebody has looked for, by image: of a label that is there also all above it, of one that is
    not also all below it."""
    above = {id_: categories.above(id_) for id_ in categories.ids}
    below: dict[int, set[int]] = {}
    for id_, lineage in above.items():
        for parent in lineage:
            below.setdefault(parent, set()).add(id_)
    found: dict[str, set[int]] = {}
    for file in files:
        for line, row in _rows(file, _OF_LABELS):
            confidence, id_ = as_number(row["Confidence"]), ids.get(row["LabelName"])
            if confidence is None:
                findings.append(Finding("bad entry", f"{file.name}, line {line}", f"no number: {described(row)}"))
            elif id_ is not None and confidence in (0, 1):  # between them, it is a program's
                found.setdefault(row["ImageID"], set()).update(above[id_] if confidence else below[id_])
    return found
