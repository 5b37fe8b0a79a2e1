"""Every kind of finding, from a set broken in just that way."""

import json
import os
import shutil
from pathlib import Path

import pytest
from ddetr.data.doctor import check_coco, check_set, check_shards
from ddetr.data.findings import FIXES
from ddetr.data.formats import read_annotations
from ddetr.data.index import INDEX_NAME, ShardIndex
from ddetr.data.sets import Reading
from ddetr.data.shards import pack


def check(coco_folder: Path) -> list[tuple[str, str]]:
    findings = check_coco(coco_folder / "annotations.json", coco_folder / "images", reading=Reading(workers=1))
    assert all(finding.kind in FIXES for finding in findings)
    return [(finding.kind, finding.where) for finding in findings]


def test_a_clean_set_has_no_findings(coco_folder, synthetic_shards):
    assert check(coco_folder) == []
    assert check_shards(synthetic_shards, workers=1) == []


@pytest.mark.integration
def test_real_coco_is_clean(coco_free, tmp_path):
    assert check_coco(coco_free / "annotations.json", coco_free / "images", reading=Reading(workers=2)) == []
    pack(coco_free / "annotations_val.json", coco_free / "images", tmp_path, workers=1, shard_bytes=4 << 20)
    assert check_shards(tmp_path, workers=2) == []


def first(coco, key="annotations"):
    return coco[key][0]


BROKEN = [
    ("degenerate box", lambda c: first(c).update(bbox=[1, 1, 0, 5])),
    ("outside box", lambda c: first(c).update(bbox=[100, 1, 5, 5])),
    ("impossible box", lambda c: first(c).update(bbox=[1, 1, float("nan"), 5])),
    ("impossible box", lambda c: first(c).update(bbox=[1, 1, 5])),
    ("impossible box", lambda c: first(c).update(bbox=[9, 9, -5, 5])),
    ("overhanging box", lambda c: first(c).update(bbox=[50, 50, 30, 5])),
    ("unknown category", lambda c: first(c).update(category_id=2)),
    ("unknown category", lambda c: first(c).update(category_id="disc")),
    ("duplicate id", lambda c: first(c).update(id=c["annotations"][1]["id"])),
    ("duplicate id", lambda c: c["images"].append({**first(c, "images"), "file_name": "000001.jpg"})),
    ("duplicate file name", lambda c: c["images"].append({**first(c, "images"), "id": 999})),
    ("unknown image", lambda c: first(c).update(image_id=777)),
    ("missing image", lambda c: first(c, "images").update(file_name="nowhere.jpg")),
    ("wrong size", lambda c: first(c, "images").update(width=65)),
    ("bad entry", lambda c: first(c, "images").update(height="tall")),
    ("bad entry", lambda c: first(c, "images").update(id="one")),
    ("missing id", lambda c: first(c).pop("id")),
]


@pytest.mark.parametrize(("kind", "change"), BROKEN)
def test_each_fault_of_a_json_is_found(coco_folder, edit, kind, change):
    edit(change)
    kinds = {found for found, _ in check(coco_folder)}
    # An image that is gone or doubled shows in its annotations and in its content too.
    assert kind in kinds
    assert kinds <= {kind, "unknown image", "duplicate content"}


def test_a_finding_says_where(coco_folder, edit):
    edit(lambda coco: first(coco).update(category_id=2))
    annotation = first(json.loads((coco_folder / "annotations.json").read_text()))
    assert check(coco_folder) == [
        ("unknown category", f"annotation {annotation['id']} of image {annotation['image_id']}")
    ]


def test_broken_and_equal_images_are_found(coco_folder):
    images = coco_folder / "images"
    (images / "000004.jpg").write_bytes((images / "000004.jpg").read_bytes()[:500])
    shutil.copy(images / "000008.jpg", images / "000009.jpg")
    assert check(coco_folder) == [
        ("undecodable image", "image 5 (000004.jpg)"),
        ("duplicate content", "image 10 (000009.jpg)"),
    ]


@pytest.fixture
def shards(synthetic_shards, tmp_path) -> Path:
    return Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))


def kinds_of(shards: Path) -> list[tuple[str, str]]:
    return [(finding.kind, finding.where) for finding in check_shards(shards, workers=1)]


def test_missing_and_extra_shards_are_found(shards):
    (shards / "shard-000001.tar").rename(shards / "shard-000077.tar")
    assert kinds_of(shards) == [("extra shard", "shard-000077.tar"), ("missing shard", "shard-000001.tar")]


def test_a_changed_byte_is_found_in_its_sample(shards):
    shard = ShardIndex.load(shards).shards[0]
    with shard.path.open("r+b") as file:
        file.seek(int(shard.samples[3]["image_offset"]) + 700)
        file.write(b"\x00\x01\x02")
    assert kinds_of(shards) == [
        ("wrong bytes", "shard-000000.tar"),
        ("wrong bytes", f"shard-000000.tar, sample {shard.key(3)}"),
    ]


def test_a_cut_shard_is_found(shards):
    shard = ShardIndex.load(shards).shards[0]
    os.truncate(shard.path, int(shard.samples[2]["image_offset"]))
    found = kinds_of(shards)
    assert found[0] == ("wrong bytes", "shard-000000.tar")
    assert ("wrong bytes", f"shard-000000.tar, sample {shard.key(2)}") in found
    assert ("wrong bytes", f"shard-000000.tar, sample {shard.key(1)}") not in found


def test_an_index_that_disagrees_with_its_shards_is_found(shards):
    values = json.loads((shards / INDEX_NAME).read_text())
    values["categories"] = values["categories"][:2]
    sample = values["shards"][0]["samples"][0]
    sample["height"] += 1
    values["shards"][1]["samples"].pop()
    (shards / INDEX_NAME).write_text(json.dumps(values))
    found = kinds_of(shards)
    assert {kind for kind, _ in found} == {"unknown category", "wrong bytes"}
    wrong = [where for kind, where in found if kind == "wrong bytes"]
    assert wrong == [f"shard-000000.tar, sample {sample['key']}", "shard-000001.tar"]


def test_what_cannot_be_read_at_all_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index.json"):
        check_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        check_coco(tmp_path / "annotations.json", tmp_path)


def test_an_image_that_is_gone_since_the_set_was_read_is_found(coco_folder):
    coco = read_annotations(coco_folder / "annotations.json", coco_folder / "images")
    (coco_folder / "images/000004.jpg").unlink()
    assert [(finding.kind, finding.where) for finding in check_set(coco, workers=1)] == [
        ("undecodable image", "image 5 (000004.jpg)")
    ]


def test_what_is_no_tar_is_found(shards):
    shard = ShardIndex.load(shards).shards[0]
    shard.path.write_bytes(b"x" * shard.bytes)
    found = [finding for finding in check_shards(shards, workers=1) if finding.where == shard.name]
    assert [finding.what.partition(":")[0] for finding in found] == [
        "its sha256 is not the one in the index",
        "not a readable tar",
    ]


def test_a_key_in_two_shards_is_found(shards):
    values = json.loads((shards / INDEX_NAME).read_text())
    shutil.copy(shards / "shard-000000.tar", shards / "shard-000009.tar")
    values["shards"].append({**values["shards"][0], "name": "shard-000009.tar"})
    (shards / INDEX_NAME).write_text(json.dumps(values))
    key = values["shards"][0]["samples"][0]["key"]
    found = [finding for finding in check_shards(shards, workers=1) if finding.kind == "duplicate id"]
    assert len(found) == len(values["shards"][0]["samples"])
    assert (found[0].where, found[0].what) == (f"shard-000009.tar, sample {key}", "also in shard-000000.tar")


def test_a_box_that_leaves_its_image_is_found_in_a_shard(coco_folder, edit, tmp_path):
    path = edit(lambda coco: first(coco).update(bbox=[50, 50, 30, 5]))
    pack(path, coco_folder / "images", tmp_path / "shards", workers=1)
    assert [(finding.kind, finding.severity) for finding in check_shards(tmp_path / "shards", workers=1)] == [
        ("overhanging box", "warning")
    ]
