"""`ddetr data ...` as a user runs it: output, exit status, nothing half-made."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from tests.processes import finished

pytestmark = pytest.mark.integration


def ddetr(*arguments: object) -> subprocess.CompletedProcess[str]:
    return finished("data", *map(str, arguments))


@pytest.fixture(scope="module")
def coco(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "coco"
    result = ddetr("synth", folder, "--images", 12, "--size", 64)
    assert result.returncode == 0, result.stderr
    return folder


def test_synth_pack_check_show(coco, tmp_path):
    shards, picture = tmp_path / "shards", tmp_path / "samples.png"
    assert ddetr("check", coco / "annotations.json", coco / "images").returncode == 0
    packed = ddetr("pack", coco / "annotations.json", coco / "images", shards, "--workers", 2)
    assert packed.returncode == 0, packed.stderr
    assert "12 images" in packed.stdout
    checked = ddetr("check", shards)
    assert checked.returncode == 0
    assert "0 error(s), 0 warning(s)" in checked.stdout
    shown = ddetr("show", shards, picture, "--count", 5)
    assert shown.returncode == 0, shown.stderr
    with Image.open(picture) as image:
        assert image.size == (1200, 800)
        assert len(image.getcolors(maxcolors=10**6) or ()) > 1000


def test_a_degenerate_box_stops_packing_with_one_message_and_its_fix(coco, tmp_path):
    values = json.loads((coco / "annotations.json").read_text())
    values["annotations"][2]["bbox"][3] = 0
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(values))
    result = ddetr("pack", broken, coco / "images", tmp_path / "shards")
    assert result.returncode == 2
    assert "annotation 3 of image" in result.stderr
    assert "--drop-degenerate" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "shards").exists()
    checked = ddetr("check", broken, coco / "images")
    assert checked.returncode == 1
    assert "degenerate box" in checked.stdout
    dropped = ddetr("pack", broken, coco / "images", tmp_path / "shards", "--drop-degenerate")
    assert dropped.returncode == 0
    assert "1 boxes without area were left out" in dropped.stdout


def test_a_json_without_its_images_folder_is_explained(coco, tmp_path):
    (tmp_path / "annotations.json").write_bytes((coco / "annotations.json").read_bytes())
    result = ddetr("check", tmp_path / "annotations.json")
    assert result.returncode == 2
    assert "name the folder of its images after it, IMAGES" in result.stderr


def test_what_a_stranger_put_into_a_set_is_told_with_the_option_that_takes_it(coco, tmp_path):
    values = json.loads((coco / "annotations.json").read_text())
    images = tmp_path / "images"
    shutil.copytree(coco / "images", images)
    (images / values["images"][0]["file_name"]).rename(tmp_path / "x.jpg")
    values["images"][0]["file_name"] = "../x.jpg"
    annotations = tmp_path / "annotations.json"
    annotations.write_text(json.dumps(values))
    refused = ddetr("pack", annotations, images, tmp_path / "shards", "--most-pixels", 4000)
    assert refused.returncode == 2
    assert "outside image: 1" in refused.stderr
    assert "--allow-outside" in refused.stderr
    checked = ddetr("check", annotations, images, "--allow-outside", "--most-pixels", 4000)
    assert checked.returncode == 1
    assert "too large image: 12" in checked.stdout
    assert "--most-pixels" in checked.stdout
    packed = ddetr("pack", annotations, images, tmp_path / "shards", "--allow-outside")
    assert packed.returncode == 0, packed.stderr
