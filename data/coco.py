"""From annotations to a set: entries in the form of a COCO json, and everything that is wrong with them.

Whatever the annotations come from (`formats.py`), they are entries of a COCO json by then, believed only as far as they
can be read. `ddetr data pack` refuses what has errors, `ddetr data check` lists them.
"""

import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from .annotations import annotate, member_of
from .categories import Categories
from .findings import Finding
from .headers import read_headers
from .images import Header
from .index import lack_of_objects
from .protocols import ProtocolName, lists_of, recognised, with_attributes
from .sets import CocoImage, CocoSet, Reading, Source
from .text import visible
from .values import MOST_SIDE, as_whole, described


def coco_set(
    path: Path, source: Source, folder: Path, reading: Reading, *, progress: Progress | None = None
) -> CocoSet:
    """Make a set of what a source, read from `path`, says of the images in `folder`.

    Raises ValueError when there is no image or no category at all, FileNotFoundError without the folder. Single bad
    entries become findings, and are left out.
    """
    findings = list(source.findings)
    try:
        categories = Categories.from_coco(source.categories)
        protocol = reading.protocol or recognised(source.images, source.annotations)
        categories = with_attributes(categories, source.categories, protocol, findings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not categories or not source.images:
        reason = f"; the first of {len(findings)} findings: {_line(findings[0])}" if findings else ""
        raise ValueError(f"{path}: no {'images' if categories else 'categories'} in it{reason}")
    names = Counter(categories.names)
    findings += [
        Finding("repeated category", f"category {name}", f"{count} categories have this name", "warning")
        for name, count in names.items()
        if count > 1
    ]
    images, refused = _images(source.images, folder, protocol, categories, findings)
    images = {
        image_id: replace(image, file_name=_file_name(image, folder, findings)) for image_id, image in images.items()
    }
    headers = read_headers(
        folder,
        [image.file_name for image in images.values()],
        allow_outside=reading.allow_outside,
        most_pixels=reading.most_pixels,
        workers=reading.workers,
        progress=progress,
    )
    usable = _sized(images, headers, source, reading, findings)
    without_area = annotate(images, refused, source, categories, reading, findings)
    kept = [image for image_id, image in sorted(images.items()) if image_id in usable]
    findings += _set_findings(path, kept)
    return CocoSet(path, categories, kept, findings, folder, without_area, protocol)


def _images(
    entries: Iterable[Any], folder: Path, protocol: ProtocolName, categories: Categories, findings: list[Finding]
) -> tuple[dict[int, CocoImage], set[str]]:
    """Images by id, with height 0 where none is stated; and the ids of entries that became findings, as described."""
    images: dict[int, CocoImage] = {}
    image_by_name: dict[str, int] = {}
    refused: set[str] = set()
    for entry in entries:
        image_id, name = as_whole(member_of(entry, "id")), _stated_name(entry, folder)
        where = f"image {described(member_of(entry, 'id'))}"
        size, fault = _stated_size(entry)
        if image_id is None:
            fault = f"id is no whole number >= 0: {described(entry)}"
        elif not (isinstance(name, str) and name):
            fault = f"file_name {described(name)} is no text: {described(entry)}"
        else:
            name = posixpath.normpath(name) if "./" in name and ".." not in name else name
        if image_id is None or fault:
            findings.append(Finding("bad entry", where, fault))
            refused.add(described(member_of(entry, "id")))
        elif image_id in images:
            findings.append(Finding("duplicate id", where, f"stands for {images[image_id].file_name} and for {name}"))
        else:
            if name in image_by_name:
                what = f"{name} is also image {image_by_name[name]}"
                findings.append(Finding("duplicate file name", where, what))
            image_by_name[name] = image_id
            images[image_id] = image = CocoImage(image_id, name, *size, [])
            if lists := lists_of(entry, image.where, protocol, categories, findings):
                images[image_id] = replace(image, **lists)
    return images, refused


def _stated_name(entry: Any, folder: Path) -> Any:
    """An image's file_name. LVIS v1 has its coco_url alone: the file is in the folder of its split, or in `folder`."""
    name, url = member_of(entry, "file_name"), member_of(entry, "coco_url")
    if name is not None or not isinstance(url, str):
        return name
    in_split = "/".join(url.partition("?")[0].split("/")[-2:])
    last = in_split.rpartition("/")[2]
    return last if os.path.lexists(folder / last) and not os.path.lexists(folder / in_split) else in_split


def _file_name(image: CocoImage, folder: Path, findings: list[Finding]) -> str:
    """As the file is called: with slashes where a program on Windows wrote backslashes, in the other normal form of
    Unicode, or by the last part of a path that leads elsewhere."""
    name = image.file_name
    if os.path.lexists(folder / name):
        return name
    slashed = name.replace("\\", "/")
    for form in (slashed, unicodedata.normalize("NFC", slashed), unicodedata.normalize("NFD", slashed)):
        if form != name and os.path.lexists(folder / form):
            return form
    last = slashed.rpartition("/")[2]
    leads_away = slashed.startswith("/") or ".." in slashed.split("/") or re.match(r"[A-Za-z]:/", slashed)
    if leads_away and last and os.path.lexists(folder / last):
        findings.append(Finding("other file name", image.where, f"{name} is not there; taken: {last}", "warning"))
        return last
    return name


def _stated_size(entry: Any) -> tuple[tuple[int, int], str]:
    """((height, width), what is wrong with them); (0, 0) where an entry states none, as hand-made sets do."""
    stated = {name: member_of(entry, name) for name in ("height", "width")}
    sides = [0 if value is None else as_whole(value, 0, MOST_SIDE) for value in stated.values()]
    if None in sides:
        shown = " and ".join(f"{name} {described(value)}" for name, value in stated.items())
        return (0, 0), f"{shown} must be whole, > 0"
    height, width = (side or 0 for side in sides)
    return ((height, width) if height and width else (0, 0)), ""


def _sized(
    images: dict[int, CocoImage],
    headers: list[Header | tuple[str, str]],
    source: Source,
    reading: Reading,
    findings: list[Finding],
) -> set[int]:
    """Give each image the size and orientation that its boxes refer to; the ids of those whose file can be used.

    A quarter turn shows in the stated size. One annotation tool treats all images alike, so the others of the set
    follow those that show it.
    """
    usable: dict[int, Header] = {}
    told: set[bool] = set()
    for image, header in zip(list(images.values()), headers, strict=True):
        if isinstance(header, tuple):
            findings.append(Finding(header[0], image.where, header[1]))
            continue
        stated, stored = (image.height, image.width), (header.height, header.width)
        if stated != (0, 0) and stated not in (stored, header.shown_size):
            shown = f", shown as {stored[0]} x {stored[1]}" if header.shown_size != stored else ""
            what = f"{stated[1]} x {stated[0]} is stated, the file holds {stored[1]} x {stored[0]} pixels{shown}"
            findings.append(Finding("wrong size", image.where, what))
            images[image.image_id] = replace(image, height=0, width=0)
            continue
        usable[image.image_id] = header
        if stated != (0, 0) and header.shown_size != stored:
            told.add(stated == header.shown_size)
    convention = reading.orientation
    if convention is None and (source.relative or len(told) == 1):
        convention = "shown" if source.relative or told == {True} else "stored"
    for image_id, header in usable.items():
        image, stored = images[image_id], (header.height, header.width)
        stated = (image.height, image.width)
        is_shown = (convention == "shown") if convention else source.shown
        if stated != (0, 0) and header.shown_size != stored:
            is_shown = stated == header.shown_size
        elif header.exif_fault:
            what = f"its EXIF cannot be read ({header.exif_fault}); taken: the stored pixels"
            findings.append(Finding("unknown orientation", image.where, what, "warning"))
        elif header.was_turned and not source.shown and convention != "shown":
            what = (
                "an EXIF orientation in a TIFF, which is read as it is shown: boxes of the stored pixels are beside it"
            )
            findings.append(Finding("unknown orientation", image.where, what, "warning"))
        elif header.orientation != 1 and convention is None:
            taken = "picture as shown" if is_shown else "stored pixels"
            what = f"EXIF orientation {header.orientation}: nothing tells what the boxes refer to; taken: the {taken}"
            findings.append(Finding("unknown orientation", image.where, what, "warning"))
        orientation = header.orientation if is_shown else 1
        height, width = header.shown_size if is_shown else stored
        images[image_id] = replace(image, height=height, width=width, orientation=orientation)
    return set(usable)


def _set_findings(path: Path, images: list[CocoImage]) -> list[Finding]:
    findings: list[Finding] = []
    boxes = crowds = 0
    for image in images:
        seen: set[tuple[Any, ...]] = set()
        for annotation in image.annotations:
            box = (annotation["category_id"], *annotation["bbox"])
            if box in seen:
                where = f"annotation {annotation['id']} of image {image.image_id}"
                what = f"bbox {annotation['bbox']} of category {box[0]} is there before"
                findings.append(Finding("repeated box", where, what, "warning"))
            seen.add(box)
            crowds += annotation["iscrowd"]
        boxes += len(image.annotations)
    if images and (what := lack_of_objects(boxes, crowds)):
        findings.append(Finding("no boxes", str(path), what, "warning"))
    return findings


def _line(finding: Finding) -> str:
    return f"{visible(finding.where)}: {visible(finding.what)}"
