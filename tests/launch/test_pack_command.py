"""`ddetr data pack` and `check` of whole exports, as they are typed."""

import json
import subprocess
from pathlib import Path

import pytest
from ddetr.data.index import ShardIndex
from ddetr.launch.data import check
from PIL import Image

from tests.processes import finished
from tests.truth import coco_truth

pytestmark = pytest.mark.integration

ROW = "1 0.5 0.5 0.25 0.5\n"


def ddetr(*arguments: object) -> subprocess.CompletedProcess[str]:
    return finished("data", *map(str, arguments))


@pytest.fixture
def export(tmp_path: Path) -> Path:
    """As Roboflow has it: two splits, a data.yaml that names a third, texts that are no labels."""
    root = tmp_path / "export"
    for number, split in enumerate(("train", "train", "valid")):
        for folder in ("images", "labels"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (number, 0, 0)).save(root / split / f"images/{number}.png")
        (root / split / f"labels/{number}.txt").write_text(ROW)
    (root / "README.roboflow.txt").write_text("Exported on a Monday.\n")
    (root / "data.yaml").write_text(
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\nnames: ['cat', 'no']\n"
    )
    return root


def test_each_split_of_an_export_is_packed_into_a_folder(export: Path, tmp_path: Path) -> None:
    packed = ddetr("pack", export, tmp_path / "shards")
    assert packed.returncode == 0, packed.stderr
    assert "absent split" in packed.stdout
    for split, images in (("train", 2), ("val", 1)):
        index = ShardIndex.load(tmp_path / "shards" / split)
        assert index.num_samples == images
        assert index.categories.names == ("cat", "no")
        assert f"shards/{split}: {images} images with {images} boxes of 2 categories" in packed.stdout
    again = ddetr("pack", export, tmp_path / "shards")
    assert again.returncode == 0, again.stderr


def test_one_split_is_packed_into_the_folder_itself(export: Path, tmp_path: Path) -> None:
    packed = ddetr("pack", export, tmp_path / "shards", "--split", "val")
    assert packed.returncode == 0, packed.stderr
    assert ShardIndex.load(tmp_path / "shards").num_samples == 1
    wrong = ddetr("pack", export, tmp_path / "other", "--split", "dev")
    assert wrong.returncode == 2
    assert "no split 'dev' in it; there is train, val" in wrong.stderr
    assert not (tmp_path / "other").exists()


def test_an_export_is_checked_split_by_split(export: Path) -> None:
    assert ddetr("check", export).returncode == 0
    (export / "valid/labels/2.txt").write_text(f"{ROW}7 0.5 0.5 0.25 0.5\n")
    checked = ddetr("check", export)
    assert checked.returncode == 1
    assert "export, train: 0 error(s), 1 warning(s)" in checked.stdout
    assert "export, val: 1 error(s), 0 warning(s)" in checked.stdout
    assert "category_id 7" in checked.stdout


def test_a_split_takes_the_classes_of_another_ones_shards(tmp_path: Path) -> None:
    """The second split lacks a class, which would shift the numbers of the others."""
    for split, names in (("train", ("ant", "bee", "cat")), ("val", ("bee", "cat"))):
        (tmp_path / split).mkdir()
        for name in names:
            Image.new("RGB", (64, 48)).save(tmp_path / split / f"{name}.png")
            box = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
            (tmp_path / split / f"{name}.xml").write_text(
                f"<annotation><object><name>{name}</name>{box}</object></annotation>"
            )
    assert ddetr("pack", tmp_path / "train", tmp_path / "shards/train").returncode == 0
    packed = ddetr("pack", tmp_path / "val", tmp_path / "shards/val", "--classes", tmp_path / "shards/train")
    assert packed.returncode == 0, packed.stderr
    train, val = (ShardIndex.load(tmp_path / "shards" / split) for split in ("train", "val"))
    assert train.categories == val.categories
    assert sorted(row["category_id"] for row in coco_truth(val)["annotations"]) == [2, 3]


def test_shards_are_not_written_among_the_images(tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "a.png", "width": 64, "height": 48}
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}
    file = tmp_path / "instances.json"
    file.write_text(json.dumps({"images": [image], "annotations": [box], "categories": [{"id": 1, "name": "ant"}]}))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "images/a.png")
    before = sorted(tmp_path.rglob("*"))
    packed = ddetr("pack", file, tmp_path / "images")  # OUT was forgotten
    assert packed.returncode == 2
    assert "choose another folder for OUT" in packed.stderr
    assert sorted(tmp_path.rglob("*")) == before
    assert check(file, None)
