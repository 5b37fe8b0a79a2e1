"""Fetches the shards of the window after the one that is being read, beside the training."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

AT_ONCE = 4  # shards

Window = tuple[tuple[int, int], list[int]]  # (epoch, step) of its first batch, and the shards it needs


class Prefetch:
    """A thread that is never more than one window ahead of the position it was told last.

    A shard that cannot be fetched ends it: whoever needs the shard tries again, and says so.
    """

    def __init__(self, windows: Iterator[Window], fetch: Callable[[int], Any]) -> None:
        self._windows, self._fetch = windows, fetch
        self._position = (0, 0)
        self._moved = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def at(self, epoch: int, step: int) -> None:
        with self._moved:
            self._position = (epoch, step)
            self._moved.notify()

    def close(self) -> None:
        with self._moved:
            self._ended = True
            self._moved.notify()
        self._thread.join()

    def _run(self) -> None:
        before = None
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for first, shards in self._windows:
                with self._moved:
                    self._moved.wait_for(lambda at=before: self._ended or at is None or self._position >= at)
                fetched = [pool.submit(self._unless_ended, shard) for shard in shards]
                if self._ended or any(future.exception() for future in fetched):
                    return
                before = first

    def _unless_ended(self, shard: int) -> None:
        if not self._ended:
            self._fetch(shard)
