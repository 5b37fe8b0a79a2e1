"""COCO's numbers against cases worked out by hand, and detections against a plain loop over single images."""

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ddetr.core.checkpoint.trained import TrainedDetector
from ddetr.core.config import load
from ddetr.core.evaluation.columns import packed, to_coco, unpacked
from ddetr.core.evaluation.evaluator import Count, check_categories, evaluate_shards
from ddetr.core.model.detector import DeformableDetr
from ddetr.core.model.outputs import Predictions
from ddetr.core.model.postprocess import detections
from ddetr.data.batch import IMAGE_MEAN, IMAGE_STD
from ddetr.data.categories import Categories
from ddetr.data.index import ShardIndex, ShardReader
from ddetr.data.transforms import load_image
from PIL import Image


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
    (result,) = evaluate_shards(detector, index, [0], "cpu", counted.append)
    samples = index.shards[0].samples
    assert len(result.truth.images) == len(samples) == sum(counted)
    by_image: dict[int, list[dict]] = {}
    for row in to_coco(result.detections):
        by_image.setdefault(row["image_id"], []).append(row)
    assert set(by_image) == set(samples["image_id"].tolist()), "an image without objects has detections too"
    assert set(result.detections["category_id"].tolist()) <= set(index.categories.ids)

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
        (result,) = evaluate_shards(replace(detector, config=config), index, [0], "cpu")
        for row in to_coco(result.detections):
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
    (found,) = evaluate_shards(published, index, [0], "cpu")
    assert set(found.detections["category_id"].tolist()) <= {0, 1, 2}


@pytest.mark.parametrize(
    "change",
    [
        {"images": "3"},
        {"images": -1},
        {"num_not_finite": None},
        {"bad_samples": "all"},
        {"bad_samples": [7]},
        {"seconds": {"sleeping": 1.0}},
        {"seconds": {"model": "long"}},
        {"seconds": None},
    ],
    ids=str,
)
def test_what_is_no_count_of_another_process_is_refused(
    index: ShardIndex, detector: TrainedDetector, change: dict[str, object]
) -> None:
    found, tallies = unpacked(Count(detector, index).to_bytes())
    Count(detector, index).merge([packed(found, tallies)])
    with pytest.raises(ValueError, match=next(iter(change))):
        Count(detector, index).merge([packed(json.dumps(json.loads(found) | change).encode(), tallies)])


@pytest.mark.parametrize("data", [b"", b"{}", b"[1, 1]\nab", b"[4]\nnull", b"[9, 0]\n{}", b"[true]\nx", b"[-1, 2]\nx"])
def test_bytes_of_another_program_are_no_count(index: ShardIndex, detector: TrainedDetector, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"not a tally|stands where|Expecting"):
        Count(detector, index).merge([data])
