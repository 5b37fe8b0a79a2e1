"""Prefetch: fetches the shards of the shuffle window after the one that is being read, in the background."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

from .sources import SourceError

AT_ONCE = 4  # shards

Window = tuple[tuple[int, int], list[int]]  # (epoch, step) of its first batch, and the shards it needs


class Prefetch:
    """Threads that are never more than one window ahead of the last position given by `at`.

    A shard that cannot be fetched ends them: the reader that needs it tries again, and reports it. `close` does not
    wait: what is being fetched is of use to the next run.
    """

    def __init__(self, windows: Iterator[Window], fetch: Callable[[int], Any]) -> None:
        self._windows, self._fetch = windows, fetch
        self._position = (0, 0)
        self._begun: tuple[int, int] | None = None  # the window taken last
        self._left: list[int] = []  # its shards that nobody fetches yet
        self._ended = False
        self._changed = threading.Condition()
        for _ in range(AT_ONCE):
            threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def at(self, epoch: int, step: int) -> None:
        """Give the position of the training, which the threads stay one window ahead of."""
        with self._changed:
            self._position = (epoch, step)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _run(self) -> None:
        while (shard := self._next()) is not None:
            try:
                self._fetch(shard)
            except SourceError:
                self.close()

    def _next(self) -> int | None:
        with self._changed:
            while not self._ended and not self._left:
                if self._begun is None or self._position >= self._begun:
                    self._begun, self._left = next(self._windows)
                else:
                    self._changed.wait()
            return None if self._ended else self._left.pop(0)
