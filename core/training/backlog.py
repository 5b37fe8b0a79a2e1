"""The checkpoints that wait for their evaluation beside training. Pure arithmetic: no process, and time is given."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple


class Waiting(NamedTuple):
    """A checkpoint without its evaluation. tries: how often it failed. not_before: when it may be tried, in seconds."""

    step: int
    path: Path
    tries: int = 0
    not_before: float = 0.0


@dataclass(frozen=True)
class Backlog:
    """At most `most` checkpoints wait, by step, besides the one at work; none of them may be deleted."""

    most: int
    waiting: tuple[Waiting, ...] = ()
    at_work: Waiting | None = None

    @property
    def all(self) -> tuple[Waiting, ...]:
        return (*self.waiting, self.at_work) if self.at_work else self.waiting

    def with_(self, *new: Waiting) -> tuple["Backlog", tuple[Waiting, ...]]:
        """Adds checkpoints, one a step. Also returns the oldest, which exceed `most`."""
        known = {item.step: item for item in (*self.waiting, *new)}
        ordered = [known[step] for step in sorted(known)]
        surplus = max(len(ordered) - self.most, 0)
        return replace(self, waiting=tuple(ordered[surplus:])), tuple(ordered[:surplus])

    def begun(self, now: float) -> "Backlog":
        """With the newest that may be tried at work, if there is one and none is at work."""
        ready = [item for item in self.waiting if item.not_before <= now]
        if self.at_work or not ready:
            return self
        waiting = tuple(item for item in self.waiting if item is not ready[-1])
        return replace(self, waiting=waiting, at_work=ready[-1])

    def ended(self, again: Waiting | None = None) -> tuple["Backlog", tuple[Waiting, ...]]:
        """Without the one at work, which waits once more as `again`; as `with_`."""
        return replace(self, at_work=None).with_(*([] if again is None else [again]))
