"""docs/images/model.svg against the code that it explains, the page that walks through it, the script that draws it."""

import ast
import importlib
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
PICTURE = DOCS / "images/model.svg"
PLACE = re.compile(r"([\w/]+\.py): ([\w.]+(?:, [\w.]+)*)(?: \(.*\))?")


def texts(style: str) -> list[str]:
    """Of all texts of a style, in the order in which they were drawn."""
    elements = ElementTree.parse(PICTURE).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()) for element in elements if style in element.get("class", "").split()]


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield prefix + node.name
            if isinstance(node, ast.ClassDef):
                yield from defined(node.body, f"{prefix}{node.name}.")


def test_every_file_and_function_in_the_picture_exists() -> None:
    places = [place for text in texts("place") for place in text.split("; ")]
    assert len(places) > 30
    for place in places:
        matched = PLACE.fullmatch(place)
        assert matched, f"{place!r} is not `file: names`"
        path = REPOSITORY / matched[1]
        assert path.is_file(), place
        names = set(defined(ast.parse(path.read_text()).body))
        assert set(matched[2].split(", ")) <= names, f"{place}: the file defines {sorted(names)}"


def test_the_parts_of_the_picture_are_the_headings_of_the_page() -> None:
    page = (DOCS / "how-it-works.md").read_text()
    headings = re.findall(r"^## (\d+)\. (.+)$", page, flags=re.MULTILINE)
    assert [(number, title) for number, title in zip(texts("badge"), texts("zone"), strict=True)] == headings
    assert "(images/model.svg)" in page


def test_texts_are_readable() -> None:
    sizes = re.findall(r"\{font:([\d.]+)px", PICTURE.read_text())
    assert sizes
    assert min(map(float, sizes)) >= 11


def test_the_check_forgives_rounding_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(DOCS))
    difference = importlib.import_module("draw_model").difference
    line = '<circle cx="10.0" cy="4.2"/>\n<text>tokens (2, 6800, 256)</text> 0.412'
    assert difference(line, line) is None
    assert difference(line.replace("4.2", "4.3").replace("0.412", "0.413"), line) is None
    assert difference(line.replace("4.2", "5.2"), line)
    assert difference(line.replace("6800", "6801"), line)
    assert difference(line.replace("0.412", "0.512"), line)
    assert difference(line + "\n", line) is None
    assert difference(line + "\nmore", line)


@pytest.mark.slow
def test_the_picture_is_what_the_script_draws() -> None:
    """The one stored, from the code as it is now: run `python docs/draw_model.py` after a change that it shows."""
    result = subprocess.run(
        [sys.executable, DOCS / "draw_model.py", "--check"], capture_output=True, text=True, timeout=600, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_the_picture_of_the_stream_is_what_the_script_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python docs/draw_stream.py` after a change of the plan or of a batch's layout."""
    monkeypatch.syspath_prepend(str(DOCS))
    stream = importlib.import_module("draw_stream")
    assert stream.PICTURE.read_text() == stream.drawing()
