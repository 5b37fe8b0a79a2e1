"""The parts of a set in Pascal VOC's format: its xml files, its images, and the lists of ImageSets/Main."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .classes import LABEL_MAPS
from .documents import decoded
from .image_files import IMAGE_SUFFIXES, files_below, files_in, folders_in, is_split
from .images import read_file
from .sets import Part

_ANNOTATIONS = ("annotations", "labels", "xml", "xmls")
_IMAGES = ("jpegimages", "images", "data", "imgs", "img")
_OF_CLASS = re.compile(r"(.+)_(train|val|trainval|test)", re.IGNORECASE)  # the name of a list of one class
_FLAGGED = re.compile(r"(.+?)\s+-?[01]")  # its lines: an image, and whether it shows one


def voc_parts(root: Path, images: Path | None) -> list[Part]:
    """The splits of a set in Pascal VOC's format below `root`; none without xml. images: their folder, if known."""
    if annotations := _called(root, _ANNOTATIONS, _holds_xml):
        images = images or _called(root, _IMAGES, Path.is_dir) or root
        classes = _label_map(root)
        splits = [place for place in folders_in(annotations) if _holds_xml(place)]
        if any(is_split(place.name) for place in splits):
            return [
                Part(place.name, "voc", place, own if (own := images / place.name).is_dir() else images, None, classes)
                for place in splits
            ]
        parts = [Part(name, "voc", annotations, images, stems, classes) for name, stems in _lists(root).items()]
        return parts or [Part("", "voc", annotations, images, None, classes)]
    if any(file.suffix.lower() == ".xml" for file in files_in(root)) or (images and _holds_xml(root)):
        return [Part("", "voc", root, images or root, None, _label_map(root) or _label_map(root.parent))]
    places = [place for place in folders_in(root) if _holds_xml(place)]
    if any(is_split(place.name) for place in places):
        return [Part(place.name, "voc", place, place, None, _label_map(root)) for place in places]
    homes = [place for place in places if _called(place, _ANNOTATIONS, _holds_xml)]
    if homes:  # VOC2007, VOC2012
        found = [(home, part) for home in homes for part in voc_parts(home, None)]
        return [replace(part, name="_".join(filter(None, (home.name, part.name)))) for home, part in found]
    return [Part("", "voc", root, root, None, _label_map(root))] if places else []


def _called(root: Path, names: tuple[str, ...], is_right: Callable[[Path], bool]) -> Path | None:
    """The folder with the first of these names, in any case, that is right."""
    folders = {place.name.lower(): place for place in reversed(folders_in(root))}
    return next((folders[name] for name in names if name in folders and is_right(folders[name])), None)


def _lists(root: Path) -> dict[str, tuple[str, ...]]:
    """Split -> names without suffix, of the lists in ImageSets/Main; of each class's where there are no others."""
    texts = {file: _lines(file) for file in sorted((root / "ImageSets" / "Main").glob("*.txt"))}
    of_class = {
        file: match
        for file, lines in texts.items()
        if (match := _OF_CLASS.fullmatch(file.stem)) and lines and all(map(_FLAGGED.fullmatch, lines))
    }
    plain = [file for file in texts if file not in of_class]
    lists: dict[str, set[str]] = {}
    for file in plain or texts:
        split = file.stem if file in plain else of_class[file][2]
        for line in texts[file]:
            flagged = None if file in plain else _FLAGGED.fullmatch(line)
            name = Path((flagged[1] if flagged else line).rpartition("JPEGImages/")[2])
            stem = name.with_suffix("") if name.suffix.lower() in IMAGE_SUFFIXES else name
            lists.setdefault(split, set()).add(stem.as_posix())
    for split, stems in list(lists.items()):  # trainval is mostly the others once more
        others = set().union(*(lists[other] for other in lists if other != split))
        if split.lower() == "trainval" and stems <= others:
            del lists[split]
    return {split: tuple(sorted(stems)) for split, stems in lists.items()}


def _lines(file: Path) -> list[str]:
    lines = (line.strip().replace("\\", "/") for line in decoded(read_file(file)).split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def _holds_xml(folder: Path) -> bool:
    return folder.is_dir() and bool(files_below(folder, (".xml",)))


def _label_map(home: Path) -> Path | None:
    return next((home / name for name in LABEL_MAPS if (home / name).is_file()), None)
