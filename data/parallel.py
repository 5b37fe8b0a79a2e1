"""Parallel maps over processes or threads, with results in order; no process is left behind."""

import contextlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")
_POLL_SECONDS = 0.2  # how often a thread that waits looks up
_END_SECONDS = 4.0  # for what makes the items to end by itself


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Sequence[Item], *, workers: int, chunk: int = 1
) -> Iterator[Result]:
    """Yield `function(item)` for each item in order, computed by `workers` processes (0: one per core).

    One worker computes in this process. Raises OSError when a worker process is killed from outside.
    """
    workers = min(workers or available_cores(), len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # fork: the functions mapped here touch only numpy, decoders and files, and importing torch again costs seconds.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), initializer=_end_with_parent)
    try:
        yield from pool.map(function, items, chunksize=chunk)
    except BrokenProcessPool as error:
        raise OSError(
            "a worker process was killed (out of memory?); run the same command again with fewer workers"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and exit as soon as it is gone, even by SIGKILL."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def threaded_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, ahead: int
) -> Iterator[Result]:
    """`function(item)` for each item in order, computed by threads (0: by the caller) up to `ahead` items early.

    The threads do not hold up the end of the program, however long their last item takes.
    """
    if threads == 0:
        yield from map(function, items)
        return
    waiting: queue.SimpleQueue[tuple[Future[Result], Item] | None] = queue.SimpleQueue()
    pending: deque[Future[Result]] = deque()

    def work() -> None:
        while (job := waiting.get()) is not None:
            future, item = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(item))
            except BaseException as error:
                future.set_exception(error)

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        for item in items:
            pending.append(Future())
            waiting.put((pending[-1], item))
            if len(pending) > ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        for _ in range(threads):
            waiting.put(None)


def until(
    stop: Callable[[], bool], items: Generator[Item, None, None], abandon: Callable[[], object] = lambda: None
) -> Generator[Item, None, None]:
    """Yield `items` in order until `stop()` is true, even while the next item is still being produced.

    Another thread produces the items. abandon: called if that thread does not end soon after a stop.
    """
    asked: queue.SimpleQueue[bool] = queue.SimpleQueue()
    made: queue.SimpleQueue[Future[Item]] = queue.SimpleQueue()
    device = torch.cuda.current_device() if torch.cuda.is_available() else None  # each thread has its own

    def make() -> None:
        if device is not None:
            torch.cuda.set_device(device)
        while asked.get():
            future: Future[Item] = Future()
            try:
                future.set_result(next(items))
            except BaseException as error:
                future.set_exception(error)
            made.put(future)
        items.close()

    maker = threading.Thread(target=make, name="until", daemon=True)
    maker.start()
    outstanding = False
    try:
        while True:
            asked.put(True)
            outstanding = True
            while outstanding and not stop():
                with contextlib.suppress(queue.Empty):
                    future = made.get(timeout=_POLL_SECONDS)
                    outstanding = False
            if outstanding:
                return
            try:
                item = future.result()
            except StopIteration:
                return
            yield item
    finally:
        asked.put(False)
        if not outstanding:
            maker.join(_END_SECONDS)
        if maker.is_alive():
            abandon()
