"""Which rank is at fault when ranks hang or die, and what all of them log about it.

Pure functions of the heartbeats that core/training/heartbeat.py has received.
"""

import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Annotated

from pydantic import Field

from .messages import decoded

_MOST_SUSPECTS = 8  # whose images and stack are logged
_INNERMOST = 4  # frames of a stack among which a waiting collective operation is looked for

States = Mapping[int, str | None]  # of ranks on this machine: the process state in /proc, None: gone


@dataclass(frozen=True)
class Beat:
    """One heartbeat: what a rank says of itself."""

    moves: int  # how often its activity has changed
    step: int
    activity: str
    seconds: float  # since it began that
    images: list[int]  # image ids of its last batch
    stack: Annotated[list[str], Field(min_length=1)]  # of the training thread, innermost last


@dataclass(frozen=True)
class Identity:
    """Where a rank is."""

    host: str
    pid: int
    machine: str  # processes with the same one see each other in /proc


@dataclass(frozen=True)
class Beats:
    """The last heartbeat of each rank that has sent one."""

    known: dict[int, Beat]
    foreign: str | None = None  # what is wrong with a heartbeat that no rank of ddetr has sent; `known` is empty then

    @staticmethod
    def of(words: Mapping[int, bytes]) -> "Beats":
        try:
            return Beats({rank: decoded(word, Beat, f"rank {rank}") for rank, word in words.items() if word})
        except OSError as error:
            return Beats({}, str(error))


@dataclass(frozen=True)
class Quiet:
    """Seconds without news."""

    store: float  # from the store where the ranks met
    ranks: Mapping[int, float]  # from each rank that this one listens to
    moves: float  # of any progress; only rank 0 hears of all ranks, elsewhere 0


@dataclass(frozen=True)
class Patience:
    """Timeouts in seconds, after which a silence is a finding."""

    silence: float  # of the store or a rank
    stall: float  # without progress of any rank


@dataclass(frozen=True)
class Finding:
    """What is wrong, in one line, and the suspect ranks; None: those that are furthest behind."""

    text: str
    suspects: list[int] | None


def judge(
    identities: Sequence[Identity], states: States, beats: Beats, quiet: Quiet, patience: Patience, store: str
) -> Finding | None:
    """The fault that explains the silence best, or None if nothing is wrong. store: address of the rendezvous store.

    In this order: a dead process, a silent store, a silent rank, a foreign heartbeat, no progress.
    """
    if dead := [rank for rank, state in states.items() if state in (None, "Z", "X")]:
        return Finding(f"{named(dead, identities)} died", dead)
    seconds = f"{patience.silence:.0f} s"
    if quiet.store > patience.silence:
        silent = f"the store at {store}, where the ranks met, has not answered for {seconds}"
        return Finding(f"{silent}: its host is gone or stopped, or the network between is cut", [])
    if silent := [rank for rank, since in quiet.ranks.items() if since > patience.silence]:
        return Finding(f"nothing was heard of {named(silent, identities)} for {seconds}", silent)
    if beats.foreign is not None:
        return Finding(f"in the store at {store}, where the ranks met, {beats.foreign}", [])
    if quiet.moves > patience.stall:
        return Finding(f"no rank got any further for {patience.stall:.0f} s", None)
    return None


def failure(rank: int, step: int, error: BaseException, identities: Sequence[Identity]) -> Finding:
    """The finding that a rank ends by an error of its own."""
    return Finding(f"{named([rank], identities)} failed in step {step}: {type(error).__name__}: {error}", [rank])


def described(finding: Finding, beats: Beats, identities: Sequence[Identity], states: States) -> str:
    """The log text of a finding: a line for all ranks at the same place, then images and stack of the suspects."""
    if beats.foreign is not None:  # the finding says so
        return finding.text
    places: dict[tuple[int, str, str], list[int]] = {}
    for rank, beat in beats.known.items():
        places.setdefault(_place(beat), []).append(rank)
    lines = [finding.text, "where the ranks were when last heard of:"]
    for (step, activity, frame), ranks in sorted(places.items()):
        longest = max(beats.known[rank].seconds for rank in ranks)
        lines.append(f"  step {step}, {activity} for {longest:.0f} s, in {frame}: {named(ranks, identities)}")
    suspects = _furthest_behind(beats.known, places) if finding.suspects is None else finding.suspects
    for rank in [rank for rank in suspects if rank in beats.known][:_MOST_SUSPECTS]:
        stopped = ", stopped by a signal" if states.get(rank) in ("T", "t") else ""
        pid, beat = identities[rank].pid, beats.known[rank]
        lines.append(f"{named([rank], identities)} (pid {pid}{stopped}), its images {beat.images}:")
        lines += [f"  {frame}" for frame in beat.stack]
    return "\n".join(lines)


def _furthest_behind(beats: Mapping[int, Beat], places: Mapping[tuple[int, str, str], list[int]]) -> list[int]:
    """Ranks at the earliest step, if possible not in a collective; first those at a place with few other ranks."""
    behind = min((beat.step for beat in beats.values()), default=0)
    suspects = [rank for rank, beat in beats.items() if beat.step == behind]
    suspects = [rank for rank in suspects if not _waits(beats[rank])] or suspects
    return sorted(suspects, key=lambda rank: len(places[_place(beats[rank])]))


def _place(beat: Beat) -> tuple[int, str, str]:
    return beat.step, beat.activity, beat.stack[-1]


def named(ranks: Iterable[int], identities: Sequence[Identity]) -> str:
    """Ranks by host, for a message: `ranks 0, 1 on a, rank 2 on b`."""
    hosts: dict[str, list[int]] = {}
    for rank in ranks:
        hosts.setdefault(identities[rank].host, []).append(rank)
    return ", ".join(
        f"rank{'s' if len(those) > 1 else ''} {', '.join(map(str, those))} on {host}" for host, those in hosts.items()
    )


def _waits(beat: Beat) -> bool:
    return any("torch/distributed/" in frame for frame in beat.stack[-_INNERMOST:])


def from_a_collective(trace: TracebackType | None) -> bool:
    """Whether an error was raised in a collective operation: then some other rank is the cause."""
    files = [frame.filename for frame in traceback.extract_tb(trace)]
    return bool(files) and ("torch/distributed/" in files[-1] or "/deepspeed/" in files[-1])
