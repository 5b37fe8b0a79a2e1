"""Class names of a set, read from the files in which programs keep them: id -> name."""

import re
from pathlib import Path
from typing import Any

from .categories import Categories
from .documents import decoded, parse_json, parse_yaml
from .image_files import files_in
from .images import read_file
from .index import ShardIndex
from .values import MOST_ID, as_whole, described

MOST_NAMES_BYTES = 4 << 20  # of a file of names
YAML_FILES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
TEXT_FILES = ("classes.txt", "obj.names", "_darknet.labels")
NAME_FILES = (*YAML_FILES, *TEXT_FILES)
LABEL_MAPS = ("labelmap.txt", "pascal_label_map.pbtxt")  # of CVAT and of VoTT, beside VOC files
_ITEM = re.compile(r"item\s*\{([^}]*)\}")
_ITEM_ID = re.compile(r"\bid\s*:\s*([0-9]+)")
_ITEM_NAME = re.compile(r"\bname\s*:\s*(?:'([^'\n]*)'|\"([^\"\n]*)\")")


def read_classes(path: Path, first: int) -> dict[int, str]:
    """Read class names from a file with one in a line, a data.yaml, CVAT's or VoTT's label map, a COCO json or shards.

    first: the id of the first name of a plain list. Raises FileNotFoundError without the file, and ValueError, naming
    it, for one that holds no names.
    """
    if path.is_dir():
        categories = ShardIndex.read(path).categories
        return dict(zip(categories.ids, categories.names, strict=True))
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the names of the classes")
    try:
        if path.suffix.lower() == ".json":
            values = parse_json(read_file(path))
            listed = values.get("categories") if isinstance(values, dict) else None
            if not isinstance(listed, list):
                raise ValueError("no list `categories` in it")
            categories = Categories.from_coco(listed)
            return dict(zip(categories.ids, categories.names, strict=True))
        text = decoded(read_file(path, MOST_NAMES_BYTES))
        if path.suffix.lower() in (".yaml", ".yml"):
            return yaml_classes(parse_yaml(text, texts=True), first)
        if path.name in LABEL_MAPS:
            return _label_map(text)
        return dict(enumerate(_lines(text), first))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error


def yaml_classes(values: Any, first: int) -> dict[int, str]:
    """`names` of a data.yaml whose values are all text, checked against its `nc`. Raises ValueError."""
    names = values.get("names") if isinstance(values, dict) else None
    if not isinstance(names, list | dict):
        raise ValueError("no list `names` in it")
    found: dict[int, str] = {}
    for key, name in enumerate(names, first) if isinstance(names, list) else names.items():
        number = as_whole(key, -MOST_ID)
        if number is None or not isinstance(name, str) or name in ("", "~"):
            raise ValueError(f"`names` holds {described(name)} as {described(key)}: each needs a number and a text")
        found[number] = name
    if "nc" in values and as_whole(values["nc"]) != len(found):
        raise ValueError(
            f"nc is {described(values['nc'])}, but `names` has {len(found)}: correct the one that is wrong"
        )
    return found


def keypoint_numbers(file: Path) -> int:
    """How many numbers of keypoints follow a box in YOLO's rows, by the `kpt_shape` of a data.yaml read before."""
    if file.suffix.lower() not in (".yaml", ".yml"):
        return 0
    shape = parse_yaml(decoded(read_file(file, MOST_NAMES_BYTES)), texts=True).get("kpt_shape")
    sides = [as_whole(side, 1, 10_000) for side in shape] if isinstance(shape, list) else []
    return (sides[0] or 0) * (sides[1] or 0) if len(sides) == 2 else 0


def named_classes(folder: Path) -> tuple[Path, dict[int, str], list[Path]] | None:
    """YOLO's names from one of NAME_FILES in the folder or up to two above: (file, id -> name, files that differ).

    A data.yaml, wherever it is, comes before a classes.txt, which drawing programs leave lying about.
    Raises ValueError as `read_classes`.
    """
    places = (folder, *list(folder.resolve().parents)[:2])
    called = {place: {file.name.lower(): file for file in files_in(place)} for place in places if place.is_dir()}
    files = [
        called[place][name]
        for names in (YAML_FILES, TEXT_FILES)
        for place in called
        for name in names
        if name in called[place]
    ]
    if not files:
        return None
    names = read_classes(files[0], first=0)
    return files[0], names, [file for file in files[1:] if not _tells(file, names)]


def _tells(file: Path, names: dict[int, str]) -> bool:
    try:
        return read_classes(file, first=0) == names
    except ValueError:
        return False


def _lines(text: str) -> list[str]:
    if not text.strip():
        raise ValueError("no names of classes in it")
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if "" in lines:
        raise ValueError(f"line {lines.index('') + 1} is empty, and would shift the classes after it: take it out")
    return lines


def _label_map(text: str) -> dict[int, str]:
    """The background is no class; with or without it the others are numbered from 1, as VOC has it."""
    if items := _ITEM.findall(text):
        pairs = [(_ITEM_ID.search(item), _ITEM_NAME.search(item)) for item in items]
        if not all(number and name for number, name in pairs):
            raise ValueError("an item without an id or a name in it")
        return {int(number[1]): name[1] or name[2] for number, name in pairs if number and name}
    lines = [line.strip() for line in text.splitlines()]
    names = [line.partition(":")[0] for line in lines if line and not line.startswith("#")]
    if not names:
        raise ValueError("no names of classes in it")
    return dict(enumerate((name for name in names if name != "background"), 1))
