"""Annotations in Pascal VOC's xml or YOLO's txt, read as if they were a COCO json, with the same checks.

Image ids count from 1 in the order of the names; whatever cannot be read becomes a finding.

VOC: category ids count the names in alphabetical order, from 1. Boxes are whole pixels counted from 1, the last one
included. Difficult objects become crowds: left out of training, and no mistake in evaluation whether found or not.
YOLO: category ids are the numbers in the files, from 0, their names in one of NAME_FILES. Boxes are centre, width and
height as shares of the stored image.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from .coco import CocoSet, Finding, coco_set, read_coco
from .config import MOST_PIXELS
from .documents import parse_yaml
from .images import TooManyPixels, file_fault, image_size, read_file
from .index import file_sha256
from .values import described

MOST_TEXT_BYTES = 64 << 20  # of an xml or txt file
MOST_NAMES_BYTES = 4 << 20  # of one of NAME_FILES
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
NAME_FILES = ("data.yaml", "dataset.yaml", "classes.txt", "obj.names")


def read_annotations(
    path: Path, images: Path, *, allow_outside: bool = False, most_pixels: int = MOST_PIXELS
) -> CocoSet:
    """A COCO json, a folder of VOC xml files, or a folder of YOLO txt files, which may lie in folders below.

    allow_outside, most_pixels: for YOLO, whose images are looked at for their sizes; as `pack` has them.
    Raises FileNotFoundError when there is none of them, ValueError when nothing in it can be used.
    """
    if not path.is_dir():
        return read_coco(path)
    if any(path.rglob("*.xml")):
        return _read_voc(path)
    if any(path.rglob("*.txt")):
        return _read_yolo(path, images, allow_outside, most_pixels)
    raise FileNotFoundError(
        f"{path}: neither VOC .xml nor YOLO .txt files in it; name a COCO json or a folder of these "
        "(a folder of shards holds its images: leave out IMAGES)"
    )


def digest(path: Path) -> str:
    """The sha256 of a file, or of the names and contents of all files of a folder."""
    if path.is_file():
        return file_sha256(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = [f"{file.relative_to(path)} {file_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_voc(folder: Path) -> CocoSet:
    findings: list[Finding] = []
    images: list[dict[str, Any]] = []
    objects: list[tuple[int, str, dict[str, Any]]] = []  # image id, category, the rest
    for number, file in enumerate(sorted(folder.rglob("*.xml")), 1):
        where = str(file.relative_to(folder))
        try:
            root = _parse_xml(read_file(file, MOST_TEXT_BYTES))
            sizes = {name: int(_text(root, f"size/{name}")) for name in ("height", "width")}
            images.append({"id": number, "file_name": _text(root, "filename"), **sizes})
            for entry in root.iter("object"):
                left, top, right, bottom = (
                    float(_text(entry, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax")
                )
                bbox = [left - 1, top - 1, right - left + 1, bottom - top + 1]
                rest = {"bbox": bbox, "iscrowd": int(entry.findtext("difficult", "0"))}
                objects.append((number, _text(entry, "name"), rest))
        except (ElementTree.ParseError, expat.ExpatError, OSError, ValueError, LookupError) as error:
            findings.append(Finding("bad entry", where, str(error)))
    ids = {name: number for number, name in enumerate(sorted({name for _, name, _ in objects}), 1)}
    annotations = [
        {"id": number, "image_id": image_id, "category_id": ids[name], **rest}
        for number, (image_id, name, rest) in enumerate(objects, 1)
    ]
    return _as_coco(folder, images, annotations, ids.items(), findings)


def _parse_xml(data: bytes) -> ElementTree.Element:
    """Raises ValueError for a document that declares a type: only that can define entities, and VOC needs neither."""

    def refuse(name: str, *_: object) -> None:
        raise ValueError("it has a <!DOCTYPE>, which may define entities without end; take it out")

    # Looked at first, because ElementTree's parser does not let itself be told.
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(data, True)
    return ElementTree.fromstring(data)


def _read_yolo(folder: Path, image_folder: Path, allow_outside: bool, most_pixels: int) -> CocoSet:
    names_file, names = _yolo_names(folder)
    findings: list[Finding] = []
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    files = sorted(file for file in image_folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    left = {file for file in folder.rglob("*.txt") if file != names_file}
    resolved = image_folder.resolve()
    for number, file in enumerate(files, 1):
        name = file.relative_to(image_folder)
        fault = file_fault(resolved, str(name), allow_outside=allow_outside)
        if fault is None:
            try:
                height, width = image_size(file, most_pixels)
            except TooManyPixels as error:
                fault = "too large image", str(error)
            except (OSError, ValueError) as error:
                fault = "undecodable image", str(error)
        if fault is not None:
            findings.append(Finding(fault[0], str(name), fault[1]))
            left.discard((folder / name).with_suffix(".txt"))
            continue
        images.append({"id": number, "file_name": name.as_posix(), "height": height, "width": width})
        labels = (folder / name).with_suffix(".txt")
        if labels not in left:
            continue  # an image without objects
        left.remove(labels)
        try:
            lines = read_file(labels, MOST_TEXT_BYTES).decode().splitlines()
        except (OSError, ValueError) as error:
            findings.append(Finding("bad entry", str(labels.relative_to(folder)), str(error)))
            continue
        for row, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                label, *values = line.split()
                category_id, (x, y, w, h) = int(label), map(float, values)
            except ValueError:
                what = f"needs a class and four numbers: {line[:80]!r}"
                findings.append(Finding("bad entry", f"{labels.relative_to(folder)}, line {row}", what))
                continue
            bbox = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
            annotation_id = len(annotations) + 1
            annotations.append({"id": annotation_id, "image_id": number, "category_id": category_id, "bbox": bbox})
    for file in sorted(left):
        findings.append(
            Finding("unknown image", str(file.relative_to(folder)), f"no image of that name in {image_folder}")
        )
    return _as_coco(folder, images, annotations, ((name, number) for number, name in names.items()), findings)


def _yolo_names(folder: Path) -> tuple[Path, dict[int, str]]:
    """Category names by number, from a file beside the labels or above them."""
    for place in (folder, *list(folder.resolve().parents)[:2]):
        for name in NAME_FILES:
            file = place / name
            if not file.is_file():
                continue
            try:
                return file, _names(read_file(file, MOST_NAMES_BYTES).decode(), is_yaml=file.suffix == ".yaml")
            except (ValueError, OverflowError, TypeError) as error:
                raise ValueError(f"{file}: {error}") from error
    raise FileNotFoundError(
        f"{folder}: the names of the classes are missing: put one of {', '.join(NAME_FILES)} into it"
    )


def _names(text: str, is_yaml: bool) -> dict[int, str]:
    if not is_yaml:
        return dict(enumerate(line.strip() for line in text.splitlines() if line.strip()))
    values = parse_yaml(text)
    names = values.get("names") if isinstance(values, dict) else None
    if not isinstance(names, (list, dict)):
        raise ValueError("no list `names` in it")
    pairs = enumerate(names) if isinstance(names, list) else names.items()
    return {int(number): name if isinstance(name, str) else described(name) for number, name in pairs}


def _as_coco(
    path: Path,
    images: list[dict[str, Any]],
    annotations: list[dict[str, Any]],
    ids: Iterable[tuple[str, int]],
    findings: list[Finding],
) -> CocoSet:
    categories = [{"id": number, "name": name} for name, number in ids]
    if findings and not (images and categories):
        raise ValueError(f"{path}: nothing can be used; the first of {len(findings)} errors: {findings[0].what}")
    read = coco_set(path, {"images": images, "annotations": annotations, "categories": categories})
    return CocoSet(read.categories, read.images, findings + read.findings)


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None or not text.strip():
        raise ValueError(f"<{element.tag}> has no <{path.replace('/', '><')}>")
    return text.strip()
