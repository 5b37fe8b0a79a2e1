"""YOLO's txt files: one file per image, one row per object: its class, then centre, width and height.

All four are shares of the picture as a viewer shows it, because programs that read such files open images so. Rows of
other kinds are read as boxes too, with a finding: an outline (class, x, y, x, y, ...) as the smallest box around it, a
fifth number as the confidence of a detector. If a data.yaml has `kpt_shape`, keypoints follow the box.
Image ids count from 1 in the order of the images' names; category ids are the numbers in the files.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .annotations import outline_corners
from .documents import decoded
from .findings import Finding
from .image_files import ImageFiles, label_stem, plain, stem_of
from .images import read_file
from .sets import Source
from .values import as_number, as_whole

MOST_LABELS_BYTES = 64 << 20
# Text files beside labels that are none: lists of images, names, and what exporters write for people to read.
NO_LABELS = re.compile(
    r"(readme|license|notice|changelog|requirements|classes|labels|labelmap|predefined_classes|train|trainval|val|valid|"
    r"validation|test|default)(\.[^.]+)*\.txt",
    re.IGNORECASE,
)
_OVERDRAWN = 0.05  # by which an outline may leave the picture; visibilities of keypoints are 2
_MOST_SHARE = 2.0  # beyond it, a number is no share of a picture that a box could overhang


@dataclass
class _Rows:
    """The rows of all files as entries of a COCO json, and what of them is not as it should be."""

    annotations: list[dict[str, Any]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    keypoints: int = 0  # numbers of a row after its box


def yolo_source(
    folder: Path, files: Sequence[Path], images: ImageFiles, names: Mapping[int, str], keypoints: int = 0
) -> Source:
    """Label files in `folder` as entries of a COCO json. names: by the classes' numbers. keypoints: numbers of a row
    after its box. Whatever cannot be read is a finding."""
    rows = _Rows(keypoints=keypoints)
    labels: dict[str, list[Path]] = {}
    for file in files:
        labels.setdefault(plain(stem_of(file.relative_to(folder).as_posix())), []).append(file)
    of_stem: dict[str, list[str]] = {}
    for name in images.names:
        of_stem.setdefault(plain(stem_of(name)), []).append(name)
    entries = []
    unlabelled = []
    for number, name in enumerate(images.names, 1):
        stem = plain(stem_of(name))
        own = labels.get(stem) or labels.get(label_stem(stem), [])
        if own and len(of_stem[stem]) > 1:
            what = f"its labels may be of {' or '.join(of_stem[stem])}"
        elif len(own) > 1:
            what = f"its labels may be in {' or '.join(file.name for file in own)}"
        else:
            entries.append({"id": number, "file_name": name})
            if own:
                _read_rows(own[0], str(own[0].relative_to(folder)), number, rows)
            else:
                unlabelled.append(name)
            continue
        rows.findings.append(Finding("ambiguous image", f"image {number} ({name})", what))
    taken = {*of_stem, *map(label_stem, of_stem)}
    for stem, alike in sorted(labels.items()):
        for file in alike if stem not in taken else ():
            finding = _of_no_image(file, str(file.relative_to(folder)), images.folder)
            rows.findings += [finding] if finding else []
    if len(unlabelled) == len(images.names):
        raise ValueError(f"{folder}: no .txt file of labels in it is called like one of the images in {images.folder}")
    if unlabelled:
        shown = ", ".join(unlabelled[:3])
        what = f"{len(unlabelled)} of {len(images.names)} images have no file of labels in {folder}: {shown}"
        rows.findings.append(Finding("image without labels", str(images.folder), what, "warning"))
    categories = [{"id": number, "name": name} for number, name in names.items()]
    return Source(categories, entries, rows.annotations, rows.findings, rows.places, relative=True, shown=True)


def _read_rows(file: Path, where: str, image_id: int, rows: _Rows) -> None:
    try:
        lines = decoded(read_file(file, MOST_LABELS_BYTES)).split("\n")
    except (OSError, ValueError) as error:
        rows.findings.append(Finding("bad entry", where, str(error)))
        return
    for row, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{where}, line {row}"
        label, *texts = line.split()
        values = [as_number(text) for text in texts]
        numbers = [value for value in values if value is not None]
        category_id = as_whole(label)
        bbox = None if category_id is None or len(numbers) < len(texts) else _bbox(numbers, place, rows)
        if bbox is None:
            what = f"needs a class and four numbers from 0 to 1, or an outline; keypoints need kpt_shape: {line[:80]!r}"
            rows.findings.append(Finding("bad entry", place, what))
            continue
        annotation_id = len(rows.annotations) + 1
        rows.places.append(place)
        rows.annotations.append({"id": annotation_id, "image_id": image_id, "category_id": category_id, "bbox": bbox})


def _bbox(numbers: list[float], where: str, rows: _Rows) -> list[float] | None:
    """(x, y, width, height) in shares of the picture, or None for a row of no known kind."""
    if any(abs(number) > _MOST_SHARE for number in numbers[:4]):
        return None
    if len(numbers) == 5 and 0 <= numbers[4] <= 1:
        what = f"a fifth number, {numbers[4]:g}: taken for a confidence, left out"
        rows.findings.append(Finding("confidence in a label", where, what, "warning"))
    elif len(numbers) >= 6 and len(numbers) != 4 + rows.keypoints:
        corners = outline_corners([numbers])
        if corners is None or not all(-_OVERDRAWN <= corner <= 1 + _OVERDRAWN for corner in corners):
            return None
        left, top, right, bottom = corners
        what = f"{len(numbers) // 2} points: taken for an outline, as the smallest box around it"
        rows.findings.append(Finding("outline as box", where, what, "warning"))
        return [left, top, right - left, bottom - top]
    elif len(numbers) not in (4, 4 + rows.keypoints):
        return None
    x, y, width, height = numbers[:4]
    return [x - width / 2, y - height / 2, width, height]


def _of_no_image(file: Path, where: str, folder: Path) -> Finding | None:
    """What to say of a text file that no image is called like."""
    if NO_LABELS.fullmatch(file.name):
        return None
    try:
        lines = decoded(read_file(file, MOST_LABELS_BYTES)).split("\n")
        lines = [line for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        return Finding("foreign file", where, f"no image of that name in {folder}, and no labels: {error}", "warning")
    if all(len(line.split()) >= 5 and None not in map(as_number, line.split()) for line in lines):
        what = f"no image of that name in {folder}, for {len(lines)} objects"
        return Finding("unknown image", where, what, "error" if lines else "warning")
    return Finding("foreign file", where, f"no image of that name in {folder}, and no labels in it", "warning")
