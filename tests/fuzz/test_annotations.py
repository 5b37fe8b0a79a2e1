"""Annotations of a stranger, as a COCO json, VOC's xml or YOLO's txt: sound, every loss a finding, or refused."""

import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
import yaml
from ddetr.data.findings import FIXES, summary
from ddetr.data.formats import read_sets
from ddetr.data.text import visible
from ddetr.data.values import MOST_ID
from hypothesis import strategies as st

from tests.data.test_transforms import encoded, photograph
from tests.fuzz.strategies import (
    DAMAGES,
    LEAVES,
    NASTY,
    WILD,
    Effort,
    changed,
    damaged,
    listing,
    outcome,
    watched,
)

Sets = dict[str, Any]  # name -> CocoSet
SIZES = {"a.jpg": (40, 60), "b.jpg": (50, 30), "c.jpg": (32, 32)}  # (height, width)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "set" / "images"
    folder.mkdir(parents=True)
    for name, (height, width) in SIZES.items():
        (folder / name).write_bytes(encoded(photograph(height, width), "JPEG"))
    return folder


def read(root: Path, images: Path | None, *names: str | Path) -> Sets | None:
    """What is read of a set, looked at as far as one can without knowing what it should be."""
    before = listing(root)
    with watched():
        sets = outcome(lambda: read_sets(root, images), root, *names)
    assert listing(root) == before
    for found in (sets or {}).values():
        assert_sound(found)
    return sets


def assert_sound(found: Any) -> None:
    assert {finding.kind for finding in found.findings} <= set(FIXES)
    assert {finding.severity for finding in found.findings} <= {"error", "warning"}
    assert all(visible(line) == line for line in summary(found.findings).split("\n"))
    ids = [image.image_id for image in found.images]
    assert len(set(ids)) == len(ids)
    assert all(type(i) is int and 0 <= i <= MOST_ID for i in ids)
    assert len(set(found.categories.ids)) == len(found.categories) > 0
    assert all(isinstance(name, str) for name in found.categories.names)
    annotations = [annotation["id"] for image in found.images for annotation in image.annotations]
    assert len(set(annotations)) == len(annotations)
    assert all(type(i) is int and 0 <= i <= MOST_ID for i in annotations)
    for image in found.images:
        assert isinstance(image.file_name, str)
        assert (type(image.height), type(image.width)) == (int, int)
        assert image.height > 0
        assert image.width > 0
        for annotation in image.annotations:
            left, top, width, height = annotation["bbox"]
            assert all(type(number) in (int, float) and math.isfinite(number) for number in annotation["bbox"])
            assert type(annotation["area"]) in (int, float)
            assert math.isfinite(annotation["area"])
            assert annotation["category_id"] in found.categories
            assert annotation["iscrowd"] in (0, 1)
            assert min(left + width, image.width) > max(left, 0)
            assert min(top + height, image.height) > max(top, 0)


def num_boxes(sets: Sets) -> int:
    return sum(len(image.annotations) for found in sets.values() for image in found.images)


def num_images(sets: Sets) -> int:
    return sum(len(found.images) for found in sets.values())


def findings(sets: Sets) -> list[Any]:
    return [finding for found in sets.values() for finding in found.findings]


def errors(sets: Sets) -> list[Any]:
    return [finding for finding in findings(sets) if finding.severity == "error"]


def boxes(sets: Sets) -> list[tuple[Any, ...]]:
    """Every box by what it is of, whatever order and ids it was read in."""
    return sorted(
        (image.file_name, names[annotation["category_id"]], tuple(annotation["bbox"]), annotation["iscrowd"])
        for found in sets.values()
        for names in [dict(zip(found.categories.ids, found.categories.names, strict=True))]
        for image in found.images
        for annotation in image.annotations
    )


COCO = {
    "info": {"year": 2026},
    "images": [
        {"id": number, "file_name": name, "height": height, "width": width}
        for number, (name, (height, width)) in enumerate(SIZES.items(), 1)
    ],
    "annotations": [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 12, 9], "area": 108, "iscrowd": 0},
        {"id": 2, "image_id": 1, "category_id": 4, "bbox": [20.5, 2.25, 12, 9.5], "area": 114.0, "iscrowd": 0},
        {"id": 3, "image_id": 2, "category_id": 4, "bbox": [0, 0, 30, 50], "area": 1500, "iscrowd": 1},
        {"id": 4, "image_id": 3, "category_id": 1, "bbox": [3, 3, 8, 8], "area": 64, "iscrowd": 0},
    ],
    "categories": [{"id": 1, "name": "cat", "supercategory": "animal"}, {"id": 4, "name": "dog"}],
}


def test_a_coco_json_is_sound_and_every_loss_a_finding(effort: Effort, images: Path) -> None:
    root = images.parent
    file = root / "annotations.json"
    good = json.dumps(COCO).encode()
    file.write_bytes(good)
    assert num_boxes(read_sets(root, images)) == 4

    def holds(data: bytes) -> None:
        file.write_bytes(data)
        sets = read(root, images, file)
        if sets is None:
            return
        said = json.loads(data)
        lost = len(said["annotations"]) - num_boxes(sets) + len(said["images"]) - num_images(sets)
        assert lost <= 0 or findings(sets), "entries were left out, and nothing says so"
        known = [image.get("file_name") for image in said["images"] if isinstance(image, dict)]
        assert all(image.file_name in known for found in sets.values() for image in found.images)

    effort(holds, changed(COCO).map(lambda values: json.dumps(values).encode()) | damages(good))


def damages(data: bytes) -> st.SearchStrategy[bytes]:
    return DAMAGES.map(lambda damage: damaged(data, damage))


def as_text(number: float) -> list[Any]:
    """A number as programs write it."""
    written = [number, float(number), str(number), f"{number:.3f}", f" {number} ", f"{number:e}"]
    return written + ([int(number)] if number == int(number) else [])


@st.composite
def rewritten(draw: st.DrawFn) -> dict[str, Any]:
    """The same set: entries in another order, numbers as text or floats, keys that nobody reads."""
    values = json.loads(json.dumps(COCO))
    for name in ("images", "annotations", "categories"):
        values[name] = draw(st.permutations(values[name]))
        for entry in values[name]:
            for key, value in entry.items():
                if key == "bbox":
                    entry[key] = [draw(st.sampled_from(as_text(number))) for number in value]
                elif isinstance(value, int | float):
                    choices = as_text(value) if key in ("height", "width", "area") else [value, float(value)]
                    entry[key] = draw(st.sampled_from(choices))
            entry.update(
                draw(st.dictionaries(st.sampled_from(["score", "license", "segmentation", "x"]), WILD, max_size=2))
            )
    values.update(draw(st.dictionaries(st.sampled_from(["info", "licenses", "type"]), WILD, max_size=2)))
    return dict(draw(st.permutations(list(values.items()))))


def test_one_coco_set_in_other_words_has_the_same_boxes(effort: Effort, images: Path) -> None:
    root = images.parent
    (root / "annotations.json").write_text(json.dumps(COCO))
    expected = boxes(read_sets(root, images))

    def holds(values: dict[str, Any]) -> None:
        (root / "annotations.json").write_text(json.dumps(values))
        sets = read(root, images)
        assert sets is not None
        assert boxes(sets) == expected
        assert not errors(sets)

    effort(holds, rewritten())


# What one object of a VOC file says, and the file around it.
OBJECTS = [
    {"name": "cat", "difficult": "0", "xmin": "2", "ymin": "3", "xmax": "13", "ymax": "11"},
    {"name": "dog", "difficult": "1", "xmin": "1", "ymin": "1", "xmax": "30", "ymax": "30"},
]


def voc(name: Any, size: tuple[Any, Any], objects: list[dict[str, Any]], extra: str = "") -> str:
    entries = "".join(
        f"<object>{extra}<name>{escape(str(o.get('name')))}</name><difficult>{o.get('difficult')}</difficult><bndbox>"
        + "".join(f"<{side}>{escape(str(o[side]))}</{side}>" for side in ("xmin", "ymin", "xmax", "ymax") if side in o)
        + "</bndbox></object>"
        for o in objects
    )
    height, width = size
    size_text = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation>{extra}<filename>{escape(str(name))}</filename>{size_text}{entries}</annotation>"


def write_voc(folder: Path) -> dict[str, bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    files = {f"{Path(name).stem}.xml": voc(name, size, OBJECTS).encode() for name, size in SIZES.items()}
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def test_voc_files_are_sound_and_every_loss_a_finding(effort: Effort, images: Path) -> None:
    root = images.parent
    folder = root / "Annotations"
    files = write_voc(folder)
    assert num_boxes(read_sets(root, images)) == 6

    def holds(name: str, data: bytes) -> None:
        for other, good in files.items():
            (folder / other).write_bytes(data if other == name else good)
        sets = read(root, images, folder)
        if sets is not None:
            objects = data.count(b"<object>") + 4
            assert num_images(sets) == 3 or findings(sets), "a file was left out, and nothing says so"
            assert num_boxes(sets) >= objects or findings(sets), "an object was left out, and nothing says so"

    def text(parts: tuple[Any, Any, Any]) -> tuple[str, bytes]:
        name, size, objects = parts
        kept = [entry for entry in objects if isinstance(entry, dict)] if isinstance(objects, list) else []
        return "a.xml", voc(name, size, kept).encode(errors="surrogatepass")

    leaf = st.sampled_from(NASTY) | LEAVES
    written = st.tuples(
        st.just("a.jpg") | leaf, st.just(SIZES["a.jpg"]) | st.tuples(leaf, leaf), changed(OBJECTS, values=leaf)
    ).map(text)
    broken = st.tuples(st.sampled_from(sorted(files)), DAMAGES).map(lambda p: (p[0], damaged(files[p[0]], p[1])))
    effort(lambda drawn: holds(*drawn), written | broken)


def test_one_voc_set_in_other_words_has_the_same_boxes(effort: Effort, images: Path) -> None:
    root = images.parent
    write_voc(root / "Annotations")
    expected = boxes(read_sets(root, images))

    def holds(numbers: list[int], order: list[dict[str, str]], extra: str) -> None:
        for name, size in SIZES.items():
            objects = [
                {
                    key: _in_words(value, numbers[number % len(numbers)])
                    if key in ("xmin", "ymin", "xmax", "ymax")
                    else value
                    for number, (key, value) in enumerate(entry.items())
                }
                for entry in order
            ]
            (root / "Annotations" / f"{Path(name).stem}.xml").write_text(voc(name, size, objects, extra))
        sets = read(root, images)
        assert sets is not None
        assert boxes(sets) == expected
        assert not errors(sets)

    extra = st.sampled_from(["", "<pose>Left</pose>", "<truncated>1</truncated>", "<!-- a -->", "\n\t"])
    effort(holds, st.lists(st.integers(0, 4), min_size=1, max_size=6), st.permutations(OBJECTS), extra)


def _in_words(number: str, way: int) -> str:
    return (number, f"{number}.0", f" {number} ", f"{number}.000", f"\n{number}\n")[way]


LABELS = {"a": "0 0.5 0.5 0.25 0.5\n1 0.25 0.25 0.125 0.125\n", "b": "1 0.5 0.5 1 1\n", "c": ""}
NAMES = {"names": ["cat", "dog"], "nc": 2, "train": "images", "val": "images"}


def write_yolo(root: Path) -> dict[str, bytes]:
    (root / "labels").mkdir(exist_ok=True)
    files = {f"labels/{stem}.txt": text.encode() for stem, text in LABELS.items()}
    files["data.yaml"] = yaml.safe_dump(NAMES).encode()
    for name, data in files.items():
        (root / name).write_bytes(data)
    return files


def test_yolo_files_are_sound_and_every_loss_a_finding(effort: Effort, images: Path) -> None:
    root = images.parent
    files = write_yolo(root)
    assert boxes(read_sets(root, images))

    def holds(name: str, data: bytes) -> None:
        for other, good in files.items():
            (root / other).write_bytes(data if other == name else good)
        sets = read(root, images)
        if sets is None or name == "data.yaml":
            return
        lines = sum(
            bool(line.strip())
            for other, good in files.items()
            if other.endswith(".txt")
            for line in _lines(data if other == name else good)
        )
        assert num_boxes(sets) >= lines or findings(sets), "a line was left out, and nothing says so"
        assert num_images(sets) == 3

    value = st.sampled_from(NASTY) | LEAVES.map(str) | st.sampled_from(["0", "1", "0.5", "2", "-0.1", "1.0"])
    line = st.lists(value, max_size=9).map(" ".join)
    texts = st.lists(line, max_size=4).map(lambda lines: "\n".join(lines).encode(errors="surrogatepass"))
    names = changed(NAMES).map(lambda values: yaml.safe_dump(values).encode(errors="surrogatepass"))
    broken = st.tuples(st.sampled_from(sorted(files)), DAMAGES).map(lambda p: (p[0], damaged(files[p[0]], p[1])))
    effort(
        lambda drawn: holds(*drawn),
        st.one_of(broken, texts.map(lambda data: ("labels/a.txt", data)), names.map(lambda data: ("data.yaml", data))),
    )


def _lines(data: bytes) -> list[str]:
    return data.decode(errors="replace").splitlines()


def test_one_yolo_set_in_other_words_has_the_same_boxes(effort: Effort, images: Path) -> None:
    root = images.parent
    write_yolo(root)
    expected = boxes(read_sets(root, images))

    def holds(ways: list[int], names: Any, ending: str) -> None:
        for stem, text in LABELS.items():
            lines = [
                " ".join([label, *(_share(number, ways[k % len(ways)]) for k, number in enumerate(numbers))])
                for label, *numbers in (line.split() for line in text.splitlines())
            ]
            (root / "labels" / f"{stem}.txt").write_bytes("".join(line + ending for line in lines).encode())
        (root / "data.yaml").write_text(yaml.safe_dump({"nc": 2, **names}))
        sets = read(root, images)
        assert sets is not None
        assert boxes(sets) == expected
        assert not errors(sets)

    names = st.sampled_from([{"names": ["cat", "dog"]}, {"names": {0: "cat", 1: "dog"}, "path": "."}])
    ways = st.lists(st.integers(0, 4), min_size=1, max_size=5)
    effort(holds, ways, names, st.sampled_from(["\n", "\r\n", "\n\n", " \n", "\t\n"]))


def _share(number: str, way: int) -> str:
    return (number, f"{float(number):.6f}", f"{float(number):e}", f"+{number}", f" {number}")[way]


def test_a_folder_of_anything_is_a_set_or_refused(effort: Effort, tmp_path: Path) -> None:
    """Files of any names and contents in the places where sets have theirs."""
    root = tmp_path / "any"
    picture = encoded(photograph(20, 30), "JPEG")
    contents = [b"", b"{}", b"<annotation/>", b"0 0.5 0.5 1 1", b"names: [a]", json.dumps(COCO).encode(), picture]
    places = ["a.json", "annotations.json", "images/a.jpg", "labels/a.txt", "Annotations/a.xml", "data.yaml"]
    places += ["classes.txt", "train/a.jpg", "train/a.txt", "valid/a.xml", "JPEGImages/a.jpg", "annotations/val.json"]

    def holds(files: dict[str, bytes]) -> None:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        for place, data in files.items():
            (root / place).parent.mkdir(exist_ok=True)
            (root / place).write_bytes(data)
        read(root, None)

    anything = st.sampled_from(contents) | st.binary(max_size=40)
    effort(holds, st.dictionaries(st.sampled_from(places), anything, max_size=6))
