"""The evaluation of a checkpoint by all ranks of a run in progress."""

import logging
import time
from itertools import chain
from pathlib import Path

from ...data.index import ShardIndex
from ..checkpoint import load_detector
from ..checkpoint.weights import WEIGHTS
from ..config import Config
from ..evaluation import result
from ..evaluation.evaluator import ShardResult, evaluate_shard, evaluation
from ..evaluation.result import Result, weights_digest
from .heartbeat import Watch
from .world import World

log = logging.getLogger("ddetr")


def evaluate(
    checkpoint: Path, config: Config, index: ShardIndex, world: World, watch: Watch, step: int
) -> Result | None:
    """Evaluate a saved checkpoint and record the result in its folder; None when some rank is asked to stop during it.

    Collective. Each rank evaluates every world.size-th shard, with its own copy of the weights.
    """
    began = time.perf_counter()
    watch.at("evaluating", step)
    detector = load_detector(checkpoint, world.device, config=config)

    def one_batch(images: int) -> None:
        watch.at("evaluating", step)

    mine = [
        evaluate_shard(detector, index, shard, world.device, one_batch, watch.stop)
        for shard in range(world.rank, len(index.shards), world.size)
    ]
    if any(world.gather([watch.stop()], bool)):
        if world.rank == 0:
            log.warning("the evaluation of step %d is left for the run that continues this one", step)
        return None
    # A shard at a time: a message of a rank is limited to MOST_BYTES.
    rounds = range(-(-len(index.shards) // world.size))
    gathered = [world.to_first([_told(shard) for shard in mine[i : i + 1]], list[_Told]) for i in rounds]

    def scored() -> Result:
        heard, digest = (_heard(told) for told in chain(*chain(*gathered))), weights_digest(checkpoint / WEIGHTS)
        found = evaluation(detector, index, heard, digest, began).result
        try:
            result.write(checkpoint, found)
        except (OSError, ValueError) as error:  # the disk is full: the report has the numbers
            log.error("%s: its evaluation is not recorded: %s", checkpoint, error)
        return found

    return world.agree(scored, Result)


# What rank 0 is told of a shard: its number, its images, its queries that were not finite, and each detection's image,
# category, box and score.
_Told = tuple[int, int, int, list[tuple[int, int, list[float], float]]]


def _told(result: ShardResult) -> _Told:
    rows = [(row["image_id"], row["category_id"], row["bbox"], row["score"]) for row in result.detections]
    return result.shard, result.num_images, result.num_not_finite, rows


def _heard(told: _Told) -> ShardResult:
    shard, num_images, num_not_finite, rows = told
    keys = ("image_id", "category_id", "bbox", "score")
    return ShardResult(shard, [dict(zip(keys, row, strict=True)) for row in rows], num_images, num_not_finite)
