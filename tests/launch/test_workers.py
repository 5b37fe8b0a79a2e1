"""A Ray worker, without Ray around it: how much it asks of the server from which it reads."""

from pathlib import Path

import numpy as np
import pytest
from ddetr.core.checkpoint import load_detector
from ddetr.core.evaluation.evaluator import evaluate_shards
from ddetr.data.index import ShardIndex
from ddetr.data.location import Location
from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set
from ddetr.launch.evaluators import CPU_THREADS
from ddetr.launch.workers import ShardWorker

from tests.data.file_server import FileServer

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("fetch", ["shards", "samples"])
def test_requests_grow_with_the_shards_and_not_with_their_square(
    fetch: str, run_directory: Path, tmp_path: Path
) -> None:
    """Opening asks about each shard, reading for each of them or each image."""
    draw_set(tmp_path / "coco", images=16, size=96, classes=3, seed=11, workers=1)
    settings = [f"data.cache={tmp_path}/cache", f"data.fetch={fetch}"]
    detector = load_detector(run_directory, overrides=settings)
    for shard_bytes in (64 << 10, 16 << 10, 4 << 10):
        folder = tmp_path / f"shards-{shard_bytes}"
        pack(tmp_path / "coco/annotations.json", tmp_path / "coco/images", folder, workers=1, shard_bytes=shard_bytes)
        index = ShardIndex.load(folder)
        count = len(index.shards)
        server, worker = FileServer(folder), ShardWorker(CPU_THREADS)
        try:
            worker.open(detector, Location(server.url))
            for shard in range(count):
                result = worker.detect(shard)
                (expected,) = evaluate_shards(detector, index, [shard], "cpu")
                assert np.array_equal(result.detections, expected.detections)
                assert result.truth.images == expected.truth.images
        finally:
            server.close()
        asked = [(method, name) for method, name, _ in server.requests]
        assert asked.count(("GET", "index.json")) == 1
        assert len([name for method, name in asked if method == "HEAD"]) == count
        gets = count if fetch == "shards" else 1 + 16  # the one finds out whether parts are given at all
        assert len(asked) == 1 + count + gets
    assert count >= 8
