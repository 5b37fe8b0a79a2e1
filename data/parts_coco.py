"""The parts of a set in COCO's format: its json files, and the folder of images that each is of."""

import codecs
import contextlib
import mmap
import re
import unicodedata
from collections import Counter
from itertools import islice
from pathlib import Path

from .documents import parse_json
from .image_files import files_below, folders_in, is_split
from .images import read_file
from .sets import Part
from .text import visible

_HEAD_BYTES = 4096  # blanks before a json
_DEEPEST = 3  # folders below the root in which its json files may be
_FILE_NAME, _URL = (re.compile(rb'"%s"\s*:\s*("(?:[^"\\]|\\.){1,4000}")' % key) for key in (b"file_name", b"coco_url"))
_LISTS = [re.compile(rb'"%s"\s*:\s*\[' % name) for name in (b"images", b"annotations")]
_FIRST_IMAGES = 8  # that are looked for; some may be missing
MOST_LOOKED_AT_BYTES = 16 << 20  # of a json that is none of COCO's
_PREFIX = re.compile(r"^_?(instances|annotations|labels|result|coco|dataset|data)(?=[._-]|$)[._-]?(coco(?=[._-]|$))?")
# What COCO's format holds beside boxes, of the same images: skipped beside a file of the same name with the boxes.
_BESIDE = re.compile(r"(captions|person_keypoints|stuff|panoptic|image_info|labels)_(.*)")


def coco_parts(root: Path, images: Path | None, split: str | None = None) -> list[Part]:
    """The splits of a set in COCO's format below `root`; none if there is no COCO json.

    images: their folder, if given. split: the only one whose images are looked for. Raises ValueError for a json that
    is called like that of a split and is broken.
    """
    files = [file for file in files_below(root, (".json",)) if len(file.relative_to(root).parts) <= _DEEPEST + 1]
    files = [file for file in files if len(file.relative_to(root).parts) <= 2 or _is_of_split(file)]
    documents = [file for file in files if _is_coco(file)]
    if not documents:
        return []
    known = set(documents)
    for file in files:
        if file not in known and _is_of_split(file) and not (_is_plain(file) and _is_other_json(file)):
            raise ValueError(
                f"{file}: no COCO json, though it is called like that of a split; mend it, or move it away"
            )
    of_boxes = {file.parent for file in documents if file.name.startswith("instances")}
    documents = [file for file in documents if file.parent not in of_boxes or not _BESIDE.fullmatch(file.stem)]
    names = [_name(root, file, len(documents) > 1) for file in documents]
    twice = {name for name, count in Counter(names).items() if count > 1}
    if twice:
        full = ("_".join(file.relative_to(root).with_suffix("").parts) for file in documents)
        names = [path if name in twice else name for name, path in zip(names, full, strict=True)]
    folders = [] if images else _folders_below(root)
    return [
        Part(name, "coco", file, images or (root if split not in (None, name) else _images(root, file, folders)))
        for name, file in zip(names, documents, strict=True)
    ]


def lone_coco(file: Path) -> Part:
    """A COCO json whose images are near it.

    Raises FileNotFoundError without the file, ValueError when it names images and none of the first is near it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; expected a COCO json, or a folder")
    root = file.parent.parent if file.parent.name == "annotations" else file.parent
    return Part("", "coco", file, _images(root, file, _folders_below(root), required=True))


def _is_of_split(file: Path) -> bool:
    return file.name.startswith(("instances", "_annotations")) or _is_plain(file)


def _is_plain(file: Path) -> bool:
    return is_split(_PREFIX.sub("", file.stem))


def _is_other_json(file: Path) -> bool:
    """Whether it is whole, so that it is of another kind, rather than a broken one of COCO's."""
    try:
        return bool(parse_json(read_file(file, MOST_LOOKED_AT_BYTES)))
    except ValueError:
        return False


def _name(root: Path, file: Path, one_of_several: bool) -> str:
    """The split that a json is of: its own name, or that of its folder."""
    name = _PREFIX.sub("", file.stem).strip("._- ")
    folders = [part for part in file.relative_to(root).parent.parts if part != "annotations"]
    if not folders and not one_of_several and not is_split(name):
        return ""
    if folders and name.lower() == folders[-1].lower():
        name = ""
    return "_".join([*folders, name] if name else folders) or (file.stem.strip("._- ") if one_of_several else "")


def _images(root: Path, file: Path, folders: list[Path], *, required: bool = False) -> Path:
    """The folder, of those below the root, in which the first images of a json are.

    Several may hold images of these names. Right is one in the branch of the json itself, then one called like its
    split; one called like another split is wrong. Raises ValueError where several remain, or that alone; and where
    there is none, if `required`, else the images are said to be missing one by one. A json that names no image is
    refused for what it is when it is read.
    """
    split = _PREFIX.sub("", file.stem).strip("._- ").lower()
    own = _family(file.stem) or _family(file.parent.relative_to(root).as_posix())
    names = _first_file_names(file)
    for image in names:
        last = image.rpartition("/")[2]
        forms = [image, unicodedata.normalize("NFC", image), unicodedata.normalize("NFD", image)]
        elsewhere = image.startswith("/") or ":" in image or ".." in image.split("/")
        for name in [last] if elsewhere else dict.fromkeys(forms):
            found = [place for place in folders if name and _is_file(place / name)]
            for branch in [branch for branch in file.parents if branch != root and branch.is_relative_to(root)]:
                if inside := [place for place in found if place.is_relative_to(branch)]:
                    found = inside
                    break
            if own and found:
                families = {place: _family(place.relative_to(root).as_posix()) for place in found}
                right = [place for place in found if families[place] == own]
                right = right or [place for place in found if families[place] is None]
                if not right:
                    raise ValueError(
                        f"{file}: {visible(name)} is in {found[0]} alone, which is called like another split: name the "
                        "folder of its images after it, IMAGES"
                    )
                found = right
            found = [place for place in found if split and place.name.lower() == split] or found
            found = [place for place in (file.parent, root / "images", root) if place in found][:1] or found
            if len(found) > 1:
                places = ", ".join(str(place.relative_to(root)) for place in found[:3])
                raise ValueError(
                    f"{file}: {visible(name)} is in {places}: name the folder of its images after it, IMAGES"
                )
            if found:
                return found[0]
    if required and names:
        raise ValueError(f"{file}: none of its first images is near it: name the folder of its images after it, IMAGES")
    return next(place for place in (root / "images", root) if place.is_dir())


def _family(text: str) -> str | None:
    """train, val or test, whichever a path is called like."""
    found = re.findall(r"(?<![a-z])(trainval|train|val|dev|test)", text.lower())
    return {"trainval": None, "dev": "val"}.get(found[-1], found[-1]) if found else None


def _folders_below(root: Path) -> list[Path]:
    """With the root, by name, as far as an export is deep; hidden ones hold copies."""
    folders = [root]
    level = [root]
    for _ in range(_DEEPEST + 1):
        level = [folder for place in level for folder in folders_in(place)]
        folders += level
    return folders


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
            text = data[:].replace(b"\0", b"")
            return all(name.search(text) for name in _LISTS)
        head = data[:_HEAD_BYTES].lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        return head == b"{" and all(name.search(data) for name in _LISTS)


def _first_file_names(file: Path) -> list[str]:
    """Of the first image entries, wherever in a file of gigabytes they are."""
    if not file.stat().st_size:
        return []
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        texts = [match[1] for match in islice(_FILE_NAME.finditer(data), _FIRST_IMAGES)]
        urls = [] if texts else [match[1] for match in islice(_URL.finditer(data), _FIRST_IMAGES)]  # LVIS v1
    names = []
    for text in (*texts, *urls):
        with contextlib.suppress(ValueError):  # the json is broken, and refused when it is read
            name = str(parse_json(text)).replace("\\", "/")
            parts = name.split("/") if urls else []
            names += ["/".join(parts[-2:]), parts[-1]] if urls else [name]
    return names
