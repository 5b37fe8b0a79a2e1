"""COCO's numbers against cases worked out by hand, and detections against a plain loop over single images."""

import contextlib
import copy
import io
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ddetr.core.checkpoint.trained import TrainedDetector
from ddetr.core.config import load
from ddetr.core.evaluation.coco import MEANINGS, coco_metrics
from ddetr.core.evaluation.evaluator import (
    ShardResult,
    check_categories,
    evaluate_shard,
    merge,
)
from ddetr.core.evaluation.scores import scored
from ddetr.core.model.detector import DeformableDetr
from ddetr.core.model.outputs import Predictions
from ddetr.core.model.postprocess import detections
from ddetr.data.batch import IMAGE_MEAN, IMAGE_STD
from ddetr.data.categories import Categories
from ddetr.data.index import ShardIndex, ShardReader
from ddetr.data.transforms import load_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval


def truth(*boxes: tuple[int, list[float]], category: int = 5) -> dict[str, Any]:
    """A COCO dictionary with one object per (image id, xywh)."""
    annotations = [
        {"id": number + 1, "image_id": image, "category_id": category, "bbox": box, "area": box[2] * box[3]}
        | {"iscrowd": 0}
        for number, (image, box) in enumerate(boxes)
    ]
    images = [{"id": image, "width": 640, "height": 480} for image in sorted({image for image, _ in boxes})]
    return {"images": images, "annotations": annotations, "categories": [{"id": category, "name": "thing"}]}


def found(image: int, box: list[float], score: float, category: int = 5) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_ground_truth_fed_back_is_perfect() -> None:
    boxes = [(1, [10.0, 20.0, 20.0, 20.0]), (1, [100.0, 50.0, 60.0, 50.0]), (2, [30.0, 30.0, 200.0, 150.0])]
    metrics = coco_metrics(truth(*boxes), [found(image, box, 0.9) for image, box in boxes])
    assert list(metrics) == list(MEANINGS)
    expected = dict.fromkeys(MEANINGS, 1.0) | {"AR1": 2 / 3}  # one detection of the first image's two objects
    assert metrics == pytest.approx(expected)


def test_one_box_of_known_overlap() -> None:
    # Shifted by 20 of 100 pixels: intersection 80, union 120, overlap 2/3: right at 0.50, 0.55, 0.60 and 0.65.
    metrics = coco_metrics(truth((1, [100.0, 100.0, 100.0, 100.0])), [found(1, [120.0, 100.0, 100.0, 100.0], 0.5)])
    assert metrics["AP"] == pytest.approx(0.4)
    assert metrics["AP50"] == pytest.approx(1.0)
    assert metrics["AP75"] == 0.0
    assert metrics["AP_large"] == pytest.approx(0.4)
    assert metrics["AP_small"] == metrics["AP_medium"] == metrics["AR_small"] == -1.0


def test_a_false_positive_ahead_halves_the_precision() -> None:
    box = [100.0, 100.0, 100.0, 100.0]
    metrics = coco_metrics(truth((1, box)), [found(1, [400.0, 300.0, 50.0, 50.0], 0.9), found(1, box, 0.8)])
    assert metrics["AP"] == pytest.approx(0.5)
    assert metrics["AR1"] == 0.0
    assert metrics["AR10"] == 1.0


def test_half_of_the_objects_found() -> None:
    first, second = [10.0, 10.0, 50.0, 50.0], [300.0, 200.0, 50.0, 50.0]
    metrics = coco_metrics(truth((1, first), (2, second)), [found(1, first, 0.9)])
    assert metrics["AP"] == pytest.approx(51 / 101)  # recall thresholds 0, 0.01 .. 0.5 of the 101
    assert metrics["AR100"] == 0.5


def test_no_detections_and_no_objects() -> None:
    assert coco_metrics(truth((1, [10.0, 10.0, 50.0, 50.0])), [])["AP"] == 0.0
    empty = {**truth((1, [10.0, 10.0, 50.0, 50.0])), "annotations": []}
    assert set(coco_metrics(empty, [found(1, [1.0, 1.0, 5.0, 5.0], 0.3)]).values()) == {-1.0}
    assert set(coco_metrics(empty, []).values()) == {-1.0}


def test_nothing_is_printed_or_changed(capsys: pytest.CaptureFixture[str]) -> None:
    ground_truth, detections = truth((1, [10.0, 10.0, 50.0, 50.0])), [found(1, [10.0, 10.0, 50.0, 50.0], 0.9)]
    before = copy.deepcopy((ground_truth, detections))
    coco_metrics(ground_truth, detections)
    assert (ground_truth, detections) == before
    assert capsys.readouterr().out == ""


def of_pycocotools(ground_truth: dict, detections: list[dict], category_ids: list[int]) -> dict[str, float]:
    """The numbers as pycocotools' own example computes them, from a COCO dictionary with ordinary ids."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(ground_truth)
        truth.createIndex()
        scored = COCOeval(truth, truth.loadRes(copy.deepcopy(detections)), "bbox")
        scored.params.catIds = category_ids
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return dict(zip(MEANINGS, scored.stats.tolist(), strict=True))


def drawn(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Five images (ids 1..5, the last one empty) with objects of three categories (1..3), crowds among them, and
    detections near some of them, far from others, of the wrong category, with equal scores."""
    random = np.random.default_rng(seed)
    annotations, detections = [], []
    for number in range(24):
        image, category = int(random.integers(1, 5)), int(random.integers(1, 4))
        x, y, *sides = (float(value) for value in random.uniform(4, 300, 4))
        area = sides[0] * sides[1] * float(random.uniform(0.3, 1))
        annotations.append({"id": number + 1, "image_id": image, "category_id": category, "bbox": [x, y, *sides]})
        annotations[-1] |= {"area": area, "iscrowd": int(number % 8 == 7)}
        for _ in range(int(random.integers(0, 4))):
            moved = [float(value) for value in np.array([x, y, *sides]) + random.normal(0, 12, 4)]
            guess = category if random.random() < 0.8 else int(random.integers(1, 4))
            detections.append(found(image, [*moved[:2], *map(abs, moved[2:])], round(float(random.random()), 1), guess))
    images = [{"id": image, "width": 640, "height": 640} for image in range(1, 6)]
    categories = [{"id": category, "name": f"class {category}"} for category in (1, 2, 3)]
    return {"images": images, "annotations": annotations, "categories": categories}, detections


def renamed(
    truth: dict[str, Any], detections: list[dict[str, Any]], image: Callable[[int], Any], category: Callable[[int], Any]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The same set under other ids of images and categories."""

    def row(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "image_id": image(values["image_id"]), "category_id": category(values["category_id"])}

    images = [{**values, "id": image(values["id"])} for values in truth["images"]]
    categories = [{**values, "id": category(values["id"])} for values in truth["categories"]]
    annotations = [row(values) for values in truth["annotations"]]
    new = {"images": images, "annotations": annotations, "categories": categories}
    return new, [row(values) for values in detections]


ANNOTATION_IDS: dict[str, Callable[[int], Any]] = {
    "from 0": lambda n: n,
    "all 0": lambda n: 0,
    "all equal": lambda n: 7,
    "in pairs": lambda n: n // 2,
    "negative": lambda n: -n,
    "large": lambda n: 2**63 - 1 - n,
    "of numpy": np.int64,
    "texts": str,
    "missing": lambda n: None,
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ids", ANNOTATION_IDS)
def test_the_ids_of_annotations_change_no_number(ids: str, seed: int) -> None:
    truth, detections = drawn(seed)
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    assert 0 < expected["AP"] < 1
    assert coco_metrics(truth, detections) == expected
    for number, annotation in enumerate(truth["annotations"]):
        annotation["id"] = ANNOTATION_IDS[ids](number)
        if annotation["id"] is None:
            del annotation["id"]
    assert coco_metrics(truth, detections) == expected


def test_an_object_with_id_0_that_is_found_is_found() -> None:
    ground_truth = truth((1, [100.0, 100.0, 50.0, 50.0]))
    ground_truth["annotations"][0]["id"] = 0
    assert coco_metrics(ground_truth, [found(1, [100.0, 100.0, 50.0, 50.0], 0.9)])["AP"] == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("image", "category"),
    [
        (lambda i: i - 1, lambda c: c - 1),
        (lambda i: i, lambda c: c - 3),
        (np.int64, np.int32),
        (lambda i: 2**63 - 9 + i, lambda c: c - 2**63),
    ],
    ids=["from 0", "negative", "of numpy", "large"],
)
def test_the_ids_of_images_and_categories_change_no_number(
    image: Callable[[int], Any], category: Callable[[int], Any], seed: int
) -> None:
    truth, detections = drawn(seed)
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    assert coco_metrics(*renamed(truth, detections, image, category)) == expected


def test_fields_beside_those_of_boxes_change_no_number() -> None:
    truth, detections = drawn(0)
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    for number, annotation in enumerate(truth["annotations"]):
        annotation |= {"ignore": number % 2, "_ignore": 1, "segmentation": [], "score": 0.0}
    noise = {"ignore": 1, "id": 0, "area": -1.0, "iscrowd": 1, "segmentation": [], "caption": "none"}
    assert coco_metrics(truth, [{**detection, **noise} for detection in detections]) == expected


def test_a_missing_area_or_crowd_flag_is_what_packing_makes_of_it() -> None:
    truth, detections = drawn(1)
    for annotation in truth["annotations"]:
        annotation |= {"area": annotation["bbox"][2] * annotation["bbox"][3], "iscrowd": 0}
    expected = of_pycocotools(truth, detections, [1, 2, 3])
    for annotation in truth["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    assert coco_metrics(truth, detections) == expected


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("listed", [[1, 2], [3]])
def test_detections_of_categories_that_the_set_does_not_list_do_not_count(listed: list[int], seed: int) -> None:
    whole, detections = drawn(seed)
    expected = of_pycocotools(whole, detections, listed)
    annotations = [row for row in whole["annotations"] if row["category_id"] in listed]
    categories = [row for row in whole["categories"] if row["id"] in listed]
    assert coco_metrics({**whole, "annotations": annotations, "categories": categories}, detections) == expected
    assert expected != of_pycocotools(whole, detections, [1, 2, 3])


@pytest.mark.parametrize("softmax", [False, True])
def test_a_query_that_is_not_finite_detects_nothing(softmax: bool) -> None:
    """The others detect what they would without it."""
    generator = torch.Generator().manual_seed(1)
    logits, boxes = torch.randn(2, 9, 4, generator=generator), torch.rand(2, 9, 4, generator=generator)
    logits[0, 2, 1], logits[0, 3], logits[1, 4, 0] = torch.nan, torch.inf, -torch.inf
    boxes[0, 5, 3], boxes[0, 6, 0] = torch.nan, -torch.inf
    sizes = torch.tensor([[480, 640], [96, 64]])
    for top_k in (3, 100):
        found = detections(Predictions.of([(logits, boxes)], softmax=softmax), sizes, top_k)
        assert [result.num_not_finite for result in found] == [4, 1]
        for image, good in enumerate(([0, 1, 4, 7, 8], [0, 1, 2, 3, 5, 6, 7, 8])):
            alone = Predictions.of([(logits[image : image + 1, good], boxes[image : image + 1, good])], softmax=softmax)
            (expected,) = detections(alone, sizes[image : image + 1], top_k)
            assert torch.equal(found[image].scores, expected.scores)
            assert torch.equal(found[image].labels, expected.labels)
            assert torch.equal(found[image].boxes_xyxy, expected.boxes_xyxy)


def test_an_evaluation_that_met_infinities_or_nan_has_no_score() -> None:
    box = [10.0, 10.0, 50.0, 50.0]
    diverged = scored(truth((1, box)), [found(1, box, 0.9)], num_not_finite=3)
    assert list(diverged) == list(MEANINGS)
    assert all(math.isnan(value) for value in diverged.values())
    assert scored(truth((1, box)), [found(1, box, 0.9)])["AP"] == pytest.approx(1.0)


@given(st.permutations(range(6)))
@settings(max_examples=20, deadline=None)
def test_merged_in_one_order_whatever_the_arrival(order: list[int]) -> None:
    results = [ShardResult(shard, [{"image_id": shard * 10 + n} for n in range(shard % 3)], 1) for shard in range(6)]
    expected = [detection for result in results for detection in result.detections]
    assert merge([results[shard] for shard in order]) == expected


def test_a_shard_counted_twice_is_refused() -> None:
    with pytest.raises(AssertionError, match="counted twice"):
        merge([ShardResult(1, [], 1), ShardResult(1, [], 1)])


@pytest.fixture(scope="module")
def index(synthetic_shards: Path) -> ShardIndex:
    return ShardIndex.load(synthetic_shards)


@pytest.fixture(scope="module")
def detector(index: ShardIndex) -> TrainedDetector:
    overrides = ["model.hidden_dim=64", "model.encoder_layers=1", "model.decoder_layers=2", "eval.top_k=20"]
    config = load("tiny", [*overrides, "model.num_classes=3", "data.validation_short_side=64", "data.long_side=96"])
    torch.manual_seed(3)
    model = DeformableDetr(config.model).eval().requires_grad_(False)
    for head in model.class_embed:
        head.weight.normal_(std=0.5)
    return TrainedDetector(model, config, index.categories, step=7, epochs=1, path=Path("detector"))


def test_detections_are_those_of_single_images_in_pixels_of_the_file(
    index: ShardIndex, detector: TrainedDetector
) -> None:
    counted: list[int] = []
    result = evaluate_shard(detector, index, 0, "cpu", counted.append)
    samples = index.shards[0].samples
    assert result.num_images == len(samples) == sum(counted)
    by_image: dict[int, list[dict]] = {}
    for row in result.detections:
        by_image.setdefault(row["image_id"], []).append(row)
    assert set(by_image) == set(samples["image_id"].tolist()), "an image without objects has detections too"
    assert {row["category_id"] for row in result.detections} <= set(index.categories.ids)

    reader = ShardReader(index)
    for number in range(0, len(samples), 5):
        pixels = load_image(reader.image(0, number))
        height, width = pixels.shape[:2]
        scale = min(64 / min(height, width), 96 / max(height, width))
        size = (round(width * scale), round(height * scale))
        assert max(size) <= 96
        resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR), dtype=np.float32) / 255
        normal = (resized - np.array(IMAGE_MEAN, np.float32)) / np.array(IMAGE_STD, np.float32)
        images = torch.from_numpy(normal).permute(2, 0, 1)[None]
        with torch.no_grad():
            predictions = detector.model(images, torch.zeros(1, size[1], size[0], dtype=torch.bool))
        scores = predictions.logits[0].sigmoid()
        queries, labels = np.unravel_index(scores.flatten().argsort(descending=True)[:20].numpy(), scores.shape)
        rows = by_image[int(samples[number]["image_id"])]
        assert [row["score"] for row in rows] == pytest.approx(scores[queries, labels].tolist(), abs=1e-4)
        for row, query, label in list(zip(rows, queries, labels, strict=True))[:5]:
            cx, cy, w, h = predictions.boxes[0, query].tolist()
            expected = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
            same_score = [r for r in rows if r["score"] == pytest.approx(row["score"], abs=1e-4)]
            ids = {r["category_id"] for r in same_score}
            assert index.categories.ids[label] in ids
            assert any(r["bbox"] == pytest.approx(expected, abs=0.05) for r in same_score)
    reader.close()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8])
def test_the_batch_size_changes_no_detection(index: ShardIndex, detector: TrainedDetector, batch_size: int) -> None:
    def by_image(config_batch_size: int) -> dict[int, list[dict]]:
        config = detector.config.model_copy(
            update={"eval": detector.config.eval.model_copy(update={"batch_size": config_batch_size})}
        )
        rows: dict[int, list[dict]] = {}
        for row in evaluate_shard(replace(detector, config=config), index, 0, "cpu").detections:
            rows.setdefault(row["image_id"], []).append(row)
        return rows

    expected, got = by_image(4), by_image(batch_size)
    assert expected.keys() == got.keys()
    for image_id, rows in expected.items():
        assert [r["score"] for r in got[image_id]] == pytest.approx([r["score"] for r in rows], abs=1e-4)


@pytest.mark.parametrize(
    ("ids", "names", "message"),
    [
        ((1, 23, 56), ("disc", "triangle", "star"), r"'cross' \(id 56\) is 'star' in the checkpoint"),
        (
            (1, 23),
            ("disc", "triangle"),
            r"'cross' \(id 56\) is not in the checkpoint; there are 'disc' \(id 1\), 'triangle' \(id 23\)\.",
        ),
        ((1, 23, 56, 90), ("disc", "triangle", "cross", "brush"), None),  # a part of what the checkpoint knows
        ((56, 1, 23), ("cross", "disc", "triangle"), None),  # another order of the labels
    ],
)
def test_categories_must_correspond(
    index: ShardIndex, detector: TrainedDetector, ids: tuple[int, ...], names: tuple[str, ...], message: str | None
) -> None:
    assert index.categories == Categories((1, 23, 56), ("disc", "triangle", "cross"))
    other = replace(detector, categories=Categories(ids, names))
    expectation = contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=message)
    with expectation:
        check_categories(other, index)


def test_a_published_checkpoints_label_is_the_category_id(index: ShardIndex, detector: TrainedDetector) -> None:
    published = replace(detector, categories=None)
    with pytest.raises(ValueError, match=r"'triangle' \(id 23\) is not in the checkpoint, 'cross'.* id 2\. A pub"):
        check_categories(published, index)
    ids = {row["category_id"] for row in evaluate_shard(published, index, 0, "cpu").detections}
    assert ids <= {0, 1, 2}
