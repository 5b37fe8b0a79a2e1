"""Pascal VOC and YOLO annotations, written here from a COCO json, give what the json gives."""

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from ddetr.data.formats import read_annotations
from ddetr.data.index import ShardIndex
from ddetr.data.shards import pack
from ddetr.launch.data import check

from tests.truth import coco_truth

NAMES = {1: "disc", 23: "triangle", 56: "a <cross>"}


@pytest.fixture
def coco(coco_folder: Path) -> dict[str, Any]:
    """The procedural set with boxes on whole pixels; the first image without objects, one object a crowd."""
    values = json.loads((coco_folder / "annotations.json").read_text())
    for row in values["annotations"]:
        row["bbox"] = [round(row["bbox"][0]), round(row["bbox"][1]), *(max(1, int(v)) for v in row["bbox"][2:])]
    first = values["images"][0]["id"]
    values["annotations"] = [row for row in values["annotations"] if row["image_id"] != first]
    values["annotations"][3]["iscrowd"] = 1
    return values


def voc(coco: dict[str, Any], folder: Path) -> Path:
    for image in coco["images"]:
        objects = "".join(
            f"<object><name>{escape(NAMES[row['category_id']])}</name><difficult>{row['iscrowd']}</difficult><bndbox>"
            f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            for row in coco["annotations"]
            if row["image_id"] == image["id"]
            for x, y, w, h in [row["bbox"]]
        )
        size = f"<size><width>{image['width']}</width><height>{image['height']}</height><depth>3</depth></size>"
        file = folder / f"{Path(image['file_name']).stem}.xml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"<annotation><filename>{image['file_name']}</filename>{size}{objects}</annotation>")
    return folder


def yolo(coco: dict[str, Any], folder: Path) -> Path:
    numbers = {category_id: number for number, category_id in enumerate(NAMES)}
    lines: dict[int, list[str]] = {}
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    for row in coco["annotations"]:
        x, y, w, h = row["bbox"]
        width, height = sizes[row["image_id"]]
        values = ((x + w / 2) / width, (y + h / 2) / height, w / width, h / height)
        lines.setdefault(row["image_id"], []).append(f"{numbers[row['category_id']]} {' '.join(map(repr, values))}")
    labels = folder / "labels"
    labels.mkdir(parents=True)
    for image in coco["images"]:
        if image["id"] in lines:
            text = "\n".join(lines[image["id"]]) + "\n"
            (labels / f"{Path(image['file_name']).stem}.txt").write_text(text)
    (folder / "data.yaml").write_text(json.dumps({"names": list(NAMES.values())}))
    return labels


@pytest.mark.parametrize("write", [voc, yolo])
def test_other_formats_are_read_as_the_json(coco, coco_folder, tmp_path, write):
    json_file = tmp_path / "coco.json"
    json_file.write_text(json.dumps(coco))
    expected = read_annotations(json_file, coco_folder / "images")
    read = read_annotations(write(coco, tmp_path / "other"), coco_folder / "images")
    assert [finding.kind for finding in read.findings] == ([] if write is voc else ["image without labels"])
    assert read.categories.ids == ((1, 2, 3) if write is voc else (0, 1, 2))
    assert sorted(read.categories.names) == sorted(NAMES.values())
    names = dict(zip(read.categories.ids, read.categories.names, strict=True))
    assert len(read.images) == 20
    assert [image.image_id for image in read.images] == list(range(1, 21))
    by_name = {image.file_name: image for image in read.images}
    for image in expected.images:
        other = by_name[image.file_name]
        assert (other.height, other.width) == (image.height, image.width)
        assert len(other.annotations) == len(image.annotations)
        for ours, row in zip(other.annotations, image.annotations, strict=True):
            assert names[ours["category_id"]] == NAMES[row["category_id"]]
            assert ours["bbox"] == pytest.approx(row["bbox"], abs=1e-9)
            assert ours["iscrowd"] == (row["iscrowd"] if write is voc else 0)


@pytest.mark.integration
@pytest.mark.parametrize("write", [voc, yolo])
def test_they_are_packed_and_checked(coco, coco_folder, tmp_path, write, capsys):
    folder = write(coco, tmp_path / "other")
    assert check(folder, coco_folder / "images")
    index = pack(folder, coco_folder / "images", tmp_path / "shards", workers=1)
    assert index.num_samples == 20
    again = pack(folder, coco_folder / "images", tmp_path / "shards", workers=1)
    assert again.source == index.source == ShardIndex.load(tmp_path / "shards").source
    assert len(coco_truth(index)["annotations"]) == len(coco["annotations"])


def test_mistakes_in_voc_files_are_named(coco, coco_folder, tmp_path):
    folder = voc(coco, tmp_path / "voc")
    first, second, third = sorted(folder.glob("*.xml"))[5:8]
    first.write_text(first.read_text().replace("<xmin>", "<xmin>left"))
    second.write_text(second.read_text()[:100])
    third.write_text(third.read_text().replace("<name>", "<title>").replace("</name>", "</title>"))
    with pytest.raises(ValueError, match=r"\d error") as error:
        pack(folder, coco_folder / "images", tmp_path / "shards", workers=1)
    for file in (first, second, third):
        assert file.name in str(error.value)
    assert "<xmin> is 'left" in str(error.value)
    assert "<name> is ''" in str(error.value)


def test_mistakes_in_yolo_files_are_named(coco, coco_folder, tmp_path):
    labels = yolo(coco, tmp_path / "yolo")
    first, second = sorted(labels.glob("*.txt"))[:2]
    first.write_text("0 0.5 0.5 0.1\n")
    second.write_text("7 0.5 0.5 0.1 0.1\n")
    (labels / "elsewhere.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    with pytest.raises(ValueError, match="3 error") as error:
        pack(labels, coco_folder / "images", tmp_path / "shards", workers=1)
    for expected in (f"{first.name}, line 1", "category_id 7", "elsewhere.txt: no image of that name"):
        assert expected in str(error.value)
    (labels.parent / "data.yaml").unlink()
    with pytest.raises(FileNotFoundError, match=r"names of the classes are missing: put one of data.yaml"):
        read_annotations(labels, coco_folder / "images")


def test_folders_without_annotations_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither a COCO json nor VOC .xml nor YOLO .txt files"):
        read_annotations(tmp_path, tmp_path)
