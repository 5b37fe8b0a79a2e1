"""Loader processes end without a word of torch, which raises in the main thread when it takes one for lost."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from ddetr.data.batch import Batch
from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.loader import Loader
from ddetr.data.stream import TrainStream
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data._utils import signal_handling

pytestmark = pytest.mark.integration

CONFIG = DataConfig(short_sides=(64,), long_side=128, crop=False, shuffle_window=8, workers=2)


@pytest.fixture(autouse=True)
def _torch_watches() -> None:
    """A loader of somebody else's in the main thread, from which on torch looks at every SIGCHLD."""
    assert list(DataLoader(range(2), num_workers=1, batch_size=None)) == [0, 1]  # type: ignore[arg-type]
    assert signal_handling._SIGCHLD_handler_set


def opened(
    shards: str, epoch: int = 0, stop: Callable[[], bool] = lambda: False
) -> tuple[TrainStream, Iterator[list[Batch]], set]:
    """A stream that has begun an epoch, the rest of its steps, and its worker processes."""
    before = set(multiprocessing.active_children())
    stream = TrainStream(ShardIndex.load(shards), CONFIG, batch_size=4, accumulation=1, rank=0, world_size=1, seed=1)
    steps = stream.steps(epoch, stop=stop)
    next(steps)
    return stream, steps, set(multiprocessing.active_children()) - before


def assert_ended(stream: TrainStream, workers: set) -> None:
    stream.close()
    deadline = time.monotonic() + 60  # a killed process needs a moment of a core to go
    while workers & set(multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for _ in range(20):  # a handler of Python's runs between two of its operations
        time.sleep(0.01)
    assert not workers & set(multiprocessing.active_children())


def test_a_stream_ends_its_own_processes_alone(synthetic_shards) -> None:
    first, _, ended = opened(synthetic_shards)
    second, steps, others = opened(synthetic_shards)
    assert_ended(first, ended)
    assert all(worker.is_alive() for worker in others)
    assert len(list(steps)) == second.steps_per_epoch - 1
    assert_ended(second, others)


def test_stopped_processes_are_ended(synthetic_shards) -> None:
    stream, _, workers = opened(synthetic_shards)
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    assert_ended(stream, workers)
    assert {worker.exitcode for worker in workers} == {-signal.SIGKILL}


def test_a_stopped_process_does_not_hold_up_who_waits_for_its_batch(synthetic_shards) -> None:
    asked: list[bool] = []
    stream, steps, workers = opened(synthetic_shards, stop=lambda: bool(asked))
    for worker in workers:
        os.kill(worker.pid, signal.SIGSTOP)
    threading.Timer(1, asked.append, [True]).start()
    assert len(list(steps)) < stream.steps_per_epoch - 1
    assert_ended(stream, workers)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    burn = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(burn) for _ in range(2 * len(os.sched_getaffinity(0)))]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_starved_processes_are_ended(synthetic_shards) -> None:
    stream, _, workers = opened(synthetic_shards)
    with busy_cores():
        for worker in workers:
            os.sched_setscheduler(worker.pid, os.SCHED_IDLE, os.sched_param(0))
        stream.close()
        for _ in range(20):  # what torch raises, it raises while they go
            time.sleep(0.05)
    assert_ended(stream, workers)  # on a machine that is busy with more, only now there is a core for them to go


def test_many_loaders_in_one_process(synthetic_shards) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    for epoch in range(25):
        stream, steps, workers = opened(synthetic_shards, epoch)
        if epoch == 10:
            os.kill(next(iter(workers)).pid, signal.SIGSTOP)
        elif epoch % 2:
            assert len(list(steps)) == stream.steps_per_epoch - 1
        assert_ended(stream, workers)
    assert len(os.listdir("/proc/self/fd")) < descriptors + 20


def test_a_process_that_is_killed_from_outside_is_named(synthetic_shards) -> None:
    stream, steps, workers = opened(synthetic_shards)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(OSError, match=r"a loader process was lost \(pid \d+ killed by SIGKILL.*data.workers to fewer"):
        list(steps)
    assert_ended(stream, workers)


class Failing(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield 1
        raise RuntimeError("a defect")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_where_no_process_was_lost_is_raised_as_it_is(workers: int) -> None:
    with pytest.raises(RuntimeError, match="a defect"):
        list(Loader(DataLoader(Failing(), batch_size=None, num_workers=workers)).batches())
