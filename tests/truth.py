"""The ground truth of shards as a COCO dictionary."""

from collections.abc import Iterable
from typing import Any

from ddetr.data.index import ShardIndex, ShardReader
from ddetr.data.truth import GroundTruth


def coco_truth(index: ShardIndex, shards: Iterable[int] | None = None) -> dict[str, Any]:
    """What packing has kept of the annotations of some shards (default: all), read from these."""
    reader = ShardReader(index)
    numbers = range(len(index.shards)) if shards is None else shards
    entries = [
        reader.annotations(number, row) for number in numbers for row in range(len(index.shards[number].samples))
    ]
    reader.close()
    return GroundTruth.of(entries).to_coco(index.categories)
