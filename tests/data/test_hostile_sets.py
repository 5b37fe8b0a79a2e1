"""Sets of strangers: files that lie outside, that are none, that state too much, annotations that have no end."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddetr.data.doctor import check_coco, check_shards
from ddetr.data.findings import FIXES, Finding
from ddetr.data.formats import read_annotations
from ddetr.data.index import INDEX_NAME, ShardIndex
from ddetr.data.sets import Reading
from ddetr.data.shards import pack

from tests.data.test_images import jpeg

Edit = Callable[[Callable[[dict[str, Any]], None]], Path]


def check(annotations: Path, images: Path, **options: Any) -> list[Finding]:
    findings = check_coco(annotations, images, reading=Reading(workers=1, **options))
    assert all(finding.kind in FIXES for finding in findings)
    return [finding for finding in findings if finding.severity == "error"]


def refusal(annotations: Path, images: Path, output: Path, **options: Any) -> str:
    with pytest.raises(ValueError, match=r"nothing was packed|there is no index.json") as error:
        pack(annotations, images, output, workers=1, reading=Reading(**options))
    assert not (output / INDEX_NAME).exists()
    return str(error.value)


def first_image(coco: dict[str, Any], name: str) -> None:
    coco["images"][0]["file_name"] = name


@pytest.mark.parametrize("kind", ["dots", "absolute", "link", "linked folder"])
def test_an_image_outside_the_folder_is_read_only_when_that_is_allowed(coco_folder, edit: Edit, tmp_path, kind):
    images, secret = coco_folder / "images", tmp_path / "secret"
    secret.mkdir()
    (images / "000000.jpg").rename(secret / "x.jpg")
    name = {"dots": "../../secret/x.jpg", "absolute": str(secret / "x.jpg"), "link": "x.jpg"}.get(kind, "linked/x.jpg")
    if kind == "link":
        (images / "x.jpg").symlink_to(secret / "x.jpg")
    if kind == "linked folder":
        (images / "linked").symlink_to(secret)
    annotations = edit(lambda coco: first_image(coco, name))
    assert [(finding.kind, finding.where) for finding in check(annotations, images)] == [
        ("outside image", f"image 1 ({name})")
    ]
    told = refusal(annotations, images, tmp_path / "shards")
    assert f"{name} is {secret}/x.jpg, outside {images}" in told
    assert "--allow-outside" in told
    assert check(annotations, images, allow_outside=True) == []
    assert (
        pack(annotations, images, tmp_path / "shards", workers=1, reading=Reading(allow_outside=True)).num_samples == 20
    )


def test_a_folder_of_images_that_is_itself_a_link_is_no_way_out(coco_folder, tmp_path):
    (tmp_path / "linked").symlink_to(coco_folder / "images")
    os.symlink("000001.jpg", coco_folder / "images/000000.link")
    assert pack(coco_folder / "annotations.json", tmp_path / "linked", tmp_path / "shards", workers=1).num_samples == 20


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_a_finding_and_hangs_nothing(coco_folder, tmp_path, kind):
    image = coco_folder / "images/000000.jpg"
    image.unlink()
    if kind == "pipe":
        os.mkfifo(image)
    elif kind == "folder":
        image.mkdir()
    else:
        image.symlink_to("/dev/zero")
    annotations = coco_folder / "annotations.json"
    found = check(annotations, image.parent, allow_outside=True)
    assert [(finding.kind, finding.where) for finding in found] == [("not a file", "image 1 (000000.jpg)")]
    assert "pipes and devices are not read" in refusal(annotations, image.parent, tmp_path / "out", allow_outside=True)


@pytest.mark.parametrize("name", ["a\0b.jpg", "\ud800.jpg", "x" * 5000 + ".jpg", "a\x1b[31m.jpg", "images\n.jpg"])
def test_names_that_no_file_has_are_missing_images(coco_folder, edit: Edit, tmp_path, name):
    annotations = edit(lambda coco: first_image(coco, name))
    assert [finding.kind for finding in check(annotations, coco_folder / "images")] == ["missing image"]
    told = refusal(annotations, coco_folder / "images", tmp_path / "shards")
    assert all(line.isprintable() for line in told.splitlines())


def test_an_image_that_states_too_many_pixels_is_named_with_the_setting(coco_folder, tmp_path):
    annotations, images = coco_folder / "annotations.json", coco_folder / "images"
    (images / "000003.jpg").write_bytes(jpeg(65500, 65500))
    assert [(finding.kind, finding.where) for finding in check(annotations, images)] == [
        ("too large image", "image 4 (000003.jpg)")
    ]
    told = refusal(annotations, images, tmp_path / "shards")
    assert "image 4 (000003.jpg): the image states far more pixels than data.most_pixels=250000000" in told
    assert "--most-pixels" in told
    assert len(check(annotations, images, most_pixels=64 * 64 - 1)) == 20
    shutil.copy(images / "000004.jpg", images / "000003.jpg")
    assert check(annotations, images, most_pixels=64 * 64) == []
    index = pack(annotations, images, tmp_path / "shards", workers=1, reading=Reading(most_pixels=64 * 64))
    kinds = {finding.kind for finding in check_shards(tmp_path / "shards", workers=1, most_pixels=64 * 64 - 1)}
    assert index.num_samples == 20
    assert "too large image" in kinds


NUMBERS = [10**400, 1e300, float("nan"), True, "1e999", "one", [1], {"a": 1}]


@pytest.mark.parametrize(
    ("place", "names"),
    [("images", ("id", "height", "width")), ("annotations", ("id", "image_id", "category_id", "bbox"))],
)
def test_numbers_that_are_none_are_findings(coco_folder, edit: Edit, place, names):
    def change(coco: dict[str, Any]) -> None:
        entries = coco[place]
        template = entries[0]
        for number, (name, value) in enumerate((name, value) for name in names for value in NUMBERS):
            entries.append({**template, "id": 10_000 + number, "file_name": f"{number}.jpg", name: value})
        entries += (
            [{**template, "id": 20_000, "area": 10**400}, 1, None, [], "a", {}] if place == "annotations" else [1]
        )

    annotations = edit(change)
    coco = read_annotations(annotations, coco_folder / "images")
    assert len([finding for finding in coco.findings if finding.severity == "error"]) >= len(names) * len(NUMBERS)
    areas = [annotation["area"] for image in coco.images for annotation in image.annotations]
    assert max(areas) < 1e18


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"images": ' + "[" * 900 + "]" * 900 + ', "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
        '{"images": [{"id": 1}], "annotations": [], "categories": ' + "[" * 900 + "]" * 900 + "}",
        '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": true, "name": "a"}]}',
        '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1e400, "name": "a"}]}',
    ],
)
def test_a_json_without_end_is_a_user_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a.json: |nothing was packed") as error:
        pack(tmp_path / "a.json", tmp_path, tmp_path / "shards", workers=1)
    assert all(line.isprintable() for line in str(error.value).splitlines())


def test_an_xml_that_defines_entities_is_refused(coco_folder, tmp_path):
    bomb = (
        '<!DOCTYPE a [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;">]><annotation><filename>&b;</filename></annotation>'
    )
    outside = f'<!DOCTYPE a [<!ENTITY a SYSTEM "{coco_folder}/annotations.json">]><annotation>&a;</annotation>'
    for number, (text, encoding) in enumerate([(bomb, "utf-8"), (bomb, "utf-16"), (outside, "utf-8")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "a.xml").write_text(text, encoding)
        with pytest.raises(ValueError, match=r"it has a <!DOCTYPE>, which may define entities"):
            read_annotations(folder, coco_folder / "images")
    os.mkfifo(folder / "b.xml")
    (folder / "a.xml").unlink()
    with pytest.raises(ValueError, match="not an ordinary file"):
        read_annotations(folder, coco_folder / "images")


def test_a_voc_file_names_no_image_outside(coco_folder, tmp_path):
    secret = coco_folder / "annotations.json"
    size = "<size><width>64</width><height>64</height></size>"
    box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
    (tmp_path / "voc").mkdir()
    text = f"<annotation><filename>../{secret.name}</filename>{size}<object><name>a</name>{box}</object></annotation>"
    (tmp_path / "voc/a.xml").write_text(text)
    assert [finding.kind for finding in check(tmp_path / "voc", coco_folder / "images")] == ["outside image"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a [x, x]\nb: &b [*a, *a]\nnames: [*b, *b]", "aliases"),
        ("names: " + "[" * 5000, "nested too deeply|not valid YAML"),
        ("names: {.inf: a}", "as '.inf': each needs a number"),
        ("names: {null: a}", "as 'null': each needs a number"),
        ("- names", "no list `names`"),
        ("names: !!python/object/apply:os.system ['true']", "it has a tag"),
    ],
)
def test_a_yaml_of_a_stranger_is_a_user_error(coco_folder, tmp_path, text, message):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    (tmp_path / "labels/data.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"data.yaml.*({message})"):
        read_annotations(tmp_path / "labels", coco_folder / "images")


def test_the_images_of_yolo_are_looked_at_within_the_same_limits(coco_folder, tmp_path):
    images, labels = tmp_path / "images", tmp_path / "labels"
    images.mkdir()
    labels.mkdir()
    (labels / "classes.txt").write_text("a\n")
    shutil.copy(coco_folder / "images/000000.jpg", images / "good.jpg")
    (images / "bomb.jpg").write_bytes(jpeg(65500, 65500))
    (images / "out.jpg").symlink_to(coco_folder / "images/000001.jpg")
    os.mkfifo(images / "pipe.jpg")
    for name in ("good", "bomb", "out", "pipe"):
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1\n")
    found = {(finding.where, finding.kind) for finding in check(labels, images)}
    expected = {("image 1 (bomb.jpg)", "too large image"), ("image 4 (pipe.jpg)", "not a file")}
    assert found == expected | {("image 3 (out.jpg)", "outside image")}
    allowed = {(finding.where, finding.kind) for finding in check(labels, images, allow_outside=True)}
    assert allowed == expected
    os.mkfifo(labels / "more.txt")
    shutil.copy(coco_folder / "images/000002.jpg", images / "more.jpg")
    assert ("more.txt", "bad entry") in {(finding.where, finding.kind) for finding in check(labels, images)}


def test_packing_overwrites_and_deletes_nothing_that_it_has_not_made(coco_folder, tmp_path):
    output = tmp_path / "shards"
    output.mkdir()
    mine = [".download.partial", ".shard-1.tar.7.partial", ".index.json.partial", "notes.json"]
    for name in mine:
        (output / name).write_text("mine")
    (output / "shard-000000.tar").write_text("mine")
    with pytest.raises(FileExistsError, match=r"shard-000000.tar: a shard that nothing says to be of this set"):
        pack(coco_folder / "annotations.json", coco_folder / "images", output, workers=1)
    (output / "shard-000000.tar").unlink()
    (output / ".shard-000000.tar.1234567.partial").write_text("left by a killed one")
    pack(coco_folder / "annotations.json", coco_folder / "images", output, workers=1)
    left = {path.name for path in output.iterdir()}
    assert left == {*mine, INDEX_NAME, *(shard.name for shard in ShardIndex.load(output).shards)}
    assert {(output / name).read_text() for name in mine} == {"mine"}


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "1", '{"name": "../x.tar"}', "\x1b[31m"])
def test_a_sidecar_that_is_none_is_a_user_error(coco_folder, tmp_path, text):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/shard-000000.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"shard-000000.json: not what `ddetr data pack` notes beside a shard"
    ) as error:
        pack(coco_folder / "annotations.json", coco_folder / "images", tmp_path / "shards", workers=1)
    assert str(error.value).isprintable()
    assert (tmp_path / "shards/shard-000000.json").read_text() == text
