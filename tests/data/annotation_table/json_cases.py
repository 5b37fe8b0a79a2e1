"""A COCO json: types, ids."""

from ddetr.data.sets import Reading

from tests.data.annotation_table.case import (
    BOX,
    CAT,
    IMAGE_A,
    IMAGE_B,
    NAN,
    ONE,
    A,
    Case,
    changed,
    coco,
    without,
)

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
    Case("an id that is a name", coco([BOX, changed(id="one")]), ONE, {"missing id": 1}),
    Case(
        "an image's id that is a name",
        coco([BOX, changed(id=2, image_id="b")], [IMAGE_A, {**IMAGE_B, "id": "b"}]),
        ONE,
        {"bad entry": 1},
    ),
    Case("an id of half", coco([BOX, changed(id=1.5)]), ONE, {"missing id": 1}),
    Case("an id beyond 64 bits", coco([BOX, changed(id=2**63)]), ONE, {"missing id": 1}),
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
    Case("no annotation ids", coco([without(BOX, "id")]), {}, {"missing id": 1, "no boxes": 1}),
    Case(
        "a key twice",
        {**coco(), "instances.json": '{"images": [], "annotations": [1], "annotations": []}'},
        message="'annotations' stands twice",
        path="instances.json",
        images=".",
    ),
    Case(
        "an image under two spellings of its name",
        coco(images=[IMAGE_A, {**IMAGE_A, "id": 2, "file_name": "./a.png"}]),
        {},
        {"duplicate file name": 1, "duplicate content": 1},
    ),
    Case(
        "a name in the other form of Unicode",
        coco(images=[{**IMAGE_A, "file_name": "K\u00e4se.png"}], files={"Ka\u0308se.png": A}),
        {"Ka\u0308se.png": [CAT]},
    ),
    Case(
        "a path of the server that exported",
        coco(images=[{**IMAGE_A, "file_name": "../../server/upload/a.png"}]),
        ONE,
        {"other file name": 1},
    ),
    Case(
        "a name that is not UTF-8",
        coco(images=[IMAGE_A, {**IMAGE_B, "file_name": "\udce4.png"}]),
        ONE,
        {"missing image": 1},
    ),
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
