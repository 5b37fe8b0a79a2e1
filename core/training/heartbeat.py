"""Heartbeats of the ranks, apart from the training's collectives: who is alive, where each rank is, and when to stop.

A collective operation waits for every rank, and does not say for which one. Here each rank writes its activity, its
last images and its stack to the rendezvous store every few seconds. When a rank dies or falls silent, or none makes
progress, the others log where each rank was and exit, so that the launcher starts them again.
"""

import datetime
import logging
import os
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import torch.distributed as dist

from ...data.text import visible
from ..config import TrainConfig
from .messages import encoded
from .verdict import (
    Beat,
    Beats,
    Finding,
    Identity,
    Patience,
    Quiet,
    States,
    described,
    failure,
    from_a_collective,
    judge,
    named,
)
from .world import World

log = logging.getLogger("ddetr")

TRY_AGAIN = 75  # exit status of a healthy rank that ends because of others (EX_TEMPFAIL of sysexits.h)
_BEAT_SECONDS = 2.0
_PUBLISH_SECONDS = 5.0
_FRAMES = 24
_FAILURE_GRACE_SECONDS = 5.0  # for the same error to end this rank in its own way
_LAST_WORDS_SECONDS = 10.0  # to write them, perhaps to storage that hangs
_ROOT = Path(__file__).parents[2]

_Place = tuple[int, int, str, float, Iterable[int]]  # moves, step, activity, since when, images


class Watch:
    """The context in which a rank trains: it sends and judges heartbeats. A single rank only records a stop request.

    tell: called with one line about the fault before the process exits. finish: called then, with a limit in seconds,
    for what this rank still does alone. Entering is collective.
    """

    def __init__(
        self, world: World, config: TrainConfig, tell: Callable[[str], None], finish: Callable[[float], object]
    ) -> None:
        self._world, self._tell, self._finish = world, tell, finish
        self._patience = Patience(config.rank_timeout_seconds, config.collective_timeout_seconds)
        self._every = min(_BEAT_SECONDS, self._patience.silence / 4)
        self._thread = threading.get_ident()
        self._stop, self._ended, self._judged = False, threading.Event(), threading.Lock()
        self._moves: list[int] = []
        self.asked = False  # this rank, and not only another one
        self._place: _Place = (0, 0, "starting", time.monotonic(), ())

    def at(self, activity: str, step: int, images: Iterable[int] | None = None) -> None:
        """Record what this rank does from now on. images: ids of a new batch; None: still those of the last one."""
        moves, *_, last_images = self._place
        self._place = (moves + 1, step, activity, time.monotonic(), last_images if images is None else images)

    def stop(self) -> bool:
        """Whether some rank was asked to stop; the other ranks learn it a few seconds later."""
        return self._stop

    def ask_to_stop(self) -> None:
        """Ask all ranks to save and stop; safe in a signal handler."""
        self.asked = self._stop = True

    def name(self, rank: int) -> str:
        """A rank with its host, for a message."""
        return named([rank], self._identities)

    def __enter__(self) -> "Watch":
        mine = Identity(socket.gethostname(), os.getpid(), _machine())
        self._identities: list[Identity] = self._world.gather([mine], Identity)
        if self._world.size == 1:
            return self
        self._prefix = self._world.agree(lambda: uuid.uuid4().hex, str)
        self._store = self._connected()
        self._store.set(str(self._world.rank), self._beat())
        dist.barrier()
        now = time.monotonic()
        self._exchanged = now
        ranks = range(self._world.size) if self._world.rank == 0 else (0,)
        self._heard: dict[int, tuple[bytes, float]] = dict.fromkeys(ranks, (b"", now))
        for work in (self._exchange, self._judge):
            threading.Thread(target=work, name=f"heartbeat {work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._world.size > 1:
            if error is None:
                dist.barrier()
            elif from_a_collective(trace):  # the judge will say which rank is the cause, and end this one
                log.error("step %d: %s; looking for the rank that is lost", self._place[1], error)
                time.sleep(self._patience.silence + 4 * self._every + 2 * _PUBLISH_SECONDS)
            self._ended.set()
            if error is not None:
                self._publish(failure(self._world.rank, self._place[1], error, self._identities))
                self._let_others_read()

    # In a thread: everything that talks to the store, which may never answer.

    def _exchange(self) -> None:
        rank = self._world.rank
        while not self._ended.wait(self._every):
            try:
                self._store.set(str(rank), self._beat())
                if self._store.check(["verdict"]):
                    verdict = self._store.get("verdict").decode(errors="replace")  # while there is a store
                    self._ended.wait(_FAILURE_GRACE_SECONDS)
                    self._give_up(verdict)
                if self._stop:
                    self._store.set("stop", "")
                elif self._store.check(["stop"]):
                    self._stop = True
                beats = self._store.multi_get([str(other) for other in self._heard])
            except RuntimeError:  # the store is gone: the judge will see that nothing comes from it
                return
            now = self._exchanged = time.monotonic()
            for other, beat in zip(self._heard, beats, strict=True):
                if beat != self._heard[other][0]:
                    self._heard[other] = (beat, now)

    # In a second thread: the judgement of what was heard.

    def _judge(self) -> None:
        looked = self._moved = time.monotonic()
        while not self._ended.wait(self._every):
            now = time.monotonic()
            if now - looked > 2 * self._every + 1:  # this process was stopped itself: let the others speak first
                self._exchanged = self._moved = now
                self._heard = {rank: (beat, now) for rank, (beat, _) in self._heard.items()}
            looked = now
            if (found := self._finding(now)) and not self._ended.wait(1):  # not at the end, when all ranks leave
                self._give_up(self._publish(found), concluded=True)

    def _finding(self, now: float) -> Finding | None:
        beats = Beats.of({rank: word for rank, (word, _) in self._heard.items()})
        moves = [beat.moves for beat in beats.known.values()]
        if moves != self._moves:
            self._moves, self._moved = moves, now
        quiet = Quiet(
            store=now - self._exchanged,
            ranks={rank: now - heard for rank, (_, heard) in self._heard.items()},
            moves=now - self._moved if self._world.rank == 0 else 0.0,  # the others do not hear of all
        )
        return judge(self._identities, self._states(), beats, quiet, self._patience, self._address)

    def _publish(self, found: Finding) -> str:
        """Publish a finding; returns the text that all ranks log: the first in the store, or ours without an answer."""
        texts = [self._described(found, {rank: word for rank, (word, _) in self._heard.items()})]
        if time.monotonic() - self._exchanged > self._patience.silence:
            return texts[0]

        def publish() -> None:
            try:
                store = self._connected()
                beats = store.multi_get([str(rank) for rank in range(self._world.size)])
                text = self._described(found, dict(enumerate(beats)))
                texts.append(store.compare_set("verdict", "", text).decode(errors="replace"))
            except RuntimeError as error:
                log.warning("the other ranks cannot be told: %s", error)

        publisher = threading.Thread(target=publish, name="heartbeat publish", daemon=True)
        publisher.start()
        publisher.join(_PUBLISH_SECONDS)
        return texts[-1]

    def _give_up(self, text: str, *, concluded: bool = False) -> None:
        """Log the finding and end this process, whose training thread waits in a collective that will not finish."""
        if not self._judged.acquire(blocking=False) or self._ended.is_set():
            return
        text = "\n".join(visible(line) for line in text.split("\n"))  # from a store that others may write to
        what = text.partition("\n")[0]
        said = text if concluded or self._world.rank == 0 else what

        def last_words() -> None:
            log.error("stopping: %s", said)
            for handler in log.handlers:
                handler.flush()
            self._tell(what)

        speaker = threading.Thread(target=last_words, name="heartbeat last words", daemon=True)
        speaker.start()
        speaker.join(_LAST_WORDS_SECONDS)
        if speaker.is_alive():
            os.write(2, f"stopping, and the log cannot be written: {said}\n".encode())
        self._finish(self._patience.silence)
        if concluded:
            self._let_others_read()
        os._exit(TRY_AGAIN)

    def _let_others_read(self) -> None:
        """Wait until the other ranks have read the verdict: the store may be in this process, and end with it."""
        if self._world.rank == 0:
            time.sleep(2 * self._every + 1)

    def _described(self, found: Finding, words: dict[int, bytes]) -> str:
        return described(found, Beats.of(words), self._identities, self._states())

    def _states(self) -> States:
        """Process states of the other ranks on this machine."""
        mine = self._identities[self._world.rank]
        return {
            rank: _state(other.pid)
            for rank, other in enumerate(self._identities)
            if other.machine == mine.machine and rank != self._world.rank
        }

    def _beat(self) -> str:
        moves, step, activity, since, images = self._place
        frames = traceback.extract_stack(sys._current_frames()[self._thread])[-_FRAMES:]
        stack = [f"{_short(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]
        beat = Beat(moves, step, activity, time.monotonic() - since, [int(image) for image in images], stack)
        return encoded(beat, Beat).decode()

    @property
    def _address(self) -> str:
        return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"

    def _connected(self) -> dist.Store:
        """A new connection to the store: a call that waits for an answer blocks all that share its connection."""
        timeout = datetime.timedelta(seconds=self._patience.silence)
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore(self._prefix, dist.TCPStore(host, port, is_master=False, timeout=timeout))


def _short(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else "/".join(path.parts[-3:])


def _machine() -> str:
    """An id that is equal for two processes if they see each other in /proc."""
    if not Path("/proc/self/ns/pid").exists():
        return uuid.uuid4().hex
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _state(pid: int) -> str | None:
    """The process state in /proc: R, S, T (stopped), Z (dead) ...; None when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):  # it may end between the opening and the reading
        return None
