"""The parts of a set in COCO's format: its json files, and the folder of images that each is of."""

import codecs
import mmap
import re
from pathlib import Path

from .documents import parse_json
from .files import SPLITS, folders_in
from .sets import Part
from .text import visible

_PLACES = ("images", "data", "JPEGImages", "photos", "images/default")
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.){1,4000}")')
_COCO_LIST = re.compile(rb'"(images|annotations)"\s*:\s*\[')
_HEAD_BYTES = 1 << 20  # of a json, in which one of its lists begins
_PREFIX = re.compile(r"^(instances|_?annotations|labels|result|coco|dataset|data)[._-]?(coco)?", re.IGNORECASE)
# What else is in COCO's format beside the boxes, by the beginnings of its names.
_NO_BOXES = ("captions", "person_keypoints", "stuff", "panoptic", "image_info", "labels_")


def coco_parts(root: Path, images: Path | None) -> list[Part]:
    folders = [root / "annotations", root, *folders_in(root)]
    for some in (folders[:1], folders[1:2], folders[2:]):
        documents = [file for folder in some for file in sorted(folder.glob("*.json")) if _is_coco(file)]
        boxes = [file for file in documents if not file.name.startswith(_NO_BOXES)]
        if documents := boxes or documents:
            return [_part(root, file, images, len(documents) > 1) for file in documents]
    return []


def lone_coco(file: Path) -> Part:
    """A json whose images are near it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a COCO json, or a folder")
    part = _part(file.parent.parent if file.parent.name == "annotations" else file.parent, file, None, False)
    image = _first_file_name(file)
    if image is not None and not (part.images / image).is_file():
        raise ValueError(f"{file}: {visible(image)} is not near it: name the folder of its images after it, IMAGES")
    return part


def _part(root: Path, file: Path, images: Path | None, one_of_several: bool) -> Part:
    name = _PREFIX.sub("", file.stem)
    if file.parent not in (root, root / "annotations"):
        name = f"{file.parent.name}_{name}" if name else file.parent.name
    elif not one_of_several and not name.lower().startswith(SPLITS):
        name = ""
    name = name or (file.stem if one_of_several else "")
    if images is None:
        image = _first_file_name(file)
        homes = [home / place for home in (root, file.parent) for place in _PLACES]
        places = [root / "images" / name, root / name, file.parent, *homes, root]
        places = [place for place in places if place.is_dir()]
        images = next((place for place in places if image is not None and (place / image).is_file()), places[0])
    return Part(name, "coco", file, images)


def _is_coco(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    head = head.replace(b"\0", b"") if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else head
    return head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1] == b"{" and _COCO_LIST.search(head) is not None


def _first_file_name(file: Path) -> str | None:
    """Of the first image entry, wherever in a file of gigabytes it is."""
    if not file.stat().st_size:
        return None
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        match = _FILE_NAME.search(data)
        text = bytes(match[1]) if match else None
    try:
        return str(parse_json(text)).replace("\\", "/") if text else None
    except ValueError:
        return None
