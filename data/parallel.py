"""A function over many items in several processes, results in order, no process left behind."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    # fork: the functions mapped here touch only numpy, PIL and files, and importing torch anew costs seconds.
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
