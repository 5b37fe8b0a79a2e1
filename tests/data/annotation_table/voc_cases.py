"""Pascal VOC's xml."""

from tests.data.annotation_table.case import (
    CAT,
    ONE,
    A,
    B,
    Case,
    entry,
    picture,
    xml,
)

GOOD = {"a.png": A, "a.xml": xml(entry())}
SECOND = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>5</xmax><ymax>5</ymax></bndbox>"
VOC = [
    Case(
        "a namespace",
        {"a.png": A, "a.xml": xml(entry()).replace("<annotation>", '<annotation xmlns="http://x.example">')},
        ONE,
    ),
    Case(
        "an object in capitals",
        {**GOOD, "b.png": B, "b.xml": xml(entry(), filename="b.png", size="").replace("object>", "Object>")},
        ONE,
        {"bad entry": 1},
    ),
    Case(
        "CVAT's own xml", {**GOOD, "b.xml": "<annotations><image><box/></image></annotations>"}, ONE, {"bad entry": 1}
    ),
    Case(
        "an xml beside an image that is none of VOC's",
        {**GOOD, "a.png.aux.xml": "<PAMDataset></PAMDataset>"},
        ONE,
        {"foreign file": 1},
    ),
    Case(
        "crowds in VOC",
        {"a.png": A, "a.xml": xml(entry(), entry("dog", (2, 2, 6, 6), "<iscrowd>1</iscrowd>"))},
        {"a.png": [CAT, ("dog*", 1, 1, 5, 5)]},
    ),
    Case(
        "one corner far outside",
        {"a.png": A, "a.xml": xml(entry(), entry("dog", (-3, 21, 40, 60)))},
        {"a.png": [CAT, ("dog", -4, 20, 44, 40)]},
        {"overhanging box": 1},
    ),
    Case(
        "a name in the other form of Unicode in VOC",
        {"Ka\u0308se.png": A, "Ka\u0308se.xml": xml(entry(), filename="K\u00e4se.png")},
        {"Ka\u0308se.png": [CAT]},
    ),
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
    Case(
        "two boxes of an object",
        {"a.png": A, "a.xml": xml(entry(), entry(more=SECOND))},
        {"a.png": [CAT, ("cat", 0, 0, 5, 5)]},
        {"bad entry": 1},
    ),
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
