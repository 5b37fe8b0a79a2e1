"""Files that are no usual json."""

import json

from tests.data.annotation_table.case import (
    BOX,
    CAT,
    IMAGE_A,
    ONE,
    A,
    Case,
    coco,
)

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
    *(
        Case(f"alone, {name}", {"instances.json": text, "a.png": A}, message=message, path="instances.json")
        for name, text, message in [
            ("empty", "", "instances.json: not valid JSON"),
            ("detections", json.dumps([{**BOX, "score": 1}]), "this is a list of detections"),
        ]
    ),
    Case(
        "a name that no file can have",
        coco(images=[{**IMAGE_A, "id": 2, "file_name": "a" * 300 + ".png"}, IMAGE_A]),
        findings={"missing image": 1},
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
