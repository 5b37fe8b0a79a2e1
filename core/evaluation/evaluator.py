"""Evaluation: shards in, detections out, scores of them.

A shard is the unit of work. A batch never crosses shards and holds images of one exact size. So its composition, and
with it every detection, is the same whichever process evaluates the shard and in whatever order.
"""

import json
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby

import numpy as np
import torch

from ...data.batch import Batch, normalised
from ...data.categories import Categories
from ...data.documents import parse_json
from ...data.index import SampleError, ShardIndex
from ...data.parallel import until
from ...data.stream import evaluation_batches
from ...data.truth import GroundTruth
from ...data.values import whole
from ..checkpoint.labels import check_evaluable
from ..checkpoint.trained import TrainedDetector
from ..model.postprocess import detections as top_detections
from .columns import DETECTION_DTYPE, packed, unpacked
from .result import PARTS, Measure, Result, seconds_in, texts_in
from .scores import Tallies, headline, most_detections


@dataclass(frozen=True, eq=False)
class ShardResult:
    """What was found in one shard. detections: rows of DETECTION_DTYPE. truth: of the images that were evaluated."""

    shard: int
    detections: np.ndarray
    truth: GroundTruth
    num_not_finite: int = 0  # queries without a detection, because the model gave infinities or NaN for them
    bad_samples: tuple[str, ...] = ()  # images left out: shard, key and what is wrong
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the work: "decoding", "model"
    host: str = field(default_factory=socket.gethostname)


def evaluate_shards(
    detector: TrainedDetector,
    index: ShardIndex,
    shards: Sequence[int],
    device: torch.device | str,
    progress: Callable[[int], None] | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[ShardResult]:
    """Detect objects in every image of some shards; the detector's model is on `device` and in eval mode.

    `progress` is called after each batch with its number of images. When `stop()` says so, the rest is left out.
    Raises SampleError for more damaged images than data.most_bad_samples allows.
    """
    config, num_bad = detector.config, 0
    top_k = most_detections(config.eval, index.protocol)
    batches = evaluation_batches(index, shards, config.data, batch_size=config.eval.batch_size)
    began = time.perf_counter()
    for shard, parts in groupby(until(stop, batches), key=lambda part: part.shard):
        found, entries, bad, num_not_finite = [np.empty(0, dtype=DETECTION_DTYPE)], [], [], 0
        seconds = {"decoding": 0.0, "model": 0.0}
        for part in parts:
            decoded = time.perf_counter()
            if part.batch is not None:
                detections, not_finite = detect(detector, part.batch.to(torch.device(device)), top_k)
                found.append(detections)
                num_not_finite += not_finite
            entries += part.entries
            bad += part.bad_samples
            num_bad += len(part.bad_samples)
            if part.bad_samples:
                check_damage(num_bad, part.bad_samples[-1], index, config.data.most_bad_samples)
            if progress is not None:
                progress(len(part.entries) + len(part.bad_samples))
            seconds["decoding"] += decoded - began
            began = time.perf_counter()
            seconds["model"] += began - decoded
        yield ShardResult(shard, np.concatenate(found), GroundTruth.of(entries), num_not_finite, tuple(bad), seconds)
        began = time.perf_counter()


def check_damage(num_bad: int, last: str, index: ShardIndex, most: float) -> None:
    """Raise SampleError if more than the share `most` of a set's images are damaged. last: one of them."""
    if num_bad > round(most * index.num_samples, 6):  # 0.29 of 100 are 29
        raise SampleError(
            f"{num_bad} of {index.num_samples} images cannot be evaluated, more than "
            f"data.most_bad_samples={most:g}; the last one: {last}"
        )


@torch.inference_mode()
def detect(detector: TrainedDetector, batch: Batch, top_k: int) -> tuple[np.ndarray, int]:
    """The best `top_k` detections in each image, rows of DETECTION_DTYPE; and how many queries are not finite."""
    images = normalised(batch.images, batch.padding_mask)
    predictions = detector.model(images, batch.padding_mask)
    results = top_detections(predictions, batch.original_sizes, top_k)
    counts = [len(result.scores) for result in results]
    found = np.empty(sum(counts), dtype=DETECTION_DTYPE)
    boxes_xywh = torch.cat([result.boxes_xyxy for result in results])
    boxes_xywh[:, 2:] -= boxes_xywh[:, :2]
    found["bbox"] = boxes_xywh.cpu().numpy()
    found["score"] = torch.cat([result.scores for result in results]).cpu().numpy()
    found["category_id"] = category_ids(detector.categories, torch.cat([result.labels for result in results]))
    found["image_id"] = np.repeat(batch.image_ids.numpy(), counts)
    return found, sum(result.num_not_finite for result in results)


def category_ids(categories: Categories | None, labels: torch.Tensor) -> np.ndarray:
    """The set's own ids of labels. A published checkpoint has no categories: its label index is the id."""
    found = labels.cpu().numpy()
    return found if categories is None else np.array(categories.ids, dtype=np.int64)[found]


class Count:
    """What was found in the shards that were evaluated so far, by this process and by others that were merged."""

    def __init__(self, detector: TrainedDetector, index: ShardIndex) -> None:
        self._detector, self._index = detector, index
        self._tallies = Tallies(index, detector.config.eval)
        self._found = _Found()

    @property
    def bad_samples(self) -> list[str]:
        """The images left out: shard, key and what is wrong."""
        return sorted(self._found.bad_samples)

    def add(self, result: ShardResult) -> None:
        """Count a shard. Raises SampleError for more damaged images than data.most_bad_samples allows."""
        began = time.perf_counter()
        self._tallies.add(result.truth, result.detections)
        seconds = result.seconds | {"scoring": time.perf_counter() - began}
        found = _Found(
            len(result.truth.images), result.num_not_finite, list(result.bad_samples), seconds, [result.host]
        )
        self._found = self._found.and_(found)
        self._check()

    def to_bytes(self) -> bytes:
        """All of it, for `merge` in another process."""
        return packed(json.dumps(asdict(self._found)).encode(), self._tallies.to_bytes())

    def merge(self, others: Sequence[bytes]) -> None:
        """Count what others have counted, too. Raises as `add`, and ValueError for what is no count."""
        began, parts = time.perf_counter(), [unpacked(other) for other in others]
        if any(len(part) != 2 for part in parts):
            raise ValueError("not a tally: it has not two parts")
        for found, _ in parts:
            self._found = self._found.and_(_Found.of(found))
        self._tallies.merge([tallies for _, tallies in parts])
        self._found.seconds["scoring"] = self._found.seconds.get("scoring", 0) + time.perf_counter() - began
        self._check()

    def result(self, weights: str, began: float, by: str) -> Result:
        """Score what was counted; nothing can be added afterwards.

        weights: their SHA-256, as in the result. began: when the evaluation did, by time.perf_counter. by: the command.
        """
        detector, found, scoring = self._detector, self._found, time.perf_counter()
        metrics = self._tallies.scores(found.num_not_finite)
        now = time.perf_counter()
        parts = found.seconds | {"scoring": found.seconds.get("scoring", 0) + now - scoring}
        return Result(
            metrics=metrics,
            headline=headline(self._index.protocol),
            protocol=self._index.protocol,
            top_k=most_detections(detector.config.eval, self._index.protocol),
            images=found.images,
            num_not_finite=found.num_not_finite,
            num_bad=len(found.bad_samples),
            seconds=now - began,
            parts=parts,
            time=time.time(),
            step=detector.step,
            epochs=detector.epochs,
            weights=weights,
            measure=Measure.of(detector.config, self._index),
            by=by,
            hosts=tuple(found.hosts),
        )

    def _check(self) -> None:
        if bad := self._found.bad_samples:
            check_damage(len(bad), bad[-1], self._index, self._detector.config.data.most_bad_samples)


@dataclass(frozen=True)
class _Found:
    images: int = 0
    num_not_finite: int = 0
    bad_samples: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # by part of the work, of all processes together
    hosts: list[str] = field(default_factory=list)

    @staticmethod
    def of(data: bytes) -> "_Found":
        """What another process found. Raises ValueError for anything else."""
        values = parse_json(data)
        counts = whole(values, "images"), whole(values, "num_not_finite")
        seconds = seconds_in(values, "seconds")
        return _Found(*counts, texts_in(values, "bad_samples"), seconds, texts_in(values, "hosts"))

    def and_(self, other: "_Found") -> "_Found":
        seconds = {name: self.seconds.get(name, 0) + other.seconds.get(name, 0) for name in PARTS}
        bad = self.bad_samples + other.bad_samples
        hosts = sorted({*self.hosts, *other.hosts})
        return _Found(self.images + other.images, self.num_not_finite + other.num_not_finite, bad, seconds, hosts)


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
    return f"{index.location}: {index.lack}, so evaluations on it give no {headline(index.protocol)} (-1)"
