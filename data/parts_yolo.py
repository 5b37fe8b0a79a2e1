"""The parts of a set in YOLO's format: by a data.yaml, by an obj.data, or by the names of folders alone."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

from .classes import MOST_NAMES_BYTES, YAML_FILES
from .documents import decoded, parse_yaml
from .image_files import IMAGE_SUFFIXES, files_below, files_in, folders_in, is_inside, is_split
from .images import read_file
from .sets import Part
from .values import described


def yaml_root(root: Path) -> list[Part]:
    """The splits by a data.yaml in `root`, or another yaml there that names classes and the images to train on."""
    known = [root / name for name in YAML_FILES if (root / name).is_file()]
    others = (file for file in files_in(root) if file.suffix.lower() in (".yaml", ".yml"))
    file = known[0] if known else next((file for file in others if _is_data_yaml(file)), None)
    return yaml_parts(file, required=False) if file else []


def _is_data_yaml(file: Path) -> bool:
    try:
        values = parse_yaml(decoded(read_file(file, MOST_NAMES_BYTES)), texts=True)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "names" in values and "train" in values


def yaml_parts(file: Path, required: bool = True) -> list[Part]:
    """The splits by a data.yaml. Raises ValueError when it cannot be used, or without any if `required`."""
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
    if parts and absent:
        parts[0] = replace(parts[0], absent=tuple(absent))
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
    # Of a path on another machine its last two parts or more, as of one on this machine.
    shorter = [PurePosixPath(*below.parts[count:]) for count in range(1, len(below.parts) - 1)]
    places = (
        root / base / inner,
        root / inner,
        root / below,
        root / base.name / below,
        *(root / path for path in shorter),
    )
    return next((place for place in places if is_inside(root, place)), None)


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
    root, shortened = place.parent, 0  # all paths of a list mostly begin alike
    for line in decoded(read_file(place)).split("\n"):
        if (line := line.strip().replace("\\", "/")) and not line.startswith("#"):
            inner = PurePosixPath(line)
            counts = (shortened, *range(len(inner.parts)))
            paths = (
                (count, root / PurePosixPath(*inner.parts[count:])) for count in counts if count < len(inner.parts)
            )
            shortened, found = next((pair for pair in paths if is_inside(root, pair[1])), (0, None))
            yield found or root / PurePosixPath(*[part for part in inner.parts if part not in ("..", "/")])


def _labels_of(images: Path) -> Path:
    """.../labels/... for .../images/..., where there is one; else beside the images."""
    parts = list(images.parts)
    for position in reversed([number for number, part in enumerate(parts) if part.lower() == "images"]):
        for name in ("labels", "Labels"):
            labels = Path(*parts[:position], name, *parts[position + 1 :])
            if labels.is_dir():
                return labels
    return images


def darknet_parts(root: Path) -> list[Part]:
    """The splits by an obj.data with `names = data/obj.names`, `train = data/train.txt`: CVAT's YOLO 1.1, darknet."""
    file = next((file for file in files_in(root) if file.suffix == ".data"), None)
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
    keys = [key for key in ("train", "valid", "val", "test") if values.get(key)]
    parts = [_yolo_part(key, [place], named.get("names")) for key in keys if (place := named[key]) and place.is_file()]
    absent = tuple(f"{key}: {described(values[key])}" for key in keys if key not in {part.name for part in parts})
    return [replace(part, absent=() if number else absent) for number, part in enumerate(parts)]


def yolo_parts(root: Path, images: Path | None) -> list[Part]:
    """The splits by folders: images/train, labels/train; train/images, train/labels; images, labels; one folder."""
    labels = _called(root, ("labels",))
    if images is not None:
        labels = labels or root
        return [Part("", "yolo", labels, images)] if files_below(labels, (".txt",)) else []
    own = _called(root, ("images", "jpegimages"))
    if labels and own:
        splits = _splits([(place.name, labels / place.name, place) for place in folders_in(own)])
        return splits or [Part("", "yolo", labels, own)]
    places = [(place.name, _called(place, ("labels",)), _called(place, ("images",))) for place in folders_in(root)]
    if any(labels and images for _, labels, images in places):
        return _splits([(name, labels, images or root / name) for name, labels, images in places], of_any_name=True)
    together = [(place.name, place, place) for place in folders_in(root) if files_below(place, IMAGE_SUFFIXES)]
    return _splits(together) or ([Part("", "yolo", root, root)] if files_below(root, (".txt",)) else [])


def _splits(places: Sequence[tuple[str, Path | None, Path]], *, of_any_name: bool = False) -> list[Part]:
    """(name, labels, images) as parts, where any is called like a split; folders of images without labels are noted."""
    parts = []
    absent = []
    for name, labels, images in places:
        if labels is not None and labels.is_dir() and files_below(labels, (".txt",)):
            parts.append(Part(name, "yolo", labels, images))
        elif files_below(images, IMAGE_SUFFIXES):
            absent.append(f"{name}: images without labels, left out")
    if not parts or not (of_any_name or any(is_split(part.name) for part in parts)):
        return []
    return [replace(parts[0], absent=tuple(absent)), *parts[1:]]


def _called(root: Path, names: tuple[str, ...]) -> Path | None:
    """The folder with one of these names, in any case."""
    return next((place for place in folders_in(root) if place.name.lower() in names), None)
