"""Where in a folder that some program exported the parts of a set are: train, val, test, or one without a name.

Known are the layouts of Roboflow, ultralytics, CVAT, Label Studio, VoTT, labelImg, VOCdevkit, TACO and COCO itself.
"""

import codecs
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from .classes import LABEL_MAPS, MOST_NAMES_BYTES, YAML_FILES
from .documents import decoded, parse_json, parse_yaml
from .files import IMAGE_SUFFIXES, files_below
from .images import read_file
from .text import visible
from .values import described

SPLITS = ("train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing", "default")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "imgs", "img")
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.){1,4000}")')
_COCO_LIST = re.compile(rb'"(images|annotations)"\s*:\s*\[')
_HEAD_BYTES = 1 << 20  # of a json, in which one of its lists begins


@dataclass(frozen=True)
class Part:
    """One part of a set. annotations: a json, or the folder of xml or txt files. images: the folder of its images.

    listed: the images that belong to it, where not all in the folder do: their names for YOLO, without suffix for VOC.
    classes: the file that names its classes, where the layout has one.
    """

    name: str
    kind: Literal["coco", "voc", "yolo"]
    annotations: Path
    images: Path
    listed: tuple[str, ...] | None = None
    classes: Path | None = None


def find_parts(path: Path, images: Path | None = None) -> list[Part]:
    """The parts of a set; `path`: a json, a folder of xml or txt files with their images elsewhere, an export's root.

    Raises FileNotFoundError where there is nothing that can be read, ValueError for a data.yaml that leads nowhere.
    """
    if path.suffix.lower() in (".yaml", ".yml") and path.is_file():
        return _yaml_parts(path)
    if not path.is_dir():
        return [Part("", "coco", path, images) if images else _lone_coco(path)]
    if images is not None and images.resolve() != path.resolve():
        return [_folder_part(path, images)]
    for search in (_yolo_root, _darknet_parts, _coco_parts, _voc_parts, _yolo_parts):
        if parts := search(path):
            for place in (place for part in parts for place in (part.images, part.annotations)):
                if not _is_inside(path, place):
                    raise ValueError(f"{place} leads out of {path}: name the annotations and IMAGES one by one")
            return parts
    raise _nothing_found(path)


def _folder_part(path: Path, images: Path) -> Part:
    """Files of annotations in one folder, their images in another."""
    if files_below(path, (".xml",)):
        maps = (place / name for place in (path, path.parent) for name in LABEL_MAPS)
        return Part("", "voc", path, images, classes=next((file for file in maps if file.is_file()), None))
    if files_below(path, (".txt",)):
        return Part("", "yolo", path, images)
    documents = [file for file in sorted(path.glob("*.json")) if _is_coco(file)]
    if len(documents) == 1:
        return Part("", "coco", documents[0], images)
    raise _nothing_found(path)


def _nothing_found(path: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{path}: neither a COCO json nor VOC .xml nor YOLO .txt files in it; name a COCO json or a folder of these, "
        "and the folder of the images (a folder of shards holds its images: leave out IMAGES)"
    )


# YOLO


def _yolo_root(root: Path) -> list[Part]:
    """By a data.yaml, or another yaml that names classes and the images to train on."""
    known = [root / name for name in YAML_FILES if (root / name).is_file()]
    others = (file for file in _files(root) if file.suffix.lower() in (".yaml", ".yml"))
    file = known[0] if known else next((file for file in others if _is_data_yaml(file)), None)
    return _yaml_parts(file, required=False) if file else []


def _is_data_yaml(file: Path) -> bool:
    try:
        values = parse_yaml(decoded(read_file(file, MOST_NAMES_BYTES)), texts=True)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "names" in values and "train" in values


def _yaml_parts(file: Path, required: bool = True) -> list[Part]:
    try:
        values = parse_yaml(decoded(read_file(file, MOST_NAMES_BYTES)), texts=True)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    values = values if isinstance(values, dict) else {}
    parts, absent = [], []
    for key in ("train", "val", "valid", "test"):
        entries = values.get(key) or []
        entries = [entries] if isinstance(entries, str) else entries
        if not (isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
            raise ValueError(f"{file}: {key} is {described(entries)}: needs a path or a list of paths")
        if not entries:
            continue
        places = [place for entry in entries if (place := _place(file.parent, values.get("path"), entry))]
        if len(places) < len(entries):
            absent.append(f"{key}: {described(entries[0] if len(entries) == 1 else entries)}")
            continue
        parts.append(_yolo_part(key, places, file))
    if absent and (not parts or parts[0].name != "train"):
        raise ValueError(f"{file}: leads to no folder beside it: {'; '.join(absent)}. Correct the path there")
    if not parts and required:
        raise ValueError(f"{file}: no `train` and no `val` in it; expected the data.yaml of a YOLO set")
    return parts


def _place(root: Path, path: Any, entry: str) -> Path | None:
    """Where an entry of a data.yaml leads: such paths are often those of another machine, or of one folder deeper."""
    entry = entry.strip().replace("\\", "/")
    inner = PurePosixPath(entry)
    below = PurePosixPath(*[part for part in inner.parts if part not in ("..", "/", ".")])
    base = PurePosixPath(path.strip().replace("\\", "/")) if isinstance(path, str) else PurePosixPath()
    places = (root / base / inner, root / inner, root / below, root / base.name / below)
    return next((place for place in places if _is_inside(root, place)), None)


def _is_inside(root: Path, place: Path) -> bool:
    """Whether there is something at a path that a file told, and within the folder that the user named."""
    try:
        return place.exists() and place.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError):  # a name that no file can have
        return False


def _yolo_part(name: str, places: list[Path], classes: Path | None) -> Part:
    """Of folders of images, or text files that list them."""
    if len(places) == 1 and places[0].is_dir():
        return Part(name, "yolo", _labels_of(places[0]), places[0], None, classes)
    files = [file for place in places for file in _listed_images(place)]
    if not files:
        raise FileNotFoundError(f"{', '.join(map(str, places))}: no images in it")
    folder = Path(os.path.commonpath([file.parent for file in files]))
    listed = tuple(sorted({file.relative_to(folder).as_posix() for file in files}))
    return Part(name, "yolo", _labels_of(folder), folder, listed, classes)


def _listed_images(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from files_below(place, IMAGE_SUFFIXES)
        return
    root = place.parent
    for line in decoded(read_file(place)).split("\n"):
        if line := line.strip().replace("\\", "/"):
            inner = PurePosixPath(line)
            shorter = (PurePosixPath(*inner.parts[count:]) for count in range(len(inner.parts)))
            found = next((root / path for path in (inner, *shorter) if _is_inside(root, root / path)), None)
            yield found or root / PurePosixPath(*[part for part in inner.parts if part not in ("..", "/")])


def _labels_of(images: Path) -> Path:
    """.../labels/... for .../images/..., where there is one; else beside the images."""
    parts = list(images.parts)
    for position in reversed([number for number, part in enumerate(parts) if part == "images"]):
        labels = Path(*parts[:position], "labels", *parts[position + 1 :])
        if labels.is_dir():
            return labels
    return images


def _darknet_parts(root: Path) -> list[Part]:
    """By a file obj.data with `names = data/obj.names`, `train = data/train.txt`: CVAT's YOLO 1.1 and darknet."""
    file = next((file for file in _files(root) if file.suffix == ".data"), None)
    if file is None:
        return []
    try:
        lines = [line.partition("=") for line in decoded(read_file(file, MOST_NAMES_BYTES)).split("\n")]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    values = {key.strip(): value.strip() for key, mark, value in lines if mark}
    named = {
        key: _place(root, None, value) or _place(root, None, PurePosixPath(value).name) for key, value in values.items()
    }
    classes = named.get("names")
    listings = {key: place for key in ("train", "valid", "val", "test") if (place := named.get(key))}
    return [_yolo_part(key, [listing], classes) for key, listing in listings.items() if listing.is_file()]


def _yolo_parts(root: Path) -> list[Part]:
    """By folders alone: images/train and labels/train; train/images and train/labels; images and labels; one folder."""
    if (root / "labels").is_dir() and (root / "images").is_dir():
        splits = [place.name for place in _folders(root / "images") if (root / "labels" / place.name).is_dir()]
        if splits and all(split.lower().startswith(SPLITS) for split in splits):
            return [Part(split, "yolo", root / "labels" / split, root / "images" / split) for split in splits]
        return [Part("", "yolo", root / "labels", root / "images")]
    splits = [place for place in _folders(root) if (place / "labels").is_dir() and (place / "images").is_dir()]
    if splits:
        return [Part(place.name, "yolo", place / "labels", place / "images") for place in splits]
    return [Part("", "yolo", root, root)] if files_below(root, (".txt",)) else []


# COCO


def _coco_parts(root: Path) -> list[Part]:
    folders = [root / "annotations", root, *_folders(root)]
    for some in (folders[:1], folders[1:2], folders[2:]):
        documents = [file for folder in some for file in sorted(folder.glob("*.json")) if _is_coco(file)]
        boxes = [file for file in documents if file.name.startswith("instances")]  # beside captions and keypoints
        if documents := boxes or documents:
            return [_coco_part(root, file, len(documents)) for file in documents]
    return []


def _is_coco(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        head = opened.read(_HEAD_BYTES)
    head = head.replace(b"\0", b"") if head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else head
    return head.lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n")[:1] == b"{" and _COCO_LIST.search(head) is not None


def _lone_coco(file: Path) -> Part:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a COCO json, or a folder")
    part = _coco_part(file.parent.parent if file.parent.name == "annotations" else file.parent, file, 1)
    image = _first_file_name(file)
    if image is not None and not (part.images / image).is_file():
        raise ValueError(f"{file}: {visible(image)} is not near it: name the folder of its images after it, IMAGES")
    return part


def _coco_part(root: Path, file: Path, number: int) -> Part:
    name = re.sub(r"^(instances|_?annotations|labels|result|coco)[._-]?(coco)?", "", file.stem)
    if file.parent not in (root, root / "annotations"):
        name = file.parent.name if not name else f"{file.parent.name}_{name}"
    if number > 1 and not name:
        name = file.stem
    image = _first_file_name(file)
    nearby = [root / folder for folder in ("images", *_IMAGE_FOLDERS)]
    places = [root / "images" / name, root / name, file.parent, *nearby, root, file.parent / "images"]
    places = [place for place in places if place.is_dir()]
    found = (place for place in places if image is not None and (place / image).is_file())
    return Part(name, "coco", file, next(found, places[0]))


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


# Pascal VOC


def _voc_parts(root: Path) -> list[Part]:
    homes = [home for home in (root, *_folders(root)) if _annotation_folder(home)]
    if len(homes) > 1 and homes[0] != root:
        raise ValueError(f"{root}: several sets in it: name one of {', '.join(home.name for home in homes)} in it")
    if homes:
        return _voc_home(homes[0])
    if any(file.suffix.lower() == ".xml" for file in _files(root)):
        return [Part("", "voc", root, root, classes=_label_map(root))]
    splits = [place for place in _folders(root) if files_below(place, (".xml",))]
    return [Part(place.name, "voc", place, place, classes=_label_map(root)) for place in splits]


def _voc_home(home: Path) -> list[Part]:
    """Annotations, JPEGImages and ImageSets/Main/train.txt, ...; or annotations and images alone."""
    annotations = _annotation_folder(home)
    assert annotations is not None
    images = next((home / name for name in _IMAGE_FOLDERS if (home / name).is_dir()), home)
    listed = {
        file.stem: tuple(line.split()[0] for line in decoded(read_file(file)).split("\n") if line.strip())
        for file in sorted((home / "ImageSets" / "Main").glob("*.txt"))
        if file.stem in SPLITS
    }
    if len(listed) > 1:
        listed.pop("trainval", None)  # the others once more
    listed = {name: stems for name, stems in listed.items() if stems}
    if not listed:
        return [Part("", "voc", annotations, images, classes=_label_map(home))]
    return [Part(name, "voc", annotations, images, stems, _label_map(home)) for name, stems in listed.items()]


def _annotation_folder(home: Path) -> Path | None:
    folders = (home / name for name in ("Annotations", "annotations"))
    return next((folder for folder in folders if folder.is_dir() and files_below(folder, (".xml",))), None)


def _label_map(home: Path) -> Path | None:
    return next((home / name for name in LABEL_MAPS if (home / name).is_file()), None)


def _folders(root: Path) -> list[Path]:
    return sorted(place for place in root.iterdir() if place.is_dir() and not place.name.startswith((".", "__")))


def _files(root: Path) -> Iterable[Path]:
    """The files of a folder itself, by name."""
    return sorted(place for place in root.iterdir() if place.is_file() and not place.name.startswith("."))
