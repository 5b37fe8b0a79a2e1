"""The files of a set by their names: which image belongs to which annotations, whatever the case of suffixes."""

import functools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

# What programs call the parts of a set.
SPLITS = ("train", "training", "trainval", "val", "valid", "validation", "dev", "test", "testing", "default")
_SPLIT = re.compile(rf"({'|'.join(SPLITS)})([0-9_. -].*)?", re.IGNORECASE)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".jp2", ".avif", ".tga"}


def files_below(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """Files, links and pipes of a folder and those below, by name; suffixes in lower case, of names in any case."""
    wanted = set(suffixes)
    return sorted(path for path in _below(folder) if path.suffix.lower() in wanted)


def is_split(name: str) -> bool:
    """Whether a folder or list is called like a split: `train`, `Val2017`, `test_small`."""
    return _SPLIT.fullmatch(name) is not None


def stem_of(name: str) -> str:
    """A path's text without the suffix."""
    return str(PurePosixPath(name).with_suffix("")) if PurePosixPath(name).name else name


def label_stem(stem: str) -> str:
    """Where YOLO's labels of the image at a path without suffix are: .../labels/... for .../images/..."""
    parts = list(PurePosixPath(stem).parts)
    for position in reversed(range(len(parts) - 1)):
        if parts[position].lower() == "images":
            name = "labels" if parts[position] == "images" else "Labels"
            return str(PurePosixPath(*parts[:position], name, *parts[position + 1 :]))
    return stem


def plain(name: str) -> str:
    """A name in one normal form of Unicode (NFC): macOS unpacks archives into another one."""
    return unicodedata.normalize("NFC", name)


class ImageFiles:
    """The image files in a folder, by their names relative to it, with and without suffix."""

    def __init__(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """names: of those that belong to the set; all image files of the folder if not given."""
        self.folder = folder
        if names is None:
            names = (path.relative_to(folder).as_posix() for path in files_below(folder, IMAGE_SUFFIXES))
        self.names = sorted(names)
        self._known = {plain(name).lower(): name for name in self.names}
        self._by_path: dict[str, list[str]] = {}
        self._by_stem: dict[str, list[str]] = {}
        for name in self.names:
            self._by_path.setdefault(plain(stem_of(name)), []).append(name)
            self._by_stem.setdefault(plain(stem_of(PurePosixPath(name).name)), []).append(name)

    def exactly(self, name: str, beside: str = "") -> str | None:
        """The image of this name, or of its last part in the folder `beside`, or in this one; suffixes in any case."""
        last = PurePosixPath(name).name
        for place in (name, str(PurePosixPath(beside, last)), last):
            found = self._known.get(plain(place).lower())
            if found and plain(stem_of(found)) == plain(stem_of(place)):
                return found
        return None

    def called(self, path: str) -> list[str]:
        """The images at this path without suffix; else those of its last part as their name, if one of both is flat."""
        if found := self._by_path.get(plain(path)):
            return found
        alike = self._by_stem.get(plain(PurePosixPath(path).name), [])
        # Of two folders called differently neither stands for the other; one of them may be flat.
        return [name for name in alike if "/" not in path or "/" not in name]


def is_inside(root: Path, place: Path) -> bool:
    """Whether there is something at a path that a file told, and within the folder that the user named."""
    try:
        return place.exists() and place.resolve().is_relative_to(_resolved(root))
    except (OSError, ValueError):  # a name that no file can have
        return False


@functools.lru_cache(maxsize=16)
def _resolved(root: Path) -> Path:
    return root.resolve()


def folders_in(root: Path) -> list[Path]:
    """The folders of a folder itself, by name, as `files_below` sees them."""
    with os.scandir(root) as entries:  # which knows a folder without asking about each of many images
        names = [entry.name for entry in entries if not entry.name.startswith((".", "__")) and entry.is_dir()]
    return [root / name for name in sorted(names)]


def files_in(root: Path) -> list[Path]:
    """The files of a folder itself, by name."""
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file()]
    return [root / name for name in sorted(names)]


def _below(folder: Path) -> Iterator[Path]:
    """Without those of hidden folders, and without what macOS puts beside each file of an archive."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        yield from (Path(place, name) for name in names if not name.startswith("._"))
