"""The parts of a set in COCO's format: its json files, and the folder of images that each is of."""

import codecs
import mmap
import os
import re
import unicodedata
from collections import Counter
from pathlib import Path

from .documents import parse_json
from .files import SPLITS, files_below
from .sets import Part
from .text import visible

_DEEPEST = 3  # folders below the root in which its json files may be
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.){1,4000}")')
_COCO_LIST = re.compile(rb'"(images|annotations)"\s*:\s*\[')
_PREFIX = re.compile(r"^_?(instances|annotations|labels|result|coco|dataset|data)(?=[._-]|$)[._-]?(coco(?=[._-]|$))?")
# What COCO's format holds beside boxes, of the same images: skipped beside a file of the same name with the boxes.
_BESIDE = re.compile(r"(captions|person_keypoints|stuff|panoptic|image_info|labels)_(.*)")


def coco_parts(root: Path, images: Path | None) -> list[Part]:
    """Raises ValueError for a json that is called like a split, but is none of COCO's."""
    files = [file for file in files_below(root, (".json",)) if len(file.relative_to(root).parts) <= _DEEPEST + 1]
    documents = [file for file in files if _is_coco(file)]
    if not documents:
        return []
    beside = {document.parent for document in documents}
    for file in files:
        if file not in documents and file.parent in beside and _is_called_like_a_split(file):
            raise ValueError(
                f"{file}: no COCO json, though it is called like that of a split; mend it, or move it away"
            )
    documents = [file for file in documents if not _is_beside(file, documents)]
    names = [_name(root, file, len(documents) > 1) for file in documents]
    twice = {name for name, count in Counter(names).items() if count > 1}
    if twice:
        full = ("_".join(file.relative_to(root).with_suffix("").parts) for file in documents)
        names = [path if name in twice else name for name, path in zip(names, full, strict=True)]
    return [
        Part(name, "coco", file, images or _images(root, file)) for name, file in zip(names, documents, strict=True)
    ]


def lone_coco(file: Path) -> Part:
    """A json whose images are near it."""
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a COCO json, or a folder")
    return Part(
        "", "coco", file, _images(file.parent.parent if file.parent.name == "annotations" else file.parent, file)
    )


def _is_called_like_a_split(file: Path) -> bool:
    return file.name.startswith("instances") or _PREFIX.sub("", file.stem).lower().startswith(SPLITS)


def _is_beside(file: Path, documents: list[Path]) -> bool:
    match = _BESIDE.fullmatch(file.stem)
    return match is not None and file.with_name(f"instances_{match[2]}.json") in documents


def _name(root: Path, file: Path, one_of_several: bool) -> str:
    """The split that a json is of: its own name, or that of its folder."""
    name = _PREFIX.sub("", file.stem).strip("._- ")
    folders = [part for part in file.relative_to(root).parent.parts if part != "annotations"]
    if not folders and not one_of_several and not name.lower().startswith(SPLITS):
        return ""
    return "_".join([*folders, name] if name else folders) or (file.stem.strip("._- ") if one_of_several else "")


def _images(root: Path, file: Path) -> Path:
    """The folder in which the first image of a json is: one called like its split, its own, or any below the root.

    Raises ValueError where there is none, or where several hold an image of that name.
    """
    image = _first_file_name(file)
    split = _PREFIX.sub("", file.stem).strip("._- ").lower()
    usual = [root / "images" / split, root / split, file.parent, root / "images", root]
    if image is None:
        return next(place for place in usual if place.is_dir())
    forms = (unicodedata.normalize("NFC", image), unicodedata.normalize("NFD", image), image.rpartition("/")[2])
    for name in dict.fromkeys((image, *forms)):
        below = (Path(place) for top in (root, file.parent) for place, _, _ in os.walk(top))
        found = [place for place in dict.fromkeys((*usual, *below)) if _is_file(place / name)]
        called = [place for place in found if split and _is_called(place.name.lower(), split)]
        chosen = called or [place for place in usual if place in found][:1] or found
        if len(chosen) > 1 and chosen[0] not in usual:
            places = ", ".join(str(place.relative_to(root)) for place in chosen[:3])
            raise ValueError(f"{file}: {visible(name)} is in {places}: name the folder of its images after it, IMAGES")
        if chosen:
            return chosen[0]
    raise ValueError(f"{file}: {visible(image)} is not near it: name the folder of its images after it, IMAGES")


def _is_called(folder: str, split: str) -> bool:
    return folder.startswith(split) or (len(folder) > 2 and split.startswith(folder))


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _is_coco(file: Path) -> bool:
    """Whether a json begins as an object and has one of COCO's lists; a broken one may have."""
    if not file.is_file() or not file.stat().st_size:
        return False
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            return _COCO_LIST.search(data[:].replace(b"\0", b"")) is not None
        return data[:64].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and _COCO_LIST.search(data) is not None


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
