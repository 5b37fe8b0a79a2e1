"""Pascal VOC's xml: one file per image, corners in whole pixels counted from 1, the last one included.

Many programs write corners counted from 0 into the same format. A corner of 0 cannot be where the first pixel is 1.
So a set in which there is one is read as corners on the edges of pixels: x from 0 to the width.
Image ids count from 1 in the order of the files' names, category ids those of the classes in alphabetical order,
unless the set or the user tells their order. Difficult objects become crowds.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.parsers import expat

from .annotations import CROWD_FLAGS
from .findings import Finding
from .image_files import ImageFiles, stem_of
from .images import read_file
from .sets import Source
from .text import visible
from .values import as_number, described

MOST_XML_BYTES = 64 << 20
CORNERS = ("xmin", "ymin", "xmax", "ymax")


@dataclass(frozen=True)
class VocFiles:
    """What the files of one part of a set say. objects: (image id, class, corners, flags, where) each."""

    images: list[dict[str, Any]] = field(default_factory=list)
    objects: list[tuple[int, str, list[float], dict[str, str], str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def names(self) -> set[str]:
        return {name for _, name, *_ in self.objects}

    @property
    def from_zero(self) -> list[str]:
        """Where a corner is that cannot be if the first pixel is 1; one further out is a mistake of another kind."""
        return [where for _, _, (left, top, *_), _, where in self.objects if 0 <= left < 1 or 0 <= top < 1]


def read_voc(folder: Path, files: Sequence[Path], images: ImageFiles, *, listed: bool = False) -> VocFiles:
    """Read xml files in `folder`, each of one of the images. Whatever cannot be read is a finding.

    listed: the images are those that a list names, so one without an xml belongs to the set, without objects.
    """
    found = VocFiles()
    named: set[str] = set()
    for number, file in enumerate(files, 1):
        where = file.relative_to(folder)
        try:
            root = _parse_xml(read_file(file, MOST_XML_BYTES))
        except (ElementTree.ParseError, expat.ExpatError, LookupError, OSError, ValueError) as error:
            found.findings.append(Finding("bad entry", str(where), str(error)))
            continue
        if root.tag.lower() != "annotation":
            is_one = any(element.tag.lower() in ("object", "bndbox", "box") for element in root.iter())
            what = f"its root is <{visible(root.tag)}>, not <annotation>"
            kind = "bad entry" if is_one else "foreign file"
            found.findings.append(Finding(kind, str(where), what, "error" if is_one else "warning"))
            continue
        name = _image_name(root.findtext("filename"), where, images, found.findings)
        if name is None:
            continue
        named.add(name)
        size = root.find("size")
        sides = {side: _text(size, side) or None for side in ("height", "width")}
        found.images.append({"id": number, "file_name": name, **sides})
        found.findings.extend(Finding("bad entry", str(where), what) for what in _unread(root))
        for row, entry in enumerate(root.iter("object"), 1):
            label, box = _text(entry, "name"), entry.find("bndbox")
            corners = {corner: as_number(_text(box, corner)) for corner in CORNERS}
            wrong = [corner for corner, value in corners.items() if value is None] + ([] if label else ["name"])
            if wrong:
                texts = (_text(entry if tag == "name" else box, tag) for tag in wrong)
                shown = ", ".join(f"<{tag}> is {described(text)}" for tag, text in zip(wrong, texts, strict=True))
                found.findings.append(Finding("bad entry", f"{where}, object {row}", shown))
                continue
            numbers = [value for value in corners.values() if value is not None]
            flags = {flag: _text(entry, flag) for flag in CROWD_FLAGS if entry.find(flag) is not None}
            found.objects.append((number, label, numbers, flags, f"{where}, object {row}"))
    unnamed = sorted(set(images.names) - named)
    if unnamed and found.images:
        what = f"{len(unnamed)} of {len(images.names)} images have no xml: {', '.join(unnamed[:3])}"
        kind = "image without labels" if listed else "image left out"
        found.findings.append(Finding(kind, str(images.folder), what, "warning"))
    for number, name in enumerate(unnamed if listed else (), len(files) + 1):
        found.images.append({"id": number, "file_name": name})
    return found


def voc_source(files: VocFiles, ids: Mapping[str, int], from_zero: Sequence[str]) -> Source:
    """Objects of xml files as entries of a COCO json. ids: name -> category id. from_zero: `VocFiles.from_zero`."""
    findings = list(files.findings)
    if from_zero and files.objects:
        what = f"a corner of {from_zero[0]} is 0 ({len(from_zero)} objects): all are read as edges of pixels, from 0"
        findings.append(Finding("pixels counted from 0", f"{len(files.objects)} boxes", what, "warning"))
    first, last = (0, 0) if from_zero else (1, 1)  # what is taken from the first corner, and the last pixel's own width
    annotations = []
    for number, (image_id, name, (left, top, right, bottom), flags, _) in enumerate(files.objects, 1):
        bbox = [left - first, top - first, right - left + last, bottom - top + last]
        category = ids.get(name, name)
        annotations.append({"id": number, "image_id": image_id, "category_id": category, "bbox": bbox, **flags})
    places = [where for *_, where in files.objects]
    return Source(categories_of(ids), files.images, annotations, findings, places, from_corners=True, shown=True)


def alphabetical(names: Iterable[str]) -> dict[str, int]:
    """Ids from 1, as VOC's own classes have them."""
    return {name: number for number, name in enumerate(sorted(names), 1)}


def categories_of(ids: Mapping[str, int]) -> list[dict[str, Any]]:
    return [{"id": number, "name": name} for name, number in ids.items()]


def _image_name(stated: str | None, where: Path, images: ImageFiles, findings: list[Finding]) -> str | None:
    """The image that an xml file belongs to: the one it names, else the one that is called as it is itself."""
    stated = (stated or "").strip().replace("\\", "/")
    own = images.called(stem_of(where.as_posix()))
    named = images.exactly(stated, where.parent.as_posix()) if stated else None
    if named and own and named not in own:
        what = f"<filename> is {named}, but {own[0]} has the name of the xml file"
        findings.append(Finding("ambiguous image", str(where), what))
        return None
    if named:
        return named
    if ".." in Path(stated).parts or Path(stated).is_absolute():
        own = own or [stated]  # for the finding that says where it would lead
    candidates = own or (images.called(stem_of(stated)) if stated else [])
    if len(candidates) > 1:
        what = f"it may be of {', '.join(candidates[:3])}"
        findings.append(Finding("ambiguous image", str(where), what))
        return None
    if not candidates:
        return stated or f"{stem_of(where.as_posix())}.jpg"  # a missing image, by the name that is stated
    if stated and Path(stated).suffix and stem_of(Path(stated).name) != stem_of(Path(candidates[0]).name):
        what = f"<filename> {stated} is not there; taken: {candidates[0]}"
        findings.append(Finding("other file name", str(where), what, "warning"))
    return candidates[0]


def _unread(root: ElementTree.Element) -> Iterator[str]:
    """What of a file is a box, but stands where none is read."""
    above = {child: element for element in root.iter() for child in element}
    for element in root.iter():
        if element.tag.lower() == "xmin" and element in above:
            box = above[element]
            holder = above.get(box, box)
            if holder.tag not in ("object", "part"):
                yield f"<{visible(holder.tag)}><{visible(box.tag)}> with a box: needs to be <object><bndbox>"
            elif len(holder.findall("bndbox")) > 1 and box is not holder.find("bndbox"):
                yield f"<{visible(holder.tag)}> with two <bndbox>: which is meant?"


def _parse_xml(data: bytes) -> ElementTree.Element:
    """Raises ValueError for a document that declares a type: only that can define entities, and VOC needs neither."""

    def refuse(name: str, *_: object) -> None:
        raise ValueError("it has a <!DOCTYPE>, which may define entities without end; take it out")

    # Looked at first, because ElementTree's parser does not let itself be told.
    parser = expat.ParserCreate()
    parser.StartDoctypeDeclHandler = refuse
    parser.Parse(data, True)
    root = ElementTree.fromstring(data)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # a namespace changes nothing
    return root


def _text(element: ElementTree.Element | None, tag: str) -> str:
    return ((element.findtext(tag) if element is not None else None) or "").strip()
