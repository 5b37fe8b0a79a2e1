"""One table of ways in which people's programs write annotations, and what must come out of each.

A row is a `Case`: the files of a set, and either the boxes that it means and the findings worth a word, or the message
that refuses it. To add one, append a row; `test_annotation_cases.py` reads it, checks it and packs it.
Images are named in a set's files by their sizes alone: `picture(100, 80)` is 100 pixels wide and 80 high.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from ddetr.data.sets import Reading
from PIL import Image

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """files: path -> text or bytes. path, images: what the user names of them; "" is the folder of them all.

    boxes: image -> (class, x, y, width, height) each in pixels of the picture, crowds after a "*". findings: kind ->
    how many; with an error among them nothing is packed. message: what refuses it as a whole instead, a regex.
    """

    name: str
    files: Mapping[str, str | bytes]
    boxes: Mapping[str, Sequence[tuple[Any, ...]]] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    message: str = ""
    path: str = ""
    images: str | None = None
    reading: Reading = field(default_factory=lambda: Reading(workers=1))
    drop_degenerate: bool = False


def picture(width: int, height: int, format: str = "PNG", orientation: int = 1) -> bytes:
    """Noise of a fixed seed. orientation: of EXIF; the pixels are stored as (width, height)."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **({"exif": exif} if orientation != 1 else {}))
    return file.getvalue()


def deep(numbers: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, format)
    return file.getvalue()


A, B = picture(100, 80), picture(60, 90)
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0}
IMAGE_A = {"id": 1, "file_name": "a.png", "width": 100, "height": 80}
IMAGE_B = {"id": 2, "file_name": "b.png", "width": 60, "height": 90}
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
CAT = ("cat", 10, 20, 30, 40)


def coco(
    annotations: Sequence[Any] = (BOX,),
    images: Sequence[Any] = (IMAGE_A,),
    categories: Any = CATEGORIES,
    files: Mapping[str, str | bytes] | None = None,
) -> dict[str, str | bytes]:
    values = {"images": list(images), "annotations": list(annotations), "categories": categories}
    return {"instances.json": json.dumps(values), "a.png": A, "b.png": B, **(files or {})}


def changed(**values: Any) -> dict[str, Any]:
    return {**BOX, **values}


def without(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


def xml(
    *objects: str, filename: str | None = "a.png", size: str = "<width>100</width><height>80</height>", head: str = ""
) -> str:
    name = "" if filename is None else f"<filename>{escape(filename)}</filename>"
    return f"{head}<annotation>{name}<size>{size}</size>{''.join(objects)}</annotation>"


def entry(name: str = "cat", corners: Sequence[Any] = (11, 21, 40, 60), more: str = "", box: str = "bndbox") -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{escape(name)}</name>{more}<{box}>{sides}</{box}></object>"


ROW = "0 0.25 0.5 0.3 0.5\n"  # ("cat", 10, 20, 30, 40) of 100 x 80
YAML = "train: images\nval: images\nnames: [cat, dog]\n"


def yolo(
    rows: str | bytes = ROW, names: str | bytes = YAML, files: Mapping[str, str | bytes] | None = None
) -> dict[str, str | bytes]:
    return {"data.yaml": names, "images/a.png": A, "labels/a.txt": rows, **(files or {})}


ONE = {"a.png": [CAT]}

TYPES = [
    Case("as COCO has it", coco(), ONE),
    Case("iscrowd is the text 0", coco([changed(iscrowd="0")]), ONE),
    Case(
        "iscrowd is the text 1",
        coco([BOX, changed(id=2, iscrowd="1")]),
        {"a.png": [CAT, ("cat*", *CAT[1:])]},
        {"repeated box": 1},
    ),
    Case(
        "iscrowd is true",
        coco([BOX, changed(id=2, bbox=[1, 1, 5, 5], area=25, iscrowd=True)]),
        {"a.png": [CAT, ("cat*", 1, 1, 5, 5)]},
    ),
    Case("iscrowd is null", coco([changed(iscrowd=None)]), ONE),
    Case("iscrowd is missing", coco([without(BOX, "iscrowd")]), ONE),
    Case("iscrowd is 2", coco([BOX, changed(id=2, iscrowd=2)]), ONE, {"bad entry": 1}),
    Case("iscrowd is a list", coco([BOX, changed(id=2, iscrowd=[])]), ONE, {"bad entry": 1}),
    Case("a bbox of texts", coco([changed(bbox=["10", "20.0", " 30 ", "4e1"])]), ONE),
    Case(
        "a bbox of text with a comma",
        coco([BOX, changed(id=2, bbox=["1,5", "2", "3", "4"])]),
        ONE,
        {"impossible box": 1},
    ),
    Case(
        "a bbox of hexadecimal text",
        coco([BOX, changed(id=2, bbox=["0x1", "2", "3", "4"])]),
        ONE,
        {"impossible box": 1},
    ),
    Case("a bbox of true", coco([BOX, changed(id=2, bbox=[True, 2, 3, 4])]), ONE, {"impossible box": 1}),
    Case("a bbox of nan", coco([BOX, changed(id=2, bbox=[NAN, 2, 3, 4])]), ONE, {"impossible box": 1}),
    Case("a bbox beyond float", coco([BOX, changed(id=2, bbox=["1e999", 2, 3, 4])]), ONE, {"impossible box": 1}),
    Case("a bbox of five numbers", coco([BOX, changed(id=2, bbox=[1, 2, 3, 4, 5])]), ONE, {"impossible box": 1}),
    Case("a bbox of null", coco([BOX, changed(id=2, bbox=None)]), ONE, {"impossible box": 1}),
    Case(
        "no bbox but an outline",
        coco([without(changed(segmentation=[[10, 20, 40, 20, 40, 60, 10, 60]]), "bbox")]),
        ONE,
        {"outline as box": 1},
    ),
    Case(
        "an empty bbox beside two outlines",
        coco([changed(bbox=[], segmentation=[[10, 20, 20, 20, 20, 30], [39, 59, 40, 60, 30, 50]])]),
        ONE,
        {"outline as box": 1},
    ),
    Case(
        "ids are texts",
        coco(
            [changed(id="1", image_id="1", category_id="1")],
            [{**IMAGE_A, "id": "1"}],
            [{"id": "1", "name": "cat"}, {"id": "2", "name": "dog"}],
        ),
        ONE,
    ),
    Case(
        "ids are floats",
        coco([changed(id=1.0, image_id=1.0, category_id=1.0)], [{**IMAGE_A, "id": 1.0}], [{"id": 1.0, "name": "cat"}]),
        ONE,
    ),
    Case("ids with leading zeros", coco([changed(image_id="000001")], [{**IMAGE_A, "id": "000001"}]), ONE),
    Case("sizes are texts", coco(images=[{**IMAGE_A, "width": "100", "height": "80.0"}]), ONE),
    Case("an id that is a name", coco([BOX, changed(id="one")]), ONE, {"bad entry": 1}),
    Case(
        "an image's id that is a name",
        coco([BOX, changed(id=2, image_id="b")], [IMAGE_A, {**IMAGE_B, "id": "b"}]),
        ONE,
        {"bad entry": 1},
    ),
    Case("an id of half", coco([BOX, changed(id=1.5)]), ONE, {"bad entry": 1}),
    Case("an id beyond 64 bits", coco([BOX, changed(id=2**63)]), ONE, {"bad entry": 1}),
    Case("an image's id beyond 64 bits", coco(images=[IMAGE_A, {**IMAGE_B, "id": 2**63}]), ONE, {"bad entry": 1}),
    Case("a category's id is null", coco([BOX, changed(id=2, category_id=None)]), ONE, {"unknown category": 1}),
    Case("a category without a name", coco(categories=[{"id": 1, "name": "cat"}, {"id": 2}]), ONE),
    Case(
        "a category's name is a number",
        coco([changed(category_id=2)], categories=[{"id": 2, "name": 7}]),
        {"a.png": [("7", *CAT[1:])]},
    ),
    Case(
        "two categories of one name",
        coco(categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}]),
        ONE,
        {"repeated category": 1},
    ),
    Case("sizes are missing", coco(images=[without(IMAGE_A, "width", "height")]), ONE),
    Case("sizes are null", coco(images=[{**IMAGE_A, "width": None, "height": None}]), ONE),
    Case("sizes are 0", coco(images=[{**IMAGE_A, "width": 0, "height": 0}]), ONE),
    Case("a negative size", coco([], [IMAGE_A, {**IMAGE_B, "width": -60}]), {}, {"bad entry": 1, "no boxes": 1}),
    Case("an entry that is no object", coco([BOX, 7, None, "x", []]), ONE, {"bad entry": 4}),
    Case("file_name is a number", coco(images=[IMAGE_A, {**IMAGE_B, "file_name": 7}]), ONE, {"bad entry": 1}),
    Case("endless category id", coco(categories='[{"id": 1e999}]'), message="no list 'categories'"),
]
IDS = [
    Case("annotation id 0", coco([changed(id=0)]), ONE),
    Case(
        "image id 0, category id 0",
        coco([changed(image_id=0, category_id=0)], [{**IMAGE_A, "id": 0}], [{"id": 0, "name": "cat"}]),
        ONE,
    ),
    Case("repeated annotation ids", coco([BOX, changed(bbox=[1, 1, 5, 5], area=25)]), ONE, {"duplicate id": 1}),
    Case(
        "repeated annotation ids, numbered anew",
        coco([BOX, changed(bbox=[1, 1, 5, 5], area=25)]),
        {"a.png": [CAT, ("cat", 1, 1, 5, 5)]},
        reading=Reading(workers=1, renumber=True),
    ),
    Case(
        "no annotation ids, numbered anew", coco([without(BOX, "id")]), ONE, reading=Reading(workers=1, renumber=True)
    ),
    Case("repeated image ids", coco(images=[IMAGE_A, {**IMAGE_B, "id": 1}]), ONE, {"duplicate id": 1}),
    Case(
        "an image twice",
        coco(images=[IMAGE_A, {**IMAGE_A, "id": 2}]),
        {},
        {"duplicate file name": 1, "duplicate content": 1},
    ),
]
BOXES = [
    Case("a box without width", coco([BOX, changed(id=2, bbox=[10, 20, 0, 40])]), ONE, {"degenerate box": 1}),
    Case(
        "a box without width, left out",
        coco([BOX, changed(id=2, bbox=[10, 20, 0, 40])]),
        ONE,
        {"degenerate box": 1},
        drop_degenerate=True,
    ),
    Case(
        "a box of nan is not left out",
        coco([BOX, changed(id=2, bbox=[NAN, 20, 3, 40])]),
        ONE,
        {"impossible box": 1},
        drop_degenerate=True,
    ),
    Case(
        "a box elsewhere is not left out",
        coco([BOX, changed(id=2, bbox=[200, 20, 3, 40])]),
        ONE,
        {"outside box": 1},
        drop_degenerate=True,
    ),
    Case(
        "a negative width is not left out",
        coco([BOX, changed(id=2, bbox=[50, 20, -3, 40])]),
        ONE,
        {"impossible box": 1},
        drop_degenerate=True,
    ),
    Case(
        "all boxes of a class without area",
        coco([BOX, changed(id=2, category_id=2, bbox=[1, 1, 0, 0])]),
        ONE,
        {"degenerate box": 1},
        "category dog: none of its 1 boxes has an area",
        drop_degenerate=True,
    ),
    Case(
        "all boxes of the set without area",
        coco([changed(bbox=[1, 1, 0, 0])]),
        {},
        {"degenerate box": 1, "no boxes": 1},
        "category cat: none of its 1 boxes has an area",
        drop_degenerate=True,
    ),
    Case(
        "corners instead of sizes",
        coco(
            [
                changed(bbox=[60, 20, 90, 70]),
                changed(id=2, image_id=2, bbox=[30, 40, 55, 85]),
                changed(id=3, bbox=[1, 2, 30, 40]),
            ],
            [IMAGE_A, IMAGE_B],
        ),
        {},
        {"corners as box": 1, "overhanging box": 2},
    ),
    Case(
        "shares instead of pixels",
        coco([changed(bbox=[0.1, 0.25, 0.3, 0.5])]),
        {},
        {"shares as box": 1, "replaced area": 1},
    ),
    Case(
        "one box that overhangs",
        coco([BOX, changed(id=2, bbox=[80, 20, 30, 40])]),
        {"a.png": [CAT, ("cat", 80, 20, 30, 40)]},
        {"overhanging box": 1},
    ),
    Case("a box written twice", coco([BOX, changed(id=2)]), {"a.png": [CAT, CAT]}, {"repeated box": 1}),
    Case("no boxes at all", coco([]), {"a.png": []}, {"no boxes": 1}),
    Case("crowds only", coco([changed(iscrowd=1)]), {"a.png": [("cat*", *CAT[1:])]}, {"no boxes": 1}),
    Case("an area of 0", coco([changed(area=0)]), ONE, {"replaced area": 1}),
    Case("a negative area", coco([changed(area=-1)]), ONE, {"replaced area": 1}),
    Case("an area of text", coco([changed(area="1200.0")]), ONE),
    Case("an area that is no number", coco([changed(area="large")]), ONE, {"replaced area": 1}),
    Case("an area larger than the box", coco([changed(area=1e6)]), ONE, {"replaced area": 1}),
    Case("no area", coco([without(BOX, "area")]), ONE),
    Case(
        "ignored",
        coco([BOX, changed(id=2, bbox=[1, 1, 5, 5], area=25, ignore=1)]),
        {"a.png": [CAT, ("cat*", 1, 1, 5, 5)]},
    ),
    Case(
        "difficult",
        coco([BOX, changed(id=2, bbox=[1, 1, 5, 5], area=25, difficult="1")]),
        {"a.png": [CAT, ("cat*", 1, 1, 5, 5)]},
    ),
    Case(
        "a group",
        coco([BOX, changed(id=2, bbox=[1, 1, 5, 5], area=25, IsGroupOf=True)]),
        {"a.png": [CAT, ("cat*", 1, 1, 5, 5)]},
    ),
]
VOC = [
    Case("VOC from 1", {"a.png": A, "a.xml": xml(entry())}, ONE),
    Case(
        "VOC from 0",
        {"a.png": A, "a.xml": xml(entry(corners=(10, 20, 40, 60)), entry("dog", (0, 0, 100, 80)))},
        {"a.png": [CAT, ("dog", 0, 0, 100, 80)]},
        {"pixels counted from 0": 1},
    ),
    Case("VOC with fractions", {"a.png": A, "a.xml": xml(entry(corners=("11.0", "21.0", "40.0", "60.00")))}, ONE),
    Case("a suffix in capitals", {"A.PNG": A, "A.XML": xml(entry(), filename="A.PNG")}, {"A.PNG": [CAT]}),
    Case("<filename> without suffix", {"a.png": A, "a.xml": xml(entry(), filename="a")}, ONE),
    Case("<filename> with another suffix", {"a.png": A, "a.xml": xml(entry(), filename="a.jpg")}, ONE),
    Case("<filename> with a Windows path", {"a.png": A, "a.xml": xml(entry(), filename="C:\\data\\a.png")}, ONE),
    Case(
        "<filename> with a folder", {"Annotations/a.xml": xml(entry(), filename="images/a.png"), "images/a.png": A}, ONE
    ),
    Case(
        "<filename> of the image before it was renamed",
        {"a.png": A, "a.xml": xml(entry(), filename="IMG_0001.JPG")},
        ONE,
        {"other file name": 1},
    ),
    Case("no <filename>", {"a.png": A, "a.xml": xml(entry(), filename=None)}, ONE),
    Case(
        "<filename> of another image that is there",
        {"a.png": A, "b.png": A, "a.xml": xml(entry(), filename="b.png"), "b.xml": xml(filename="b.png")},
        {},
        {"ambiguous image": 1, "image left out": 1},
        "no categories",
    ),
    Case(
        "two images of the name of an xml",
        {"a.png": A, "a.jpg": picture(100, 80, "JPEG"), "a.xml": xml(entry(), filename="a")},
        {},
        {},
        "it may be of",
    ),
    Case(
        "no image for an xml",
        {"a.png": A, "a.xml": xml(entry()), "c.xml": xml(entry(), filename="c.png")},
        ONE,
        {"missing image": 1},
    ),
    Case("an image without an xml", {"a.png": A, "b.png": B, "a.xml": xml(entry())}, ONE, {"image left out": 1}),
    Case("<size> of 0", {"a.png": A, "a.xml": xml(entry(), size="<width>0</width><height>0</height>")}, ONE),
    Case("no <size>", {"a.png": A, "a.xml": xml(entry(), size="")}, ONE),
    Case(
        "another <size>",
        {"a.png": A, "a.xml": xml(entry(), size="<width>50</width><height>40</height>")},
        {},
        {"wrong size": 1},
    ),
    Case(
        "difficult in VOC",
        {"a.png": A, "a.xml": xml(entry(), entry("dog", (2, 2, 6, 6), "<difficult>1</difficult>"))},
        {"a.png": [CAT, ("dog*", 1, 1, 5, 5)]},
    ),
    Case(
        "difficult is empty, Unspecified, 0.0",
        {
            "a.png": A,
            "a.xml": xml(
                entry(more="<difficult></difficult>"),
                entry("dog", more="<difficult>Unspecified</difficult>"),
                entry("owl", more="<difficult>0.0</difficult>"),
            ),
        },
        {"a.png": [CAT, ("dog", *CAT[1:]), ("owl", *CAT[1:])]},
    ),
    Case(
        "difficult is no flag",
        {"a.png": A, "a.xml": xml(entry(), entry("dog", more="<difficult>very</difficult>"))},
        ONE,
        {"bad entry": 1},
    ),
    Case("an object without a box", {"a.png": A, "a.xml": xml(entry(), entry(box="polygon"))}, ONE, {"bad entry": 1}),
    Case("an object without a name", {"a.png": A, "a.xml": xml(entry(), entry(""))}, ONE, {"bad entry": 1}),
    Case(
        "a corner that is no number",
        {"a.png": A, "a.xml": xml(entry(), entry(corners=("left", 2, 3, 4)))},
        ONE,
        {"bad entry": 1},
    ),
    Case(
        "corners in the wrong order",
        {"a.png": A, "a.xml": xml(entry(), entry(corners=(40, 60, 11, 21)))},
        ONE,
        {"impossible box": 1},
    ),
    Case(
        "an xml in UTF-16",
        {"a.png": A, "a.xml": xml(entry("Käse"), head='<?xml version="1.0" encoding="UTF-16"?>').encode("utf-16")},
        {"a.png": [("Käse", *CAT[1:])]},
    ),
    Case(
        "an xml in Latin-1",
        {"a.png": A, "a.xml": xml(entry("Käse"), head='<?xml version="1.0" encoding="ISO-8859-1"?>').encode("latin-1")},
        {"a.png": [("Käse", *CAT[1:])]},
    ),
    Case(
        "an xml in Latin-1 that says nothing",
        {
            "a.png": A,
            "a.xml": xml(entry()),
            "b.png": B,
            "b.xml": xml(entry("Käse"), filename="b.png").encode("latin-1"),
        },
        ONE,
        {"bad entry": 1, "image left out": 1},
    ),
    Case(
        "parts of an object",
        {"a.png": A, "a.xml": xml(entry(more="<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>"))},
        ONE,
    ),
]
FROM_CLASSES = Reading(workers=1)
YOLO = [
    Case("as ultralytics has it", yolo(), ONE, path="labels", images="images"),
    Case(
        "suffixes in capitals",
        {"labels/a.TXT": ROW, "images/a.PNG": A, "data.yaml": YAML},
        {"a.PNG": [CAT]},
        path="labels",
        images="images",
    ),
    Case(
        "two images for one file of labels",
        yolo(files={"images/a.jpg": picture(100, 80, "JPEG"), "images/b.png": A, "labels/b.txt": ROW}),
        {"b.png": [CAT]},
        {"ambiguous image": 2},
        path="labels",
        images="images",
    ),
    Case(
        "two files of labels for one image",
        yolo(files={"labels/a.TXT": ROW, "images/b.png": A, "labels/b.txt": ROW}),
        {"b.png": [CAT]},
        {"ambiguous image": 1},
        path="labels",
        images="images",
    ),
    Case(
        "labels without an image",
        yolo(files={"labels/c.txt": ROW}),
        ONE,
        {"unknown image": 1},
        path="labels",
        images="images",
    ),
    Case(
        "an image without labels",
        yolo(files={"images/b.png": B}),
        {**ONE, "b.png": []},
        {"image without labels": 1},
        path="labels",
        images="images",
    ),
    Case(
        "an empty file of labels",
        yolo(files={"images/b.png": B, "labels/b.txt": ""}),
        {**ONE, "b.png": []},
        path="labels",
        images="images",
    ),
    Case(
        "foreign files",
        yolo(
            files={
                "labels/README.txt": "read me",
                "labels/train.txt": "images/a.png",
                "labels/classes.txt": "cat\ndog\n",
                "labels/notes.txt": "by me",
            }
        ),
        ONE,
        {"foreign file": 1},
        path="labels",
        images="images",
    ),
    Case(
        "data.yaml before a stray classes.txt",
        yolo(files={"labels/classes.txt": "person\ncar\n"}),
        ONE,
        {"other names": 1},
        path="labels",
        images="images",
    ),
    Case(
        "nc of data.yaml",
        yolo(names="nc: 3\nnames: [cat, dog]\n"),
        message=r"data.yaml: nc is '3', but `names` has 2",
        path="labels",
        images="images",
    ),
    Case(
        "names that YAML takes for something else",
        yolo("1 0.25 0.5 0.3 0.5\n", "nc: 4\nnames: [yes, no, 1, 1e3]\n"),
        {"a.png": [("no", *CAT[1:])]},
        path="labels",
        images="images",
    ),
    Case("names by numbers", yolo(names="names:\n  0: cat\n  1: off\n"), ONE, path="labels", images="images"),
    Case(
        "a name twice by numbers",
        yolo(names="names:\n  0: cat\n  0: dog\n"),
        message="data.yaml: a key stands twice",
        path="labels",
        images="images",
    ),
    Case(
        "names with a byte order mark",
        {"labels/classes.txt": "\ufeffcat\ndog\n", "labels/a.txt": ROW, "images/a.png": A},
        ONE,
        path="labels",
        images="images",
    ),
    Case(
        "names in UTF-16",
        {"labels/classes.txt": "cat\ndog\n".encode("utf-16"), "labels/a.txt": ROW, "images/a.png": A},
        ONE,
        path="labels",
        images="images",
    ),
    Case(
        "names in Latin-1",
        {"labels/classes.txt": "Käse\n".encode("latin-1"), "labels/a.txt": ROW, "images/a.png": A},
        message="classes.txt: it is not text in UTF-8",
        path="labels",
        images="images",
    ),
    Case(
        "an empty line among the names",
        {"labels/classes.txt": "cat\n\ndog\n", "labels/a.txt": ROW, "images/a.png": A},
        message="classes.txt: line 2 is empty",
        path="labels",
        images="images",
    ),
    Case(
        "a list instead of a mapping",
        yolo(names="- cat\n"),
        message="data.yaml: no list `names`",
        path="labels",
        images="images",
    ),
    Case(
        "tags in data.yaml",
        yolo(names="names: !!set {cat, dog}\n"),
        message="data.yaml: it has a tag",
        path="labels",
        images="images",
    ),
    Case(
        "aliases in data.yaml",
        yolo(names="a: &a [cat]\nnames: *a\n"),
        message="data.yaml: it has aliases",
        path="labels",
        images="images",
    ),
    Case(
        "a Windows path in data.yaml",
        yolo(names='path: "C:\\data"\nnames: [cat]\n'),
        message="data.yaml: not valid YAML",
        path="labels",
        images="images",
    ),
    Case(
        "an unquoted Windows path in data.yaml",
        yolo(names="path: C:\\data\ntrain: images\nval: images\nnames: [cat, dog]\n"),
        ONE,
        path="labels",
        images="images",
    ),
    Case("labels with a byte order mark", yolo("\ufeff" + ROW), ONE, path="labels", images="images"),
    Case("labels in UTF-16", yolo(ROW.encode("utf-16")), ONE, path="labels", images="images"),
    Case(
        "an outline",
        yolo("0 0.1 0.25 0.4 0.25 0.4 0.75 0.1 0.75\n"),
        ONE,
        {"outline as box": 1},
        path="labels",
        images="images",
    ),
    Case(
        "a confidence",
        yolo("0 0.25 0.5 0.3 0.5 0.87\n"),
        ONE,
        {"confidence in a label": 1},
        path="labels",
        images="images",
    ),
    Case(
        "keypoints",
        yolo("0 0.25 0.5 0.3 0.5 0.2 0.2 2 0.4 0.4 1\n", "kpt_shape: [2, 3]\nnames: [cat, dog]\n"),
        ONE,
        path="",
        images=None,
    ),
    Case(
        "pixels instead of shares", yolo(ROW + "0 25 40 30 40\n"), ONE, {"bad entry": 1}, path="labels", images="images"
    ),
    Case("three numbers", yolo(ROW + "0 0.5 0.5 0.5\n"), ONE, {"bad entry": 1}, path="labels", images="images"),
    Case("a class by name", yolo(ROW + "cat 0.5 0.5 0.5 0.5\n"), ONE, {"bad entry": 1}, path="labels", images="images"),
    Case(
        "a class that has no name",
        yolo(ROW + "7 0.5 0.5 0.5 0.5\n"),
        ONE,
        {"unknown category": 1},
        path="labels",
        images="images",
    ),
    Case("nan in a row", yolo(ROW + "0 nan 0.5 0.5 0.5\n"), ONE, {"bad entry": 1}, path="labels", images="images"),
    Case(
        "a class as a float, tabs, spaces, no newline",
        yolo("0.0\t0.25  0.5 3e-1 .5"),
        ONE,
        path="labels",
        images="images",
    ),
    Case(
        "no names",
        {"labels/a.txt": ROW, "images/a.png": A},
        message="the names of the classes are missing",
        path="labels",
        images="images",
    ),
    Case(
        "what macOS leaves behind",
        yolo(files={"images/._a.png": b"\0", "__MACOSX/labels/._a.txt": b"\0", "labels/.DS_Store": b"\0"}),
        ONE,
        path="labels",
        images="images",
    ),
]
TILTED = {number: picture(100, 80, "JPEG", number) for number in range(1, 9)}
ORIENTATIONS = [
    Case(
        "a quarter turn, stored size stated",
        coco([changed()], [{**IMAGE_A, "file_name": "t.jpg"}], files={"t.jpg": TILTED[6]}),
        {"t.jpg": [CAT]},
    ),
    Case(
        "a quarter turn, shown size stated",
        coco([changed()], [{**IMAGE_A, "file_name": "t.jpg", "width": 80, "height": 100}], files={"t.jpg": TILTED[6]}),
        {"t.jpg": [CAT]},
    ),
    Case(
        "upside down",
        coco([changed()], [{**IMAGE_A, "file_name": "t.jpg"}], files={"t.jpg": TILTED[3]}),
        {"t.jpg": [CAT]},
        {"unknown orientation": 1},
    ),
    Case(
        "upside down, told",
        coco([changed()], [{**IMAGE_A, "file_name": "t.jpg"}], files={"t.jpg": TILTED[3]}),
        {"t.jpg": [CAT]},
        reading=Reading(workers=1, orientation="shown"),
    ),
    Case(
        "upside down, and another image tells",
        coco(
            [changed(), changed(id=2, image_id=2)],
            [{**IMAGE_A, "file_name": "t.jpg"}, {"id": 2, "file_name": "u.jpg", "width": 80, "height": 100}],
            files={"t.jpg": TILTED[3], "u.jpg": TILTED[8]},
        ),
        {"t.jpg": [CAT], "u.jpg": [CAT]},
    ),
    Case(
        "a shown size in VOC",
        {"t.jpg": TILTED[6], "t.xml": xml(entry(), filename="t.jpg", size="<width>80</width><height>100</height>")},
        {"t.jpg": [CAT]},
    ),
    Case(
        "YOLO has shares of the picture as shown",
        {"labels/t.txt": "0 0.3125 0.4 0.375 0.4\n", "images/t.jpg": TILTED[6], "data.yaml": YAML},
        {"t.jpg": [CAT]},
        path="labels",
        images="images",
    ),
]
RAMP = np.linspace(0, 1, 100 * 80).reshape(80, 100)
IMAGES = [
    Case("16 bits", coco(files={"a.png": deep((RAMP * 65535).astype(np.uint16))}), ONE),
    Case(
        "16 bits of which 12 are used",
        coco(files={"a.png": deep((RAMP * 4095).astype(np.uint16))}),
        ONE,
        {"dark image": 1},
    ),
    Case(
        "floating-point numbers",
        coco(
            images=[{**IMAGE_A, "file_name": "a.tif"}, IMAGE_B], files={"a.tif": deep(RAMP.astype(np.float32), "TIFF")}
        ),
        {},
        {"undecodable image": 1, "no boxes": 1},
    ),
    Case(
        "integers of 32 bits",
        coco(
            images=[{**IMAGE_A, "file_name": "a.tif"}, IMAGE_B],
            files={"a.tif": deep((RAMP * 255).astype(np.int32), "TIFF")},
        ),
        {},
        {"undecodable image": 1, "no boxes": 1},
    ),
]
FILES = [
    Case("a json in UTF-16", {**coco(), "instances.json": coco()["instances.json"].encode("utf-16")}, ONE),  # type: ignore[union-attr]
    Case("a json with a byte order mark", {**coco(), "instances.json": "\ufeff" + str(coco()["instances.json"])}, ONE),
    Case(
        "a json in Latin-1",
        {**coco(), "instances.json": '{"images": [], "x": "ä"}'.encode("latin-1")},
        message="instances.json: not valid JSON",
        path="instances.json",
        images=".",
    ),
    Case(
        "nested without end",
        {**coco(), "instances.json": '{"images": ' + "[" * 200_000},
        message="instances.json: not valid JSON",
        path="instances.json",
        images=".",
    ),
    Case(
        "a number of 5000 digits",
        {**coco(), "instances.json": '{"images": [' + "1" * 5000 + "]}"},
        message="instances.json: not valid JSON",
        path="instances.json",
        images=".",
    ),
    Case(
        "a list",
        {**coco(), "instances.json": "[]"},
        message="not a COCO json: no list 'images'",
        path="instances.json",
        images=".",
    ),
    Case(
        "detections",
        {**coco(), "instances.json": json.dumps([{**BOX, "score": 1}])},
        message="this is a list of detections",
        path="instances.json",
        images=".",
    ),
    Case(
        "Label Studio's own json",
        {**coco(), "instances.json": json.dumps([{"data": {}, "annotations": []}])},
        message="Label Studio",
        path="instances.json",
        images=".",
    ),
    Case(
        "a json beside no images",
        {"deep/instances.json": coco()["instances.json"], "pictures/a.png": A},
        message="name the folder of its images",
        path="deep/instances.json",
    ),
    Case(
        "a file name with a backslash",
        coco(images=[{**IMAGE_A, "file_name": "sub\\a.png"}], files={"sub/a.png": A}),
        {"sub/a.png": [CAT]},
    ),
    Case("nothing", {"a.png": A}, message="neither a COCO json nor VOC .xml nor YOLO .txt"),
]
CASES = [*TYPES, *IDS, *BOXES, *VOC, *YOLO, *ORIENTATIONS, *IMAGES, *FILES]
