"""Asynchronous checkpoints: training waits while its state is copied, and continues while a thread writes it."""

import logging
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import checkpoints
from ..evaluation import result
from ..evaluation.result import Measure, Result
from ..evaluation.scores import headline
from .reports import CheckpointReport, Report
from .world import World

log = logging.getLogger("ddetr")


@dataclass(frozen=True)
class _Writing:
    step: int
    path: Future[Path]
    began: float
    waited: float


class Saver:
    """Writes checkpoints one at a time in a thread of rank 0, and deletes surplus ones.

    keep: how many of the newest stay (0: all), besides the best by the scores of `measure`. An OSError in writing is
    reported, and does not end the run. held: says which checkpoints may not be deleted yet.
    """

    def __init__(
        self,
        run_directory: Path,
        keep: int,
        measure: Measure | None,
        world: World,
        observe: Callable[[Report], None],
        held: Callable[[], Collection[Path]] = tuple,
    ) -> None:
        self._run_directory, self._keep, self._measure, self._held = run_directory, keep, measure, held
        self._world, self._observe = world, observe
        self._writing: _Writing | None = None
        self._last: Future[Path] | None = None

    def begin(self, snapshot: Callable[[], Callable[[], Path]], step: int) -> None:
        """Copy the state with `snapshot`, which is collective, and begin to write it. Waits for the last checkpoint."""
        began = time.perf_counter()
        self.close()
        write = snapshot()
        if self._world.rank == 0:
            path: Future[Path] = Future()
            self._last = path
            self._writing = _Writing(step, path, began, time.perf_counter() - began)
            threading.Thread(target=self._write, args=(write, path), name="checkpoint", daemon=True).start()

    def look(self) -> None:
        """Report a checkpoint that is complete by now, without waiting."""
        if self._writing is not None and self._writing.path.done():
            self._report(self._writing, self._writing.waited)

    def close(self) -> None:
        """Wait for the checkpoint that is being written, and report it."""
        if self._writing is not None:
            writing, began = self._writing, time.perf_counter()
            wait([writing.path])
            self._report(writing, writing.waited + time.perf_counter() - began)

    def wait(self, seconds: float) -> None:
        """Wait at most so long for the checkpoint that is being written; may be called from any thread."""
        if (writing := self._writing) is not None:
            wait([writing.path], seconds)

    def written(self) -> Path | None:
        """Wait for the checkpoint begun last; its path, on every rank, or None before the first.

        Collective. Raises OSError when it could not be written.
        """
        self.close()
        return self._world.agree(lambda: self._last.result() if self._last is not None else None, Path | None)

    def _write(self, write: Callable[[], Path], path: Future[Path]) -> None:
        try:
            self._tidy()
            written = write()
            self._tidy()
        except BaseException as error:
            path.set_exception(error)
        else:
            path.set_result(written)

    def _tidy(self) -> None:
        try:
            for old in prune(checkpoints(self._run_directory), self._keep, self._measure, self._held()):
                log.info("deleted %s", old)
        except OSError as error:
            log.error("old checkpoints stay: %s", error)

    def _report(self, writing: _Writing, waited: float) -> None:
        self._writing = None
        error, seconds = writing.path.exception(), time.perf_counter() - writing.began
        if error is None:
            path = str(writing.path.result())
            log.info("saved %s in %.1f s, for %.1f s of which training waited", path, seconds, waited)
            self._observe(CheckpointReport(writing.step, path, seconds, waited))
        elif isinstance(error, OSError):
            reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            log.error("step %d is not saved: %s", writing.step, reason)
            self._observe(CheckpointReport(writing.step, "", seconds, waited, reason))
        else:
            raise error


def prune(
    checkpoints: Iterable[Path], keep: int, measure: Measure | None = None, held: Collection[Path] = ()
) -> list[Path]:
    """Delete all but the newest `keep` checkpoints (0: none) and the one with the best score; returns the deleted.

    checkpoints: oldest first. held: of them, those that stay in any case. measure: of the scores that count, as in
    `result.counted`. A checkpoint whose evaluation cannot be read stays, too: it may be the best.
    """
    if not keep:
        return []
    checkpoints, unread = list(checkpoints), set[Path]()
    results: dict[Path, list[Result]] = {}
    for path in checkpoints:
        try:
            results[path] = result.read(path)
        except (OSError, ValueError) as error:
            log.warning("%s: its checkpoint is kept", error)
            unread.add(path)
    compared = result.comparable(results, measure)
    scores = {path: found.score(headline(found.protocol)) for path, found in compared.items()}
    best = max((path for path, score in scores.items() if score >= 0), key=lambda path: scores[path], default=None)
    surplus = [path for path in checkpoints[:-keep] if path not in unread and path not in held and path != best]
    for path in surplus:
        unnamed = path.with_name(f".{path.name}")  # at once no checkpoint any more, however long deleting takes
        path.rename(unnamed)
        shutil.rmtree(unnamed, ignore_errors=True)  # somebody may be reading it; the next save tries again
    return surplus
