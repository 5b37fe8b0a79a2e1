"""The parts of a set in Pascal VOC's format: its xml files, its images, and the lists of ImageSets/Main."""

import re
from pathlib import Path

from .classes import LABEL_MAPS
from .documents import decoded
from .files import IMAGE_SUFFIXES, SPLITS, files_below, files_in, folders_in
from .images import read_file
from .sets import Part

_ANNOTATIONS = ("Annotations", "annotations", "labels", "xml", "xmls")
_IMAGES = ("JPEGImages", "images", "Images", "data", "imgs", "img")
_LINE = re.compile(r"(.+?)(?:\s+-?[01])?")  # of a list: an image, in that of a class whether it shows one


def voc_parts(root: Path, images: Path | None) -> list[Part]:
    if annotations := next((place for name in _ANNOTATIONS if _holds_xml(place := root / name)), None):
        images = images or next((root / name for name in _IMAGES if (root / name).is_dir()), root)
        splits = [place for place in folders_in(annotations) if place.name.lower() in SPLITS and _holds_xml(place)]
        if splits and all((images / place.name).is_dir() for place in splits):
            return [Part(place.name, "voc", place, images / place.name, None, _label_map(root)) for place in splits]
        parts = [
            Part(name, "voc", annotations, images, stems, _label_map(root)) for name, stems in _lists(root).items()
        ]
        return parts or [Part("", "voc", annotations, images, classes=_label_map(root))]
    if any(file.suffix.lower() == ".xml" for file in files_in(root)) or (images and _holds_xml(root)):
        return [Part("", "voc", root, images or root, classes=_label_map(root) or _label_map(root.parent))]
    splits = [place for place in folders_in(root) if _holds_xml(place)]
    if not splits or all(place.name.lower() in SPLITS for place in splits):
        return [Part(place.name, "voc", place, place, classes=_label_map(root)) for place in splits]
    if len(splits) > 1:
        raise ValueError(f"{root}: several sets in it: name one of {', '.join(place.name for place in splits)} in it")
    return voc_parts(splits[0], None) if splits[0] != root else []


def _lists(root: Path) -> dict[str, tuple[str, ...]]:
    """Split -> names without suffix, of the lists in ImageSets/Main; of each class's where there are no others."""
    files = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    lists: dict[str, set[str]] = {}
    for file in [file for file in files if file.stem in SPLITS] or files:
        split = file.stem.rpartition("_")[2]
        for line in decoded(read_file(file)).split("\n") if split in SPLITS else ():
            if match := _LINE.fullmatch(line.strip()):
                name = Path(match[1])
                stem = name.with_suffix("") if name.suffix.lower() in IMAGE_SUFFIXES else name
                lists.setdefault(split, set()).add(stem.as_posix())
    if len(lists) > 1:
        lists.pop("trainval", None)  # the others once more
    return {split: tuple(sorted(stems)) for split, stems in lists.items()}


def _holds_xml(folder: Path) -> bool:
    return folder.is_dir() and bool(files_below(folder, (".xml",)))


def _label_map(home: Path) -> Path | None:
    return next((home / name for name in LABEL_MAPS if (home / name).is_file()), None)
