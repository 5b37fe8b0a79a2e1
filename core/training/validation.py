"""The evaluation of a checkpoint by all ranks of a run in progress."""

import logging
import time
from pathlib import Path

from ...data.index import ShardIndex
from ..checkpoint import load_detector
from ..checkpoint.weights import WEIGHTS
from ..config import Config
from ..evaluation import result
from ..evaluation.evaluator import Count, evaluate_shards
from ..evaluation.result import Result, weights_digest
from .heartbeat import Watch
from .messages import Failure
from .world import World

log = logging.getLogger("ddetr")


def evaluate(
    checkpoint: Path, config: Config, index: ShardIndex, world: World, watch: Watch, step: int
) -> tuple[Result, list[str]] | None:
    """Evaluate a saved checkpoint and record the result in its folder; None when some rank is asked to stop during it.

    Collective. Each rank evaluates every world.size-th shard, with its own copy of the weights, and matches what it
    finds with the ground truth; rank 0 adds up. Returns the damaged images that are left out, too: shard, key, and what
    is wrong. Raises on every rank ValueError for more of them than data.most_bad_samples allows, and OSError when one
    cannot read its shards.
    """
    began = time.perf_counter()
    watch.at("evaluating", step)
    detector = load_detector(checkpoint, world.device, config=config)
    count, error = Count(detector, index), None

    def one_batch(images: int) -> None:
        watch.at("evaluating", step)

    try:
        mine = range(world.rank, len(index.shards), world.size)
        for found in evaluate_shards(detector, index, mine, world.device, one_batch, watch.stop):
            count.add(found)
    except (ValueError, OSError) as own:  # of this rank alone: the others should end as well, and say why
        error = own
    failures = world.gather([Failure.of(error) if error else None], Failure | None)
    if failed := [failure for failure in failures if failure]:
        raise error or failed[0].error()
    if any(world.gather([watch.stop()], bool)):
        if world.rank == 0:
            log.warning("the evaluation of step %d is left for the run that continues this one", step)
        return None
    _, *others = world.bytes_to_first(count.to_bytes() if world.rank else b"") or [b""]

    def scored() -> tuple[Result, list[str]]:
        count.merge(others)
        found = count.result(weights_digest(checkpoint / WEIGHTS), began, by="train")
        try:
            result.write(checkpoint, found)
        except (OSError, ValueError) as error:  # the disk is full: the report has the numbers
            log.error("%s: its evaluation is not recorded: %s", checkpoint, error)
        return found, count.bad_samples

    return world.agree(scored, tuple[Result, list[str]])
