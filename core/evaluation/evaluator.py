"""Evaluation: shards in, detections out, scores of them.

A shard is the unit of work. A batch never crosses shards and holds images of one exact size. So its composition, and
with it every detection, is the same whichever process evaluates the shard and in whatever order.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ...data.batch import Batch, normalised
from ...data.categories import Categories
from ...data.index import ShardIndex
from ...data.parallel import until
from ...data.stream import evaluation_batches
from ..checkpoint.labels import check_evaluable
from ..checkpoint.trained import TrainedDetector
from ..model.postprocess import detections as top_detections
from .result import Measure, Result
from .scores import headline, scored


@dataclass(frozen=True)
class ShardResult:
    """Detections of one shard in COCO's result format: image_id, category_id, bbox (x, y, w, h) in pixels, score."""

    shard: int
    detections: list[dict]
    num_images: int
    num_not_finite: int = 0  # queries without a detection, because the model gave infinities or NaN for them


@dataclass(frozen=True)
class Evaluation:
    """A set evaluated: its ground truth as a COCO dictionary, all detections in the order of the shards, the result."""

    ground_truth: dict[str, Any]
    detections: list[dict]
    result: Result


def evaluate_shard(
    detector: TrainedDetector,
    index: ShardIndex,
    shard: int,
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> ShardResult:
    """Detect objects in every image of one shard; the detector's model is on `device` and in eval mode.

    `progress` is called after each batch with its number of images. When `stop()` says so, the rest is left out.
    """
    config = detector.config
    found: list[dict] = []
    num_images = num_not_finite = 0
    for batch in until(stop, evaluation_batches(index, shard, config.data, batch_size=config.eval.batch_size)):
        detections, not_finite = detect(detector, batch.to(torch.device(device)))
        found += detections
        num_not_finite += not_finite
        num_images += len(batch.image_ids)
        if progress is not None:
            progress(len(batch.image_ids))
    return ShardResult(shard, found, num_images, num_not_finite)


@torch.inference_mode()
def detect(detector: TrainedDetector, batch: Batch) -> tuple[list[dict], int]:
    """Detections in one batch in COCO's result format, with the set's category ids; and how many queries not finite."""
    images = normalised(batch.images, batch.padding_mask)
    predictions = detector.model(images, batch.padding_mask)
    results = top_detections(predictions, batch.original_sizes, detector.config.eval.top_k)
    found: list[dict] = []
    for image_id, result in zip(batch.image_ids.tolist(), results, strict=True):
        boxes_xywh = result.boxes_xyxy.clone()
        boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
        rows = zip(result.labels.tolist(), boxes_xywh.tolist(), result.scores.tolist(), strict=True)
        found += [
            {"image_id": image_id, "category_id": category_id(detector.categories, label), "bbox": box, "score": score}
            for label, box, score in rows
        ]
    return found, sum(result.num_not_finite for result in results)


def category_id(categories: Categories | None, label: int) -> int:
    """The dataset's own id of a label. A published checkpoint has no categories: its label index is the id."""
    return label if categories is None else categories.ids[label]


def merge(results: Iterable[ShardResult]) -> list[dict]:
    """All detections in the order of the shards, whatever the order of arrival."""
    ordered = sorted(results, key=lambda result: result.shard)
    shards = [result.shard for result in ordered]
    assert len(set(shards)) == len(shards), f"a shard was counted twice: {shards}"
    return [detection for result in ordered for detection in result.detections]


def evaluation(
    detector: TrainedDetector, index: ShardIndex, results: Iterable[ShardResult], weights: str, began: float
) -> Evaluation:
    """Merge the results of all shards, and score them against the shards' annotations.

    weights: their SHA-256, as in the result. began: when the evaluation did, by time.perf_counter.
    """
    results, ground_truth = list(results), index.ground_truth()
    found, num_not_finite = merge(results), sum(result.num_not_finite for result in results)
    result = Result(
        metrics=scored(ground_truth, found, num_not_finite),
        headline=headline(),
        images=index.num_samples,
        num_not_finite=num_not_finite,
        seconds=time.perf_counter() - began,
        time=time.time(),
        step=detector.step,
        epochs=detector.epochs,
        weights=weights,
        measure=Measure.of(detector.config, index),
    )
    return Evaluation(ground_truth, found, result)


def check_categories(detector: TrainedDetector, index: ShardIndex) -> None:
    """Raise ValueError that names the categories of the shards that the checkpoint does not know."""
    known: dict[int, str | None] = dict.fromkeys(range(detector.config.model.num_classes))
    remedy = "Evaluate on shards packed from data with the checkpoint's categories"
    if detector.categories is None:
        remedy = f"A published checkpoint's label is the category id. {remedy}"
    else:
        known = dict(zip(detector.categories.ids, detector.categories.names, strict=True))
    check_evaluable(index.categories, index.location, known, "the checkpoint", detector.path, remedy)


def without_score_of(index: ShardIndex) -> str:
    """The warning for shards without objects to evaluate on."""
    return f"{index.location}: {index.lack}, so evaluations on it give no {headline()} (-1)"
