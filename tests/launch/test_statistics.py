"""`ddetr data stats` against pycocotools' own counts of the same json."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ddetr.core.config import load, with_classes
from ddetr.core.model.detector import build
from ddetr.data.batch import Batch
from ddetr.data.categories import Categories
from ddetr.data.index import ShardIndex
from ddetr.data.layout import SAMPLE_DTYPE, Shard
from ddetr.data.plan import StepPlan
from ddetr.data.shards import pack
from ddetr.data.statistics import OBJECT_DTYPE, read_objects
from ddetr.data.stream import TrainStream
from ddetr.data.synthetic import draw_set
from ddetr.launch.statistics import SIZES, by_size, padding_share, suggestions
from pycocotools.coco import COCO

from tests.processes import finished


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


@pytest.mark.integration
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


@pytest.mark.integration
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


@pytest.mark.integration
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


@pytest.mark.integration
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


def imagined(
    sizes: list[tuple[int, int]], boxes: list[tuple[int, float, float, bool]], classes: int
) -> tuple[ShardIndex, np.ndarray]:
    """An index of images of these (height, width), and objects (sample, width, height, crowd)."""
    samples = np.zeros(len(sizes), dtype=SAMPLE_DTYPE)
    samples["image_id"] = range(len(sizes))
    samples["height"], samples["width"] = np.array(sizes).T
    rows = [(sample, 0, width, height, width * height, crowd) for sample, width, height, crowd in boxes]
    objects = np.array(rows, dtype=OBJECT_DTYPE)
    samples["num_boxes"] = np.bincount(objects["sample"], minlength=len(sizes))
    categories = Categories(tuple(range(classes)), tuple(f"class {label}" for label in range(classes)))
    shard = Shard(Path("imagined/shard-000000.tar"), 1 << 20, "0" * 64, "0" * 64, samples)
    return ShardIndex("imagined", categories, {}, [shard]), objects


SIZES_OF_IMAGES = {
    "tiny": [(6, 9)],
    "small": [(96, 96), (64, 120)],
    "usual": [(480, 640), (640, 427), (500, 375)],
    "large": [(3000, 4000), (4000, 3000)],
    "huge": [(20000, 30000)],
    "strips": [(20, 3000), (3000, 16), (24, 24)],
    "mixed": [(50, 50), (50, 60), (3000, 4000)],
}
CONFIGURATIONS = {
    "r50": ["r50"],
    "two-stage": ["r50_two_stage"],
    "single scale": ["r50_single_scale_dc5"],
    "softmax": ["detr_r50"],
    "demo": ["tiny"],
    "small images": ["tiny", "data.long_side=40", "data.short_sides=[32]"],
    "long side decides": ["r50", "data.long_side=300"],
    "few queries": [
        "r50",
        "model.num_classes=7",
        "model.queries=3",
        "eval.top_k=2",
        "train.accumulation=4",
        "data.remainder=pad",
    ],
    "few detections": ["detr_r50", "eval.top_k=20", "model.queries=40"],
    "four parts": ["r50_two_stage", "train.accumulation=4", "eval.top_k=1000", "model.queries=5000"],
}


def drawn_objects(random: np.random.Generator, sizes: list[tuple[int, int]], most: int, share: float) -> list:
    """Up to `most` objects in an image, their sides up to this share of the image's."""
    objects = []
    for sample, (height, width) in enumerate(sizes):
        crowds = random.random(int(random.integers(1, most + 1))) < 0.1
        sides = random.uniform(0.2, 1, (len(crowds), 2)) * share * (width, height)
        objects += [(sample, *pair, crowd) for pair, crowd in zip(sides.tolist(), crowds.tolist(), strict=True)]
    return objects


@pytest.mark.parametrize("settings", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("sizes", SIZES_OF_IMAGES.values(), ids=SIZES_OF_IMAGES)
def test_nothing_is_advised_again_when_it_has_been_followed(sizes: list, settings: list[str]) -> None:
    """And what is advised changes a setting, and is possible."""
    preset, *overrides = settings
    random, advised = np.random.default_rng(0), 0
    for images, classes, most, share, ranks in (
        (1, 1, 1, 0.5, 1),
        (3, 3, 40, 0.02, 2),
        (11, 80, 150, 0.1, 1),
        (11, 2, 700, 0.02, 2),
        (40, 80, 20_000 // 40, 0.5, 4),
        (70, 3, 7, 0.01, 1),
    ):
        of_images = [sizes[number % len(sizes)] for number in range(images)]
        index, objects = imagined(of_images, drawn_objects(random, of_images, most, share), classes)
        config = load(preset, overrides)
        found = suggestions(index, objects, config, ranks)
        followed = [setting for settings, _ in found for setting in settings.split()]
        assert len({setting.partition("=")[0] for setting in followed}) == len(followed), "each is set once"
        best = load(preset, [*overrides, *followed])
        for setting in followed:
            section, _, key = setting.partition("=")[0].partition(".")
            before, after = (getattr(getattr(of, section), key) for of in (config, best))
            assert before != after, setting
        advised += len(found)
        assert suggestions(index, objects, best, ranks) == []
        assert with_classes(best, classes).model.num_classes == classes
        plan = StepPlan((images,), best.train.batch_size, best.train.accumulation, 0, ranks, 0, 64, best.data.remainder)
        assert plan.steps_per_epoch, "the run can be begun"
    assert advised


@pytest.mark.integration
def test_a_set_without_objects_gets_no_advice(tmp_path: Path) -> None:
    annotations = draw_set(tmp_path / "coco", images=4, size=96, classes=3, seed=0)
    coco = json.loads(annotations.read_text())
    for name, objects, told in (
        ("empty", [], "there is no box in it"),
        ("crowds", [{**row, "iscrowd": 1} for row in coco["annotations"]], "every box in it is a crowd"),
    ):
        annotations.write_text(json.dumps({**coco, "annotations": objects}))
        index = pack(annotations, annotations.parent / "images", tmp_path / name, workers=1)
        assert suggestions(index, read_objects(index, workers=1), load("r50")) == []
        result = finished("data", "stats", index.location)
        assert result.returncode == 0, result.stderr
        assert f"{told}: no detector can be trained on this set" in result.stdout
        assert "setting" not in result.stdout


def test_more_queries_than_the_first_stage_has_proposals_are_not_advised() -> None:
    """What the model itself gives for an image of that size is the limit."""
    index, objects = imagined([(64, 96)], [(0, 9.0, 9.0, False)] * 900, 3)
    config = load("tiny", ["data.validation_short_side=64", "model.queries=10000", "train.batch_size=1"])
    with torch.device("meta"):
        predictions = build(config.model)(torch.zeros(1, 3, 64, 96), torch.zeros(1, 64, 96, dtype=torch.bool))
    places = predictions.boxes.shape[1]
    assert 30 < places < 300
    fewer = load("tiny", ["data.validation_short_side=64", f"model.queries={places}", "train.batch_size=1"])
    for enough in (config, fewer):
        assert not any(setting.startswith("model.queries") for setting, _ in suggestions(index, objects, enough))
        (top_k,) = [int(of[11:]) for of, _ in suggestions(index, objects, enough) if of.startswith("eval.top_k=")]
        assert top_k == min(900, 3 * places)
    too_few = load("tiny", ["data.validation_short_side=64", f"model.queries={places - 1}", "train.batch_size=1"])
    assert any(setting.startswith("model.queries") for setting, _ in suggestions(index, objects, too_few))


def test_what_is_more_than_may_be_set_is_not_advised() -> None:
    index, objects = imagined([(480, 640)], [(0, 90.0, 90.0, False)] * 70_000, 3)
    advised = [setting for setting, _ in suggestions(index, objects, load("r50", ["train.batch_size=1"]))]
    assert not any(setting.startswith("model.queries=") for setting in advised), "105000, of at most 100000"


def test_fewer_images_than_ranks_are_repeated() -> None:
    index, objects = imagined([(480, 640)] * 2, [(0, 90.0, 90.0, False)], 3)
    config = load("tiny", ["train.batch_size=4"])
    reason = "the set has 2 images, fewer than there are ranks"
    assert ("data.remainder=pad", reason) in suggestions(index, objects, config, ranks=4)
    assert dict(suggestions(index, objects, config, ranks=2))["train.batch_size=2"] == "or fewer: the set has 2 images"


def test_of_a_single_level_the_first_stage_proposes_few() -> None:
    """64 x 96 pixels are 2 x 3 places at stride 32, 4 x 6 where it is dilated."""
    index, objects = imagined([(64, 96)], [(0, 9.0, 9.0, False)] * 50, 3)
    single = ["data.validation_short_side=64", "model.levels=1", "train.batch_size=1", "eval.top_k=1"]
    single += ["model.num_classes=3", "model.queries=100", "model.two_stage=true", "model.box_refine=true"]
    for dilation, places in ((False, 6), (True, 24)):
        config = load("r50", [*single, f"model.dilation={str(dilation).lower()}"])
        assert dict(suggestions(index, objects, config)).keys() >= {f"eval.top_k={min(50, 3 * places)}"}


def test_more_detections_than_queries_have_classes_are_not_advised() -> None:
    index, objects = imagined([(480, 640)], [(0, 90.0, 90.0, False)] * 90, 80)
    settings = ["train.batch_size=1", "eval.top_k=70"]
    softmax = dict(suggestions(index, objects, load("detr_r50", [*settings, "model.queries=90"])))
    assert list(softmax) == ["eval.top_k=90"]
    of_one_class, objects = imagined([(480, 640)], [(0, 90.0, 90.0, False)] * 90, 1)
    one = dict(suggestions(of_one_class, objects, load("detr_r50", [*settings, "model.num_classes=1"])))
    assert list(one) == ["eval.top_k=90"]  # 100 queries


def test_of_a_validation_set_only_what_evaluation_reads_is_advised(tmp_path: Path) -> None:
    index, objects = imagined([(96, 96)] * 3, [(0, 9.0, 9.0, False)] * 150, 2)
    config = load("r50", ["data.validation=./imagined", "data.train=elsewhere"])
    assert [setting for setting, _ in suggestions(index, objects, config)] == ["eval.top_k=150"]
    for own in (["data.validation=imagined"], ["data.validation=imagined", f"data.train={Path.cwd()}/imagined"]):
        given = [*own, "model.num_classes=80"]
        assert "model.num_classes=2" in dict(suggestions(index, objects, load("r50", given)))
        assert not any("num_classes" in setting for setting, _ in suggestions(index, objects, load("r50", own)))


@pytest.mark.integration
def test_the_command_prints_it(tmp_path: Path) -> None:
    annotations = draw_set(tmp_path / "coco", images=12, size=96, classes=3, seed=0)
    pack(annotations, annotations.parent / "images", tmp_path / "shards", workers=0)
    command = ("data", "stats", tmp_path / "shards")
    result = finished(*command, "--preset", "tiny", environment={"COLUMNS": "100"})
    assert result.returncode == 0, result.stderr
    for shown in ("objects by class and size", "aspect ratios", "padding, 8 images a rank", "disc"):
        assert shown in result.stdout
    large = finished(*command, "--preset", "r50")
    assert "train.batch_size=12" in large.stdout, large.stderr  # it would not fill a batch of 32
    wrong = finished(*command, "--preset", "tiny", "train.batch=3")
    assert wrong.returncode == 2
    assert "train.batch" in wrong.stderr
