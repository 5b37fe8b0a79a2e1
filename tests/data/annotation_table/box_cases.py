"""Boxes, areas and flags; images."""

import numpy as np
from ddetr.data.sets import Reading

from tests.data.annotation_table.case import (
    BOX,
    CAT,
    IMAGE_A,
    IMAGE_B,
    NAN,
    ONE,
    YAML,
    Case,
    changed,
    coco,
    deep,
    entry,
    picture,
    without,
    xml,
)

BOXES = [
    Case(
        "an empty box beside an outline",
        coco([changed(bbox=[0, 0, 0, 0], segmentation=[[10, 20, 40, 20, 40, 60]])]),
        ONE,
        {"outline as box": 1},
    ),
    Case(
        "shares, of which one overhangs",
        coco(
            [changed(id=n, bbox=[0.1 * (n % 5), 0.25, 0.3, 0.5 + n / 100], area=None) for n in range(29)]
            + [changed(id=30, bbox=[0.5, 0.5, 0.6, 1.01], area=None)]
        ),
        {},
        {"shares as box": 1},
    ),
    Case(
        "a crowd among the attributes",
        coco([BOX, changed(id=2, bbox=[1, 1, 5, 5], area=25, attributes={"is_crowd": True})]),
        {"a.png": [CAT, ("cat*", 1, 1, 5, 5)]},
    ),
    Case("free text among the attributes", coco([changed(attributes={"is_crowd": "rather"})]), ONE),
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

TILTED = {number: picture(100, 80, "JPEG", number) for number in range(1, 9)}
BROKEN_EXIF = TILTED[6].replace(b"MM\0*", b"MM\x0f*")
assert TILTED[6] != BROKEN_EXIF
ORIENTATIONS = [
    Case(
        "EXIF that cannot be read",
        coco([changed()], [{**IMAGE_A, "file_name": "t.jpg"}], files={"t.jpg": BROKEN_EXIF}),
        {"t.jpg": [CAT]},
        {"unknown orientation": 1},
    ),
    Case(
        "a TIFF upside down",
        coco([changed()], [{**IMAGE_A, "file_name": "t.tif"}], files={"t.tif": picture(100, 80, "TIFF", 3)}),
        {"t.tif": [CAT]},
        {"unknown orientation": 1},
    ),
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
