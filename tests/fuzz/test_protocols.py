"""Lists, frequencies and hierarchies of a stranger, in a json of LVIS or Open Images' files: sound, or refused."""

import json
from pathlib import Path
from typing import Any

from ddetr.data.categories import FREQUENCIES
from ddetr.data.formats import read_sets
from ddetr.data.protocols import IMAGE_LISTS
from hypothesis import strategies as st

from tests.data.test_protocols import BOXES, CLASSES, LABELS, TREE
from tests.fuzz.strategies import DAMAGES, Effort, changed, damaged, outcome
from tests.fuzz.test_annotations import COCO, SIZES, damages, findings, images, num_images, read

__all__ = ["images"]  # the fixture

LVIS = json.loads(json.dumps(COCO))
for _image in LVIS["images"]:
    _image |= {"coco_url": f"http://x/val2017/{_image['file_name']}", IMAGE_LISTS[0]: [4], IMAGE_LISTS[1]: [1, 4]}
for _category in LVIS["categories"]:
    _category["frequency"] = "r"


def assert_protocols_sound(found: Any) -> None:
    assert set(found.categories.frequencies.values()) <= set(FREQUENCIES)
    for id_, parents in found.categories.parents.items():
        assert {id_, *parents} <= set(found.categories.ids)
    for image in found.images:
        for name in IMAGE_LISTS:
            assert set(getattr(image, name) or ()) <= set(found.categories.ids)


def test_an_lvis_json_is_sound_and_every_loss_a_finding(effort: Effort, images: Path) -> None:
    root = images.parent
    file = root / "annotations.json"
    good = json.dumps(LVIS).encode()

    def holds(data: bytes) -> None:
        file.write_bytes(data)
        for found in (read(root, images, file) or {}).values():
            assert_protocols_sound(found)
            said = [entry for entry in json.loads(data)["images"] if isinstance(entry, dict)]
            listed = sum(
                len(entry[name]) for entry in said for name in IMAGE_LISTS if isinstance(entry.get(name), list)
            )
            kept = sum(len(getattr(image, name) or ()) for image in found.images for name in IMAGE_LISTS)
            assert kept >= listed or found.findings or found.protocol == "coco", "nothing says what was left out"

    effort(holds, changed(LVIS).map(lambda values: json.dumps(values).encode()) | damages(good))


def test_the_files_of_open_images_are_sound_and_every_loss_a_finding(effort: Effort, images: Path) -> None:
    root = images.parent
    for (name, _), code in zip(
        SIZES.items(), ("000026e7ee790996", "000062a39995e348", "0000575f5a03db70"), strict=True
    ):
        (images / name).rename(images / f"{code}.jpg")
    files = {
        "validation-annotations-bbox.csv": BOXES.encode(),
        "validation-annotations-human-imagelabels-boxable.csv": LABELS.encode(),
        "class-descriptions-boxable.csv": CLASSES.encode(),
        "bbox_labels_600_hierarchy.json": json.dumps(TREE).encode(),
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    boxes = root / "validation-annotations-bbox.csv"
    assert num_images(read_sets(boxes, images)) == 3

    def holds(name: str, data: bytes) -> None:
        for other, good in files.items():
            (root / other).write_bytes(data if other == name else good)
        sets = outcome(lambda: read_sets(boxes, images), root)
        for found in (sets or {}).values():
            assert_protocols_sound(found)
        if sets is not None and name == boxes.name and b"\nffff00000000dead," in data:
            assert findings(sets), "an image is absent, and nothing says so"

    tree = changed(TREE).map(lambda values: ("bbox_labels_600_hierarchy.json", json.dumps(values).encode()))
    broken = st.tuples(st.sampled_from(sorted(files)), DAMAGES).map(lambda p: (p[0], damaged(files[p[0]], p[1])))
    effort(lambda drawn: holds(*drawn), tree | broken)
