"""`ddetr data stats` against pycocotools' own counts of the same json."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ddetr.core.config import load
from ddetr.data.batch import Batch
from ddetr.data.index import ShardIndex
from ddetr.data.shards import pack
from ddetr.data.statistics import read_objects
from ddetr.data.stream import TrainStream
from ddetr.data.synthetic import draw_set
from ddetr.launch.statistics import SIZES, by_size, padding_share, suggestions
from pycocotools.coco import COCO


@pytest.fixture(scope="module", params=["drawn", "real"])
def coco_set(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[COCO, ShardIndex]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "drawn":
        annotations = draw_set(folder / "coco", images=40, size=256, classes=3, seed=1)
        images = annotations.parent / "images"
    else:
        coco: Path = request.getfixturevalue("coco_free")
        annotations, images = coco / "annotations.json", coco / "images"
    index = pack(annotations, images, folder / "shards", workers=0, shard_bytes=1 << 18)
    return COCO(str(annotations)), index


def test_objects_are_counted_as_pycocotools_counts_them(coco_set: tuple[COCO, ShardIndex]) -> None:
    coco, index = coco_set
    objects = read_objects(index, workers=2)
    assert len(objects) == len(coco.anns)
    assert np.array_equal(np.bincount(objects["sample"], minlength=index.num_samples), index.samples["num_boxes"])
    for label, category in enumerate(index.categories.ids):
        own = objects[(objects["label"] == label) & ~objects["iscrowd"]]
        expected = [
            len(coco.getAnnIds(catIds=[category], areaRng=[np.nextafter(low, -1), high], iscrowd=False))
            for low, high in SIZES.values()
        ]
        assert by_size(own) == expected
        crowds = (objects["label"] == label) & objects["iscrowd"]
        assert crowds.sum() == len(coco.getAnnIds(catIds=[category], iscrowd=True))
        seen_in = set(index.samples["image_id"][own["sample"]].tolist())
        assert seen_in == {coco.anns[i]["image_id"] for i in coco.getAnnIds(catIds=[category], iscrowd=False)}


def test_the_share_of_padding_is_that_of_the_stream(coco_set: tuple[COCO, ShardIndex]) -> None:
    _, index = coco_set
    settings = ["train.batch_size=8", "data.short_sides=[96,128]", "data.crop=false", "data.workers=0"]
    for similar in (True, False):
        config = load("tiny", [*settings, f"data.similar_sizes={similar}"])
        real = padded = 0
        for rank in range(2):
            stream = TrainStream(
                index, config.data, batch_size=8, accumulation=1, rank=rank, world_size=2, seed=config.train.seed
            )
            batches: list[Batch] = [batch for (batch,) in stream.steps(0)]
            real += sum(int(batch.sizes.prod(-1).sum()) for batch in batches)
            padded += sum(batch.padding_mask.numel() for batch in batches)
        assert padding_share(index, config, 2, similar) == pytest.approx(1 - real / padded)


def test_what_does_not_fit_the_set_is_suggested(coco_set: tuple[COCO, ShardIndex]) -> None:
    coco, index = coco_set
    objects = read_objects(index, workers=0)
    classes = f"model.num_classes={len(index.categories)}"
    as_stored = f"data.validation_short_side={int(index.samples['height'].max())}"
    fitting = load("r50", [classes, "train.batch_size=1", as_stored])
    assert suggestions(index, objects, fitting) == []
    most = max(len(coco.getAnnIds(imgIds=[image], iscrowd=False)) for image in coco.imgs)
    changed = [f"model.queries={most - 1}", "model.num_classes=7", f"train.batch_size={len(coco.imgs) - 15}"]
    found = dict(suggestions(index, objects, load("r50", [*changed, as_stored])))
    assert classes in found
    assert int(next(key for key in found if key.startswith("model.queries=")).partition("=")[2]) > most
    assert "leaves out 15 of" in found["data.remainder=pad"]


def test_tiny_images_are_not_enlarged_without_end(tmp_path: Path) -> None:
    annotations = draw_set(tmp_path / "coco", images=4, size=96, classes=3, seed=0)
    index = pack(annotations, annotations.parent / "images", tmp_path / "shards", workers=0)
    found = suggestions(index, read_objects(index), load("r50", ["model.num_classes=3", "train.batch_size=1"]))
    ((setting, reason),) = found
    assert setting.startswith("data.validation_short_side=")
    assert "enlarged" in reason
    overrides = setting.split()
    assert (
        suggestions(index, read_objects(index), load("r50", ["model.num_classes=3", "train.batch_size=1", *overrides]))
        == []
    )


def test_the_command_prints_it(tmp_path: Path) -> None:
    annotations = draw_set(tmp_path / "coco", images=12, size=96, classes=3, seed=0)
    pack(annotations, annotations.parent / "images", tmp_path / "shards", workers=0)
    command = [sys.executable, "-m", "ddetr.launch.cli", "data", "stats", str(tmp_path / "shards"), "--preset", "tiny"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "100"})
    assert result.returncode == 0, result.stderr
    for shown in ("objects by class and size", "aspect ratios", "padding, 8 images a rank", "disc"):
        assert shown in result.stdout
    large = subprocess.run([*command[:-2], "--preset", "r50"], capture_output=True, text=True, timeout=120)
    assert "train.batch_size=12" in large.stdout, large.stderr  # it would not fill a batch of 32
    wrong = subprocess.run([*command[:-2], "train.batch=3"], capture_output=True, text=True, timeout=120)
    assert wrong.returncode == 2
    assert "train.batch" in wrong.stderr
