"""Annotations of every origin as sets: a COCO json, VOC's xml, YOLO's txt, Open Images' CSV, the root of an export."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from .classes import NAME_FILES, keypoint_numbers, named_classes, read_classes
from .coco import coco_set
from .documents import parse_json
from .files import file_sha256
from .findings import Finding
from .foreign import foreign
from .image_files import IMAGE_SUFFIXES, ImageFiles, files_below, label_stem, stem_of
from .openimages import openimages_source
from .parts import find_parts
from .sets import CocoSet, Part, Reading, Source
from .voc import VocFiles, alphabetical, read_voc, voc_source
from .yolo import yolo_source

EVERYTHING = Reading()


def read_sets(
    path: Path,
    images: Path | None = None,
    reading: Reading = EVERYTHING,
    *,
    split: str | None = None,
    progress: Progress | None = None,
) -> dict[str, CocoSet]:
    """Read the sets at `path`, by the names of their splits; "" is the name of a single one that has none.

    path: a COCO json; the CSV of Open Images' boxes; a folder of VOC xml or YOLO txt files, which may lie in folders
    below; or the root of an export (`parts.py`). images: the folder of the images, where it is not known by the
    layout. split: the one to read.
    Raises FileNotFoundError when there is none of them, ValueError when nothing in one can be used.
    """
    parts = find_parts(path, images, split)
    names = [part.name for part in parts]
    if split is not None and split not in names:
        known = ", ".join(filter(None, names)) or "none that has a name"
        raise ValueError(f"{path}: no split {split!r} in it; there is {known}")
    chosen = [part for part in parts if split in (None, part.name)]
    # The classes of all splits count, so that one that a split lacks shifts nothing there.
    voc = {part.name: _voc_files(part) for part in parts if part.kind == "voc"}
    ids = _voc_ids(parts, list(voc.values()), reading) if voc else {}
    from_zero = [where for files in voc.values() for where in files.from_zero]
    if unlisted := _unlisted(parts):
        voc[parts[0].name].findings.append(unlisted)
    sets = {}
    for part in chosen:
        try:
            if part.kind == "voc":
                source = voc_source(voc[part.name], ids, from_zero)
            else:
                source = _SOURCES[part.kind](part, reading)
            source.findings[:0] = [Finding("absent split", part.name, what, "warning") for what in part.absent]
            sets[part.name] = coco_set(part.annotations, source, part.images, reading, progress=progress)
        except (ValueError, FileNotFoundError) as error:
            others = ", ".join(other for other in names if other != part.name)
            hint = f"; --split reads one of the others alone: {others}" if len(chosen) > 1 else ""
            raise type(error)(f"{error}{hint}") from error
    _compare(sets)
    _shared(sets)
    return sets


def read_annotations(
    path: Path, images: Path, reading: Reading = EVERYTHING, *, progress: Progress | None = None
) -> CocoSet:
    """The one set at `path`. Raises as `read_sets`, and ValueError where there are several."""
    sets = read_sets(path, images, reading, progress=progress)
    if len(sets) > 1:
        raise ValueError(f"{path}: several splits in it, {', '.join(sets)}: name one with --split")
    return next(iter(sets.values()))


def digest(path: Path) -> str:
    """The sha256 of a file, or of the names and contents of all files of a folder but its images."""
    if path.is_file():
        return file_sha256(path)
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and file.suffix.lower() not in IMAGE_SUFFIXES]
    lines = [f"{file.relative_to(path)} {file_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()


def _compare(sets: dict[str, CocoSet]) -> None:
    """Say of each split where its categories are not those of the first; it may list fewer."""
    (first, of_first), *others = sets.items()
    known = dict(zip(of_first.categories.ids, of_first.categories.names, strict=True))
    for name, of_other in others:
        for id_, category in zip(of_other.categories.ids, of_other.categories.names, strict=True):
            if known.get(id_) != category:
                what = (
                    f"{category!r} has id {id_}, which is {repr(known[id_]) if id_ in known else 'nothing'} in {first}"
                )
                of_other.findings.append(Finding("differing categories", name, what, "warning"))


def _shared(sets: dict[str, CocoSet]) -> None:
    """Say of each split which images it shares with an earlier one."""
    split_of: dict[str, str] = {}
    for name, found in sets.items():
        for image in found.images:
            file = os.path.join(found.folder, image.file_name)
            if (first := split_of.setdefault(file, name)) != name:
                what = f"is in {first or 'another split'}, too"
                found.findings.append(Finding("shared image", image.where, what, "warning"))


def _coco_source(part: Part, reading: Reading) -> Source:
    path = part.annotations
    if reading.classes is not None:
        raise ValueError(f"{path}: a COCO json has its own categories; --classes is for VOC and YOLO")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected a COCO json")
    try:
        values = parse_json(path.read_bytes(), each_key_once=True)
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); expected a COCO json") from error
    lists = {
        name: values.get(name) if isinstance(values, dict) else None for name in ("images", "annotations", "categories")
    }
    if missing := [name for name, value in lists.items() if not isinstance(value, list)]:
        raise ValueError(
            f"{path}: not a COCO json: no list {' and no list '.join(map(repr, missing))}{foreign(values)}"
        )
    return Source(lists["categories"], lists["images"] or [], lists["annotations"] or [])


def _openimages_source(part: Part, reading: Reading) -> Source:
    if reading.classes is not None:
        raise ValueError(f"{part.annotations}: Open Images has its own classes; --classes is for VOC and YOLO")
    if not part.images.is_dir():
        raise FileNotFoundError(f"{part.images}: no such folder; expected the images of {part.annotations}")
    return openimages_source(part.annotations, ImageFiles(part.images))


def _voc_files(part: Part) -> VocFiles:
    files, images = files_below(part.annotations, (".xml",)), ImageFiles(part.images)
    if part.listed is None:
        return read_voc(part.annotations, files, images)
    listed = set(part.listed)

    def is_listed(path: str) -> bool:
        return stem_of(path) in listed or stem_of(path).rpartition("/")[2] in listed

    own = [file for file in files if is_listed(file.relative_to(part.annotations).as_posix())]
    images = ImageFiles(part.images, [name for name in images.names if is_listed(name)])
    found = read_voc(part.annotations, own, images, listed=True)
    there = {stem_of(file.relative_to(part.annotations).as_posix()) for file in own} | {file.stem for file in own}
    for stem in sorted(listed - there - {stem_of(name) for name in images.names}):
        found.findings.append(Finding("missing image", part.name, f"{stem} is listed, but there is no such image"))
    return found


def _unlisted(parts: Sequence[Part]) -> Finding | None:
    """What to say of xml files that are in none of the lists of a set."""
    if not all(part.kind == "voc" and part.listed for part in parts):
        return None
    listed = {name for part in parts for name in part.listed or ()}
    listed |= {name.rpartition("/")[2] for name in listed}
    left = [file.name for folder in {part.annotations for part in parts} for file in files_below(folder, (".xml",))]
    left = sorted(name for name in left if stem_of(name) not in listed)
    what = f"{len(left)} xml files are in no list of ImageSets/Main: {', '.join(left[:3])}"
    return Finding("image left out", str(parts[0].annotations), what, "warning") if left else None


def _voc_ids(parts: Sequence[Part], files: Sequence[VocFiles], reading: Reading) -> dict[str, int]:
    told = reading.classes or next((part.classes for part in parts if part.classes), None)
    if told is None:
        return alphabetical(set().union(*(part.names for part in files)))
    classes = read_classes(told, first=1)
    ids = {name: number for number, name in classes.items()}
    if len(ids) < len(classes):
        twice = sorted(name for number, name in classes.items() if ids[name] != number)
        raise ValueError(f"{told}: the class {twice[0]!r} is in it twice")
    return ids


def _yolo_source(part: Part, reading: Reading) -> Source:
    findings: list[Finding] = []
    own = (part.classes, read_classes(part.classes, first=0), []) if part.classes else named_classes(part.annotations)
    if own is None and reading.classes is None:
        raise FileNotFoundError(
            f"{part.annotations}: the names of the classes are missing: put one of {', '.join(NAME_FILES)} "
            "into it, or name a file of them with --classes"
        )
    taken, names, others = own or (reading.classes, {}, [])
    if reading.classes is None:
        findings = [
            Finding("other names", str(file), f"it tells other classes than {taken}, which is taken", "warning")
            for file in others
        ]
    apart = {file.resolve() for file in (taken, reading.classes) if file is not None}
    files = [file for file in files_below(part.annotations, (".txt",)) if file.resolve() not in apart]
    images = ImageFiles(part.images, part.listed)
    if part.listed is not None:  # the folder holds those of other splits, too
        stems = {stem_of(name) for name in part.listed}
        stems |= set(map(label_stem, stems))
        files = [file for file in files if stem_of(file.relative_to(part.annotations).as_posix()) in stems]
    if not files:
        raise FileNotFoundError(f"{part.annotations}: no .txt file of labels for the images in {part.images}")
    told = read_classes(reading.classes, first=0) if reading.classes else names
    keypoints = keypoint_numbers(own[0]) if own else 0
    source = yolo_source(part.annotations, files, images, told, keypoints)
    if told != names and names:  # the numbers in the files are those of the set's own names
        ids = {name: number for number, name in told.items()}
        for annotation in source.annotations:
            name = names.get(annotation["category_id"], f"{annotation['category_id']}, which has no name in {taken}")
            annotation["category_id"] = ids.get(name, name)
    source.findings[:0] = findings
    return source


_SOURCES = {"coco": _coco_source, "yolo": _yolo_source, "openimages": _openimages_source}
