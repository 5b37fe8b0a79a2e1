"""COCO evaluation: shards in, detections out, twelve numbers by pycocotools.

A shard is the unit of work. A batch never crosses shards and holds images of one exact size, so its composition,
and with it every detection, is the same whichever process evaluates the shard and in whatever order.
"""

import contextlib
import io
import math
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

METRICS = (
    "AP",
    "AP50",
    "AP75",
    "AP_small",
    "AP_medium",
    "AP_large",
    "AR1",
    "AR10",
    "AR100",
    "AR_small",
    "AR_medium",
    "AR_large",
)  # in the order of COCOeval.stats


@dataclass(frozen=True)
class ShardResult:
    """Detections of one shard in COCO's result format: image_id, category_id, bbox (x, y, w, h) in pixels, score."""

    shard: int
    detections: list[dict]
    num_images: int
    num_not_finite: int = 0  # queries without a detection, because the model gave infinities or NaN for them


@dataclass(frozen=True)
class Evaluation:
    """The one result of an evaluation: of all shards, in their order, whatever the order of arrival.

    metrics: COCO's twelve numbers by name. All are NaN when a query was not finite: no score of such a model may be
    preferred to another one's. A file has null for NaN.
    """

    detections: list[dict]
    metrics: dict[str, float]
    num_not_finite: int


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
    """Detections in one batch, in COCO's result format with the original category ids; and queries not finite."""
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


def evaluation(ground_truth: dict, results: Iterable[ShardResult]) -> Evaluation:
    """The results of all shards as one, scored against a COCO dictionary, which is not changed."""
    results = list(results)
    found, num_not_finite = merge(results), sum(result.num_not_finite for result in results)
    nothing: dict[str, float] = dict.fromkeys(METRICS, math.nan)
    metrics = nothing if num_not_finite else coco_metrics(ground_truth, found)
    return Evaluation(found, metrics, num_not_finite)


def check_categories(detector: TrainedDetector, index: ShardIndex) -> None:
    """Every category of the shards must be one that the checkpoint knows. Raises ValueError that names the others."""
    known: dict[int, str | None] = dict.fromkeys(range(detector.config.model.num_classes))
    remedy = "Evaluate on shards packed from data with the checkpoint's categories"
    if detector.categories is None:
        remedy = f"A published checkpoint's label is the category id. {remedy}"
    else:
        known = dict(zip(detector.categories.ids, detector.categories.names, strict=True))
    check_evaluable(index.categories, index.location, known, "the checkpoint", detector.path, remedy)


def without_ap(index: ShardIndex) -> str:
    """The warning for shards that lack objects."""
    return f"{index.location}: {index.lack}, so evaluations on it give no AP (-1)"


def coco_metrics(ground_truth: dict, detections: list[dict]) -> dict[str, float]:
    """The twelve numbers of COCOeval for boxes; -1 where no ground truth falls into the range, as pycocotools has it.

    ground_truth: a COCO dictionary; the ids of its annotations, and `ignore` in them, have no meaning, and a missing
    area or iscrowd is as `ddetr data pack` completes it. Detections of categories that it does not list do not count.
    detections: COCO's result format. Neither is changed.
    """
    from pycocotools.cocoeval import COCOeval

    assert {row["image_id"] for row in detections} <= {image["id"] for image in ground_truth["images"]}
    found = [{name: row[name] for name in ("image_id", "category_id", "bbox", "score")} for row in detections]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints, and writes into what it is given
        truth, results = _indexed(ground_truth, ground_truth["annotations"]), _indexed(ground_truth, found)
        evaluation = COCOeval(truth, results, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {name: float(value) for name, value in zip(METRICS, evaluation.stats, strict=True)}


def _indexed(ground_truth: dict, rows: list[dict]) -> Any:
    """A pycocotools.coco.COCO of annotations or detections in the images of a COCO dictionary.

    They are numbered anew, from 1: COCOeval takes a match with id 0 for none, and sees one of those with equal ids.
    """
    from pycocotools.coco import COCO

    completed = ({"area": row["bbox"][2] * row["bbox"][3], "iscrowd": 0, **row} for row in rows)
    numbered: Any = {**ground_truth, "annotations": [{**row, "id": n} for n, row in enumerate(completed, start=1)]}
    coco = COCO()
    coco.dataset = numbered
    coco.createIndex()
    return coco
