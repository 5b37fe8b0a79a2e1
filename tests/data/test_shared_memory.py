"""The shared memory that loader processes take: as much as was said beforehand, and an error in words where it ends."""

import json
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from ddetr.data.batch import packed_bytes
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.loader import Loader
from ddetr.data.shared_memory import REMEDY, free_bytes, shared
from ddetr.data.stream import TrainStream
from torch.utils.data import DataLoader, IterableDataset

from tests.confinement import mount_memory, need_mounts
from tests.processes import finished

# A stream whose reader goes on when as much is taken as was said for each step, in a /dev/shm of its own.
READER = """
import json, os, sys, time
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.stream import TrainStream
shards, config, arguments, taken = map(json.loads, sys.argv[1:])
stream = TrainStream(ShardIndex.load(shards), DataConfig(**config), **arguments)
def used():
    status = os.statvfs("/dev/shm")
    return (status.f_blocks - status.f_bfree) * status.f_frsize
try:
    for expected, micro_batches in zip(taken, stream.steps(0)):
        deadline = time.monotonic() + 120
        while used() < expected:
            if time.monotonic() > deadline:
                sys.exit(f"{used()} bytes are taken, not {expected}")
            time.sleep(0.01)
except OSError as error:
    sys.exit(f"{type(error).__name__}: {error}")
finally:
    stream.close()
"""
CONFIG = {"short_sides": (320, 480), "long_side": 960, "crop": False, "shuffle_window": 16}


def read(
    folder: Path, shards: Path, size: int, workers: int, accumulation: int, taken: list[int]
) -> subprocess.CompletedProcess[str]:
    need_mounts()
    reader = folder / "reader.py"
    reader.write_text(READER)
    given = map(json.dumps, (str(shards), CONFIG | {"workers": workers}, arguments(accumulation), taken))
    return finished(*given, program=reader, first=partial(mount_memory, Path("/dev/shm"), size))


def arguments(accumulation: int) -> dict[str, int]:
    return {"batch_size": 4, "accumulation": accumulation, "rank": 0, "world_size": 1, "seed": 3}


def stream(shards: Path, workers: int, accumulation: int) -> TrainStream:
    return TrainStream(ShardIndex.load(shards), DataConfig(**CONFIG, workers=workers), **arguments(accumulation))


def whole_pages(number: int) -> int:
    return -(-number // 4096) * 4096


@pytest.mark.integration
@pytest.mark.parametrize(("workers", "accumulation"), [(2, 1), (1, 2)])
def test_what_is_needed_is_what_is_taken(
    workers: int, accumulation: int, synthetic_shards: Path, tmp_path: Path
) -> None:
    """Two batches of each loader process and those of a step are there, and for a moment those of two steps. A stream
    lives with just that, and dies for want of it in words."""
    reader = stream(synthetic_shards, 0, accumulation)
    made = [batch for epoch in range(2) for step in reader.steps(epoch) for batch in step]
    sizes = [whole_pages(packed_bytes(*batch.images.shape[::2], batch.images.shape[3], 0)) for batch in made]
    assert len(set(sizes)) > 1
    steps = reader.steps_per_epoch

    def windows(width: int) -> list[int]:
        count = steps * accumulation + 2 * workers
        return [sum(sizes[first : first + width]) for first in range(count - width + 1)]

    need = stream(synthetic_shards, workers, accumulation).shared_bytes(steps, 0, pinned=False)
    most = max(windows(2 * workers + 2 * accumulation))
    assert most < need < most + (256 << 10)  # boxes and semaphores
    taken = windows(2 * workers + accumulation)[::accumulation]
    enough = read(tmp_path, synthetic_shards, need, workers, accumulation, taken)
    assert enough.returncode == 0, enough.stderr
    short = read(tmp_path, synthetic_shards, whole_pages(min(sizes) // 2), workers, accumulation, taken)
    assert short.returncode == 1
    assert short.stderr.startswith("SharedMemoryError: /dev/shm is full: a batch of ")
    assert short.stderr.endswith(f"{REMEDY}\n")
    assert short.stderr.count("\n") == 1


def test_what_needs_none_and_what_needs_little_for_sure(synthetic_shards: Path) -> None:
    assert stream(synthetic_shards, 0, 1).shared_bytes(6, 0, pinned=False) == 0
    some = stream(synthetic_shards, 2, 1)
    assert some.shared_bytes(6, 1 << 40, pinned=False) == 0
    assert 0 < some.shared_bytes(6, 0, pinned=True) <= some.shared_bytes(6, 0, pinned=False)


class Ending(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield 1
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGBUS)


@pytest.mark.integration
def test_a_loader_process_killed_for_want_of_it_is_told_with_the_remedy() -> None:
    batches = Loader(DataLoader(Ending(), batch_size=None, num_workers=1)).batches()
    with pytest.raises(OSError, match=r"pid \d+ killed by SIGBUS\)\. /dev/shm was full\. Give the container more: "):
        assert set(batches) == {1}, "it ends in the middle of what it hands over, or after that"


def test_without_such_a_folder_none_is_free(monkeypatch, tmp_path: Path) -> None:
    assert free_bytes() != 0
    monkeypatch.setattr("ddetr.data.shared_memory.FOLDER", tmp_path / "none")
    assert free_bytes() == 0


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_it() -> None:
    """As many files are open as may be: none for the memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(RuntimeError, match="Too many open files"):
            shared(1)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
