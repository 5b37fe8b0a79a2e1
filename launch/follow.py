"""`ddetr eval --follow`: every checkpoint of runs in progress is evaluated, by any number of followers.

A follower takes the newest checkpoint without a result of its weights, shards and settings that no other follower works
on. What is done is in the results themselves, so a follower that was killed goes on when it starts again.
"""

import contextlib
import fcntl
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from ..core.checkpoint import checkpoints, contents
from ..core.checkpoint.weights import WEIGHTS
from ..core.config import ConfigError
from ..core.evaluation import result
from ..core.evaluation.result import Measure, without_score
from ..core.evaluation.scores import check_protocols
from ..core.ownership import ForeignSettingError, check_links
from ..core.training.schedule import End
from ..data.index import ShardIndex
from ..data.location import Location
from . import history
from .console import Terminal
from .evaluate import evaluate_detector, is_sound, loaded, named_sets, places_of, shards
from .evaluators import Evaluators

POLL_SECONDS = 5.0
TRIES = 3  # of a checkpoint, where shards or cluster cannot be reached


def follow(
    runs: Sequence[Path],
    overrides: list[str],
    data: Sequence[str | Path] = (),
    ray_address: str | None = None,
    idle_minutes: float = 60.0,
) -> None:
    """Evaluate the checkpoints of runs until all have finished and are evaluated, or for `idle_minutes` none was new.

    A run may begin later. Results go into its eval/ folder and beside the checkpoint, as with `evaluate`; data and
    ray_address as there. While there is nothing to do, the workers are given back to Ray. A checkpoint that cannot be
    evaluated is told, and the others go on; so is one whose shards or cluster cannot be reached, after TRIES.

    Raises FileNotFoundError for a run in a missing folder, errors in the overrides, and in the end ValueError that
    names what could not be evaluated, and FloatingPointError that names what gave numbers that are not finite.
    """
    check_protocols()
    if missing := [run for run in runs if not run.absolute().parent.is_dir()]:
        raise FileNotFoundError(f"{missing[0]}: the folder that it is to be in is missing; name the run directories")
    console = Terminal()
    names = ", ".join(map(str, runs))
    console.print(f"following {names}; ends after {idle_minutes:g} min without a new checkpoint", soft_wrap=True)
    for run in runs:
        if not run.is_dir():
            console.print(f"{run} is not there yet", soft_wrap=True)
    with Evaluators(ray_address, console, by="eval --follow") as evaluators:
        follower = _Follower(overrides, data, evaluators, console)
        last_new, is_waiting = time.monotonic(), False
        while True:
            ended = all(map(_is_finished, runs))  # before the look at the checkpoints, of which none comes later
            if follower.evaluates_one(runs):
                last_new, is_waiting = time.monotonic(), False
                continue
            if ended and not follower.is_another_at_work:
                break
            if time.monotonic() - last_new > 60 * idle_minutes:
                console.print(f"no new checkpoint for {idle_minutes:g} min", soft_wrap=True)
                break
            if not is_waiting:
                console.print("waiting for new checkpoints", soft_wrap=True)
                evaluators.release()
                is_waiting = True
            time.sleep(POLL_SECONDS)
    if follower.given_up:
        listed = "\n".join([*follower.given_up.values(), *follower.without_score])
        raise ValueError(f"{len(follower.given_up)} checkpoint(s) could not be evaluated:\n{listed}")
    if follower.without_score:
        raise FloatingPointError("\n".join(follower.without_score))


class _Follower:
    """given_up: why a checkpoint, written at this time, is not tried any more. without_score: those that gave numbers
    that are not finite.

    is_another_at_work: on a checkpoint that has no result yet.
    """

    def __init__(
        self, overrides: list[str], data: Sequence[str | Path], evaluators: Evaluators, console: Console
    ) -> None:
        self._overrides, self._evaluators, self._console = overrides, evaluators, console
        self._sets = named_sets(data)
        self._indices: dict[Location | None, ShardIndex] = {}
        self._done: set[tuple[Path, int]] = set()  # and when its weights were written
        self._tries: Counter[tuple[Path, int]] = Counter()
        self.given_up: dict[tuple[Path, int], str] = {}
        self.without_score: list[str] = []
        self.is_another_at_work = False

    def evaluates_one(self, runs: Sequence[Path]) -> bool:
        """Evaluate the newest checkpoint without a result; False where there is none that nobody works on."""
        self.is_another_at_work = False
        for checkpoint, written in _newest_first(runs):
            if (checkpoint, written) in self._done or (checkpoint, written) in self.given_up:
                continue
            try:
                if not self._lacking(checkpoint):
                    self._done.add((checkpoint, written))
                    continue
                with claimed(checkpoint) as is_free:
                    if not is_free:
                        self.is_another_at_work = True
                        continue
                    self._evaluate(checkpoint)  # unless another follower had the claim, and did
                self._done.add((checkpoint, written))
            except (OSError, RuntimeError) as error:
                self._failed(checkpoint, written, error, again=True)
            except ValueError as error:
                if isinstance(error, ForeignSettingError) or (isinstance(error, ConfigError) and is_sound(checkpoint)):
                    raise
                self._failed(checkpoint, written, error, again=False)
            return True
        return False

    def _lacking(self, checkpoint: Path) -> dict[str, ShardIndex]:
        """The sets, by name, on which the checkpoint has no result. It is not loaded for that."""
        described, known, lacking = contents(checkpoint, self._overrides), result.read(checkpoint), {}
        for name, data in self._sets.items():
            key = described.config.data.validation if data is None else Location(data)
            if key not in self._indices:
                self._indices[key] = shards(data, described.config, described.file, self._overrides)
            measure = Measure.of(described.config, self._indices[key])
            if not any(found.measure in (measure, None) for found in known):
                lacking[name] = self._indices[key]
        return lacking

    def _evaluate(self, checkpoint: Path) -> None:
        if not (lacking := self._lacking(checkpoint)):
            return
        self._evaluators.of(contents(checkpoint, self._overrides).config)  # before the weights are read
        detector, weights = loaded(checkpoint, self._overrides)
        for name, index in lacking.items():
            places = places_of(detector.path, inside=name)
            found = evaluate_detector(detector, weights, index, places, self._evaluators, self._console)
            if num_not_finite := found.result.num_not_finite:
                self.without_score.append(f"{detector.path}: {without_score(num_not_finite)}")
                self._console.print(self.without_score[-1], soft_wrap=True)

    def _failed(self, checkpoint: Path, written: int, error: Exception, *, again: bool) -> None:
        self._evaluators.release()
        if not checkpoint.exists():
            self._console.print(f"{checkpoint} was deleted meanwhile: left out", soft_wrap=True)
            return
        self._tries[checkpoint, written] += 1
        if again and self._tries[checkpoint, written] < TRIES:
            self._console.print(f"{checkpoint} is tried again: {error}", soft_wrap=True)
            self._indices = {}
            time.sleep(POLL_SECONDS)
            return
        self.given_up[checkpoint, written] = f"{checkpoint}: {error}"
        self._console.print(f"{checkpoint} cannot be evaluated, the others go on: {error}", soft_wrap=True)


def _newest_first(runs: Sequence[Path]) -> list[tuple[Path, int]]:
    """The checkpoints of all runs, and when their weights were written: 0 for one without, which is to be told."""
    found = []
    for checkpoint in (checkpoint for run in runs for checkpoint in checkpoints(run)):
        weights = checkpoint / WEIGHTS
        found.append((checkpoint, weights.stat().st_mtime_ns if weights.is_file() else 0))
    return sorted(found, key=lambda item: -item[1])


def _is_finished(run: Path) -> bool:
    """Whether the run took its last step: no checkpoint comes after that."""
    event = history.last_event(run)
    return event.get("event") == "stop" and event.get("reason") == End.FINISHED.value


@contextlib.contextmanager
def claimed(checkpoint: Path) -> Iterator[bool]:
    """Whether no other follower works on the checkpoint; it is this one's within the context.

    The lock ends with its process. Where the file system knows no locks, two may do the same work: the result is one.
    """
    run = checkpoint.parent.parent
    folder = run / "eval"
    check_links(run, folder)
    folder.mkdir(exist_ok=True)
    file = folder / f".{checkpoint.name}.claim"
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            file.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
