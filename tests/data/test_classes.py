"""Names of classes, from every kind of file that holds them."""

import json
import re
from pathlib import Path

import pytest
from ddetr.data.classes import named_classes, read_classes

CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}]
ITEM = "item {{ id: {} name: {} }}"


@pytest.mark.parametrize(
    ("name", "text", "classes"),
    [
        ("classes.txt", "cat\n dog \n\n", {5: "cat", 6: "dog"}),
        ("set.json", json.dumps({"categories": CATEGORIES}), {3: "cat", 7: "dog"}),
        ("data.yaml", "names: [cat, dog]", {5: "cat", 6: "dog"}),
        ("data.yml", "names: {2: cat}", {2: "cat"}),
        ("labelmap.txt", "# name:colour\nbackground:0\ncat:1\ndog:2", {1: "cat", 2: "dog"}),
        ("pascal_label_map.pbtxt", ITEM.format(4, "'cat'") + ITEM.format(2, '"dog"'), {4: "cat", 2: "dog"}),
    ],
)
def test_names_are_read(name: str, text: str, classes: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert read_classes(tmp_path / name, first=5) == classes


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("classes.txt", " \n", "no names of classes in it"),
        ("classes.txt", "cat\n\ndog", "line 2 is empty, and would shift the classes after it"),
        ("set.json", "[]", "no list `categories` in it"),
        ("set.json", '{"categories": {}}', "no list `categories` in it"),
        ("set.json", "{", "Expecting"),
        ("data.yaml", "train: images", "no list `names` in it"),
        ("labelmap.txt", "# name:colour\n", "no names of classes in it"),
        ("pascal_label_map.pbtxt", ITEM.format("one", "'cat'"), "an item without an id or a name in it"),
        ("pascal_label_map.pbtxt", ITEM.format(1, "cat"), "an item without an id or a name in it"),
    ],
)
def test_a_file_without_names_is_named(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path / name}: {message}')}"):
        read_classes(tmp_path / name, first=0)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"classes.txt: no such file; expected the names of the classes"):
        read_classes(tmp_path / "classes.txt", first=0)


def test_files_that_tell_other_classes_or_none_are_told(tmp_path: Path) -> None:
    for name, text in (
        ("data.yaml", "names: [cat]"),
        ("classes.txt", "cat"),
        ("obj.names", "\n"),
        ("_darknet.labels", "dog"),
    ):
        (tmp_path / name).write_text(text)
    others = [tmp_path / "obj.names", tmp_path / "_darknet.labels"]
    assert named_classes(tmp_path) == (tmp_path / "data.yaml", {0: "cat"}, others)
