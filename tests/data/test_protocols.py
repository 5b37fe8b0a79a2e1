"""The protocol of a set: recognised by what the annotations hold, kept with the shards, believed nowhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddetr.data.categories import Categories
from ddetr.data.doctor import check_coco, check_shards
from ddetr.data.findings import Finding
from ddetr.data.formats import read_annotations, read_sets
from ddetr.data.index import ShardIndex, ShardReader
from ddetr.data.layout import entry_from_json
from ddetr.data.sets import Reading
from ddetr.data.shards import pack
from ddetr.data.truth import GroundTruth
from PIL import Image

URL = "http://images.cocodataset.org"
ALONE = Reading(workers=1)


def an_image(path: Path, shade: int = 90) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), (shade, 20, 200)).save(path)


def lvis_values() -> dict[str, Any]:
    """Three images as LVIS v1 has them, of two splits of COCO."""

    def image(id_: int, split: str, **lists: list[int]) -> dict[str, Any]:
        url = f"{URL}/{split}/{id_:012d}.jpg"
        return {
            "id": id_,
            "height": 48,
            "width": 64,
            "coco_url": url,
            "flickr_url": "http://x/y.jpg",
            "license": 1,
            **lists,
        }

    def annotation(id_: int, image_id: int, category_id: int) -> dict[str, Any]:
        box = {
            "id": id_,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": [4.0, 5.0, 20.0, 10.0],
            "area": 150.0,
        }
        return {**box, "segmentation": [[4.0, 5.0, 24.0, 5.0, 24.0, 15.0]]}

    return {
        "images": [
            image(397133, "val2017", neg_category_ids=[3], not_exhaustive_category_ids=[1]),
            image(25, "train2017", neg_category_ids=[], not_exhaustive_category_ids=[]),
            image(30, "train2017", neg_category_ids=[1, 5], not_exhaustive_category_ids=[]),
        ],
        "annotations": [annotation(1, 397133, 1), annotation(2, 25, 3)],
        "categories": [
            {"id": 1, "name": "aerosol_can", "synset": "aerosol.n.02", "frequency": "c", "image_count": 64},
            {"id": 3, "name": "alcohol", "frequency": "f"},
            {"id": 5, "name": "alligator", "frequency": "r"},
        ],
    }


@pytest.fixture
def lvis(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Writes an LVIS json and its images; returns both places."""

    def written(values: dict[str, Any] | None = None, folders: bool = True) -> tuple[Path, Path]:
        values = values or lvis_values()
        images = tmp_path / "coco"
        for shade, (split, id_) in enumerate((("val2017", 397133), ("train2017", 25), ("train2017", 30))):
            an_image(images / (split if folders else "") / f"{id_:012d}.jpg", 50 * shade)
        file = tmp_path / "lvis_v1_val.json"
        file.write_text(json.dumps(values))
        return file, images

    return written


@pytest.mark.parametrize("folders", [True, False])
def test_lvis_is_read_packed_and_comes_back(
    lvis: Callable[..., tuple[Path, Path]], tmp_path: Path, folders: bool
) -> None:
    file, images = lvis(folders=folders)
    assert check_coco(file, images, reading=ALONE) == []
    pack(file, images, tmp_path / "shards", workers=1)
    index = ShardIndex.load(tmp_path / "shards")
    assert index.protocol == "lvis"
    assert index.categories.frequencies == {1: "c", 3: "f", 5: "r"}
    assert check_shards(tmp_path / "shards", workers=1) == []
    reader = ShardReader(index)
    truth = GroundTruth.of(reader.annotations(0, row) for row in range(3))
    reader.close()
    stored = {image["id"]: image for image in truth.to_coco(index.categories)["images"]}
    place = "val2017/000000397133.jpg" if folders else "000000397133.jpg"
    assert stored[397133] == {
        "id": 397133, "file_name": place, "height": 48, "width": 64,
        "neg_category_ids": [3], "not_exhaustive_category_ids": [1],
    }  # fmt: skip
    assert stored[30]["neg_category_ids"] == [1, 5]
    assert stored[25]["neg_category_ids"] == stored[25]["not_exhaustive_category_ids"] == []


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("http://[no.address/val2017/7.jpg", "missing image"),
        ("http://host/val2017/a\0b.jpg", "missing image"),
        ("http://host/../secret.jpg", "outside image"),
        ("http://host/", "bad entry"),
    ],
)
def test_an_address_that_names_no_image_in_the_folder_is_a_finding(
    lvis: Callable[..., tuple[Path, Path]], tmp_path: Path, url: str, kind: str
) -> None:
    an_image(tmp_path / "secret.jpg")
    values = lvis_values()
    values["images"][2]["coco_url"] = url
    found = check_coco(*lvis(values), reading=ALONE)
    assert [(finding.kind, finding.where.split()[:2]) for finding in found if finding.severity == "error"] == [
        (kind, ["image", "30"])
    ]


def test_the_images_of_lvis_are_found_near_the_json(lvis: Callable[..., tuple[Path, Path]]) -> None:
    file, images = lvis()
    (found,) = read_sets(file).values()
    assert (found.protocol, found.folder, found.findings) == ("lvis", images, [])


def test_an_image_that_is_not_there_is_named_as_its_url_ends(lvis: Callable[..., tuple[Path, Path]]) -> None:
    file, images = lvis()
    (images / "val2017/000000397133.jpg").unlink()
    (finding,) = check_coco(file, images, reading=ALONE)
    assert finding.kind == "missing image"
    assert "val2017/000000397133.jpg" in finding.where + finding.what


def damage_list(values: dict[str, Any]) -> None:
    values["images"][1]["neg_category_ids"] = [3, 77, 4]


def damage_type(values: dict[str, Any]) -> None:
    values["images"][1]["not_exhaustive_category_ids"] = [1, "one"]


def drop_list(values: dict[str, Any]) -> None:
    del values["images"][1]["neg_category_ids"]


def damage_frequency(values: dict[str, Any]) -> None:
    values["categories"][1]["frequency"] = "often"


IN_25 = "image 25 (train2017/000000000025.jpg)"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (damage_list, Finding("unknown category", IN_25, "neg_category_ids lists [4, 77]")),
        (
            damage_type,
            Finding("bad entry", IN_25, "not_exhaustive_category_ids [1, 'one'] is no list of whole numbers"),
        ),
        (drop_list, Finding("missing list", IN_25, "no neg_category_ids; taken: an empty list", "warning")),
        (
            damage_frequency,
            Finding("missing frequency", "category alcohol", "frequency 'often' is none of r, c, f", "warning"),
        ),
    ],
)
def test_what_is_wrong_with_lvis_lists_and_frequencies_is_found(
    damage: Callable[[dict[str, Any]], None], expected: Finding, lvis: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    values = lvis_values()
    damage(values)
    file, images = lvis(values)
    assert check_coco(file, images, reading=ALONE) == [expected]
    if expected.severity == "error":
        with pytest.raises(ValueError, match=expected.kind):
            pack(file, images, tmp_path / "shards", workers=1)


def test_a_protocol_is_recognised_or_told(lvis: Callable[..., tuple[Path, Path]], tmp_path: Path) -> None:
    file, images = lvis()
    found = read_annotations(file, images, Reading(protocol="coco"))
    assert (found.protocol, found.categories.frequencies, found.images[0].neg_category_ids) == ("coco", {}, None)
    values = lvis_values()
    values["annotations"][0]["is_group_of"] = 1
    values["categories"][0]["supercategory"] = "alcohol"
    file, images = lvis(values)
    found = read_annotations(file, images)
    assert (found.protocol, found.categories.parents) == ("openimages", {1: (3,)})
    assert found.images[-1].annotations[0]["iscrowd"] == 1
    for image in values["images"]:
        del image["neg_category_ids"], image["not_exhaustive_category_ids"]
    file, images = lvis(values)
    assert read_annotations(file, images).protocol == "coco"


def test_a_set_of_cocos_protocol_has_the_bytes_that_it_had(
    lvis: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    """Nothing of another protocol is in its index or in a sample."""
    file, images = lvis()
    pack(file, images, tmp_path / "shards", workers=1, reading=Reading(protocol="coco"))
    values = json.loads((tmp_path / "shards/index.json").read_bytes())
    assert list(values) == ["version", "categories", "source", "shards"]
    assert values["categories"][0] == {"id": 1, "name": "aerosol_can"}
    assert b"category_ids" not in (tmp_path / "shards/shard-000000.tar").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "voc"}, "protocol 'voc' is none that this release knows: coco, lvis, openimages"),
        ({"protocol": ["lvis"]}, "none that this release knows"),
        ({"categories": [{"id": 1, "name": "a", "frequency": "x"}]}, "a frequency is 'x', none of r, c, f"),
        ({"categories": [{"id": 1, "name": "a", "frequency": 3}]}, "'frequency' is 3"),
        ({"categories": [{"id": 1, "name": "a", "parents": [2]}]}, r"'parents' is \[2\]: not ids of categories"),
        ({"categories": [{"id": 1, "name": "a", "parents": [True]}]}, r"'parents' is \[True\]"),
        ({"categories": [{"id": 1, "name": "a", "parents": 1}]}, "'parents' is 1"),
        (
            {"categories": [{"id": i, "name": "a", **({"parents": [i - 1]} if i else {})} for i in range(67)]},
            "categories: more than 64 stand above 65",
        ),
    ],
)
def test_an_index_is_not_believed(
    change: dict[str, Any], message: str, lvis: Callable[..., tuple[Path, Path]], tmp_path: Path
) -> None:
    file, images = lvis()
    pack(file, images, tmp_path / "shards", workers=1)
    place = tmp_path / "shards/index.json"
    place.write_text(json.dumps(json.loads(place.read_bytes()) | change))
    with pytest.raises(ValueError, match=message):
        ShardIndex.load(tmp_path / "shards")


@pytest.mark.parametrize("ids", [None, 3, {"1": 2}, [True], [1.5], ["1"], [2**63], [[1]]])
def test_a_sample_is_not_believed(ids: Any) -> None:
    entry = {"image_id": 1, "file_name": "a.jpg", "height": 1, "width": 1, "annotations": []}
    assert entry_from_json(json.dumps(entry | {"neg_category_ids": [1, -5]}).encode())["neg_category_ids"] == [1, -5]
    with pytest.raises(ValueError, match="'neg_category_ids' is"):
        entry_from_json(json.dumps(entry | {"neg_category_ids": ids}).encode())


def test_categories_are_equal_without_frequencies_and_parents() -> None:
    """As a checkpoint compares them; and they come back with both."""
    plain = Categories((1, 2), ("a", "b"))
    full = Categories((1, 2), ("a", "b"), {1: "r"}, {2: (1,), 1: (2,)})
    assert plain == full
    again = Categories.from_json(json.loads(json.dumps(full.to_json())))
    assert (again.frequencies, again.parents) == (full.frequencies, full.parents)
    assert full.above(2) == [2, 1], "a circle ends"
    assert plain.to_json() == [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}]


BOXES = """ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside
000026e7ee790996,xclick,/m/07j7r,1,0.25,0.5,0.125,0.75,0,1,0,0,0
000026e7ee790996,xclick,/m/0zvk5,1,0,1,0,0.5,0,1,1,0,0
000062a39995e348,xclick,/m/0k5j,1,0.5,1,0.5,1,0,1,0,0,0
ffff00000000dead,xclick,/m/0k5j,1,0.5,1,0.5,1,0,1,0,0,0
"""
LABELS = """ImageID,Source,LabelName,Confidence
000026e7ee790996,verification,/m/07j7r,1
000026e7ee790996,verification,/m/0zvk5,1
000026e7ee790996,verification,/m/07yv9,0
000062a39995e348,verification,/m/0zvk5,0
000062a39995e348,machine,/m/07j7r,0.7
0000575f5a03db70,verification,/m/0k5j,1
"""
CLASSES = "/m/07j7r,Tree\n/m/0zvk5,Helmet\n/m/07yv9,Vehicle\n/m/0k5j,Aircraft\n/m/01lcw4,Limousine\n"
TREE = {
    "LabelName": "/m/0bl9f",
    "Subcategory": [
        {"LabelName": "/m/07j7r"},
        {"LabelName": "/m/0zvk5", "Part": [{"LabelName": "/m/07j7r"}]},
        {"LabelName": "/m/07yv9", "Subcategory": [{"LabelName": "/m/0k5j"}, {"LabelName": "/m/01lcw4"}]},
        {"LabelName": "/m/07j7r", "Subcategory": [{"LabelName": "/m/01lcw4"}]},
    ],
}


@pytest.fixture
def open_images(tmp_path: Path) -> tuple[Path, Path]:
    """The files as they are offered, and three images in folders."""
    for name, text in (
        ("validation-annotations-bbox.csv", BOXES),
        ("validation-annotations-human-imagelabels-boxable.csv", LABELS),
        ("test-annotations-human-imagelabels-boxable.csv", LABELS.replace("/m/0zvk5,0", "/m/01lcw4,0")),
        ("class-descriptions-boxable.csv", CLASSES),
        ("bbox_labels_600_hierarchy.json", json.dumps(TREE)),
    ):
        (tmp_path / "csv").mkdir(exist_ok=True)
        (tmp_path / "csv" / name).write_text(text)
    for shade, name in enumerate(("0/000026e7ee790996", "0/000062a39995e348", "1/0000575f5a03db70")):
        an_image(tmp_path / "images" / f"{name}.jpg", 40 * shade)
    return tmp_path / "csv/validation-annotations-bbox.csv", tmp_path / "images"


def test_the_csv_of_open_images_is_read(open_images: tuple[Path, Path], tmp_path: Path) -> None:
    found = read_annotations(*open_images)
    assert found.protocol == "openimages"
    assert found.categories == Categories((1, 2, 3, 4, 5), ("Tree", "Helmet", "Vehicle", "Aircraft", "Limousine"))
    assert {id_: sorted(above) for id_, above in found.categories.parents.items()} == {4: [3], 5: [1, 3]}
    assert [finding.kind for finding in found.findings] == ["absent image"]
    first, labelled, second = found.images
    assert (first.file_name, labelled.file_name, second.file_name) == (
        "0/000026e7ee790996.jpg", "1/0000575f5a03db70.jpg", "0/000062a39995e348.jpg",
    )  # fmt: skip
    boxes = [(row["category_id"], row["bbox"], row["iscrowd"]) for row in first.annotations]
    assert boxes == [(1, [16.0, 6.0, 16.0, 30.0], 0), (2, [0.0, 0.0, 64.0, 24.0], 1)]
    # Of a class that is there all above it are verified, of one that is not (the vehicle) all below it.
    assert (first.neg_category_ids, second.neg_category_ids) == ([1, 2, 3, 4, 5], [2])
    assert (labelled.neg_category_ids, labelled.annotations) == ([3, 4], [])
    pack(*open_images, tmp_path / "shards", workers=1)
    index = ShardIndex.load(tmp_path / "shards")
    assert (index.protocol, index.categories.parents) == ("openimages", found.categories.parents)


def test_what_lies_beside_the_boxes_is_named_where_it_is_absent(open_images: tuple[Path, Path]) -> None:
    file, images = open_images
    for name in ("validation-annotations-human-imagelabels-boxable.csv", "bbox_labels_600_hierarchy.json"):
        (file.parent / name).unlink()
    found = read_annotations(file, images)
    whats = [finding.what for finding in found.findings if finding.kind == "absent companion"]
    assert whats == ["no file of image-level labels beside it", "no file of the hierarchy beside it"]
    (file.parent / "class-descriptions-boxable.csv").unlink()
    with pytest.raises(ValueError, match=r"put Open Images' class-descriptions-boxable\.csv beside"):
        read_annotations(file, images)


@pytest.mark.parametrize(
    "row",
    [
        "000026e7ee790996,x,/m/unknown,1,0,1,0,1,0,0,0,0,0",
        "000026e7ee790996,x,/m/07j7r,1,0,one,0,1,0,0,0,0,0",
        "000026e7ee790996,x,/m/07j7r,1,0",
        "000026e7ee790996,x,/m/07j7r,1,0,1,0,1,0,0,perhaps,0,0",
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(open_images: tuple[Path, Path], row: str) -> None:
    file, images = open_images
    file.write_text(BOXES + row + "\n")
    (finding,) = [found for found in read_annotations(file, images).findings if found.kind == "bad entry"]
    assert finding.where == "validation-annotations-bbox.csv, line 6"
    assert finding.what.startswith("needs a class that is described")


def test_what_to_do_with_a_csv_is_said(open_images: tuple[Path, Path], tmp_path: Path) -> None:
    file, images = open_images
    with pytest.raises(
        FileNotFoundError, match=r"validation-annotations-bbox\.csv holds boxes of Open Images: name it"
    ):
        read_annotations(file.parent, images)
    with pytest.raises(FileNotFoundError, match="name the folder of its images after it"):
        read_sets(file)
    with pytest.raises(ValueError, match="no CSV of Open Images' boxes: its first line lacks ImageID"):
        read_annotations(file.parent / "class-descriptions-boxable.csv", images)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none of its images is in"):
        read_annotations(file, tmp_path / "none")
