"""The checkpoints that wait for their evaluation beside training. Pure arithmetic: no process, no clock."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple


class Waiting(NamedTuple):
    """A checkpoint without its evaluation. tries: how often it failed."""

    step: int
    path: Path
    tries: int = 0


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
        """With more of them, a step once; and those, the oldest, that are left out for that."""
        known = {item.step: item for item in (*self.waiting, *new)}
        ordered = [known[step] for step in sorted(known)]
        kept = len(ordered) - self.most
        return replace(self, waiting=tuple(ordered[max(kept, 0) :])), tuple(ordered[: max(kept, 0)])

    def begun(self) -> "Backlog":
        """With the newest one at work, if one waits and none is at work."""
        if self.at_work or not self.waiting:
            return self
        return replace(self, waiting=self.waiting[:-1], at_work=self.waiting[-1])

    def ended(self) -> "Backlog":
        """Without the one at work."""
        return replace(self, at_work=None)
