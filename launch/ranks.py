"""`ddetr train --ray`: the ranks of one run on a Ray cluster, started, watched, stopped and started again together."""

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from ..core.config import Config, changed, dump
from ..core.overrides import written
from .cluster import cluster
from .console import say
from .placement import from_anywhere, placed, requested
from .rank import Place, Rank

POLL_SECONDS = 0.5
GRACE_SECONDS = 20.0  # for the other ranks to end by themselves, with what they still write, after one has failed
KILL_SECONDS = 5.0  # for the actors to have killed their ranks
START_SECONDS = 120.0  # for actors whose resources are there
MISTAKE = 2  # exit status of `ddetr` for what the user can mend


def train_on_ray(
    config: Config,
    address: str,
    *,
    ranks: str | None = None,
    restarts: int = 3,
    wait: float = 60.0,
    resume: Path | None = None,
    dry_run: bool = False,
) -> int:
    """Train on the Ray cluster at `address`, with every rank in a process as `ddetr train` alone would be.

    ranks: N or MIN:MAX; by default one for each GPU of the cluster, or one for each node without any.
    restarts: how often all ranks start again after one was lost, where train.auto_resume lets them go on.
    wait: for how many seconds to wait for the ranks' resources, each time.
    resume: a run directory to continue. With `dry_run` rank 0 alone checks everything and says what would run.
    Returns the exit status: 0, also for a run that was stopped and has saved; 1 after a loss; 130 if it was killed.
    Raises ValueError with the message of the rank that found a mistake of the user's.
    """
    config = _resuming(from_anywhere(config), resume)
    with cluster(address), _stops() as stops:
        request = requested(config, ranks)
        for attempt in range(restarts + 1):
            with placed(request, wait, lambda: stops() > 0, say) as group:
                if group is None:
                    return 130
                loss = _run(group, config, dry_run, stops)
            if stops() > 1:
                return 130
            if loss is None:
                return 0
            if stops():
                say(f"Ray: {loss}; stopped")
                return 1
            if not config.train.auto_resume or attempt == restarts:
                remedy = f"it was started {attempt + 1} times (--restarts {restarts})"
                if not config.train.auto_resume:
                    remedy = "with train.name=NAME train.auto_resume=true it would go on from the newest checkpoint"
                say(f"ddetr: {loss}; {remedy}", file=sys.stderr)
                return 1
            say(f"Ray: {loss}; all ranks start again (restart {attempt + 1} of {restarts})")
    raise AssertionError("every attempt returns")


def _resuming(config: Config, resume: Path | None) -> Config:
    """The configuration with the run to resume, which any rank finds by its name."""
    if resume is None:
        return config
    from ..core.checkpoint import find_checkpoint

    find_checkpoint(resume)  # raises when there is none: auto_resume would start from nothing
    resume = resume.resolve()
    settings = {"output": str(resume.parent), "name": resume.name, "auto_resume": True}
    return changed(config, [written(f"train.{key}", value) for key, value in settings.items()], str(resume))


@dataclass
class _Member:
    """The driver's view of one rank."""

    actor: Any
    number: int
    place: Place
    exit_status: int | None = None
    lost: bool = False  # the actor has died, with its node or alone
    message: list[str] = field(default_factory=list)  # the last one of `ddetr`, held back until the rank has ended

    @property
    def ended(self) -> bool:
        return self.lost or self.exit_status is not None

    @property
    def failed(self) -> bool:
        return self.lost or bool(self.exit_status)

    def show(self, lines: list[tuple[bool, str]]) -> None:
        """Rank 0's output as it is, that of others with their name."""
        for is_error, line in lines:
            if is_error and (self.message or line.startswith("ddetr: ")):
                self.message.append(line)
            else:
                self._print(is_error, line)

    def end(self, exit_status: int) -> None:
        self.exit_status = exit_status
        if exit_status != MISTAKE:
            for line in self.message:
                self._print(True, line)

    def _print(self, is_error: bool, line: str) -> None:
        name = f"[rank {self.number}] " if self.number else ""
        say(name + line, file=sys.stderr if is_error else sys.stdout)

    def __str__(self) -> str:
        """Who and how it ended."""
        if self.lost:
            how = "was lost: its Ray worker or its node died"
        elif self.exit_status is not None and self.exit_status < 0:
            how = f"was killed by {signal.Signals(-self.exit_status).name}"
        else:
            how = f"ended with exit status {self.exit_status}"
        return f"rank {self.number} on {self.place.address} {how}"


def _run(group: Any, config: Config, dry_run: bool, stops: Callable[[], int]) -> str | None:
    """All ranks once, in this placement group; None when they ended well, otherwise which one was lost, and how.

    Raises ValueError with what a rank said of a mistake of the user's.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    actors = [
        ray.remote(Rank)
        .options(
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        )
        .remote()
        for index, bundle in enumerate(group.bundle_specs)
    ]
    members: list[_Member] = []
    try:
        places = ray.get([actor.place.remote() for actor in actors], timeout=START_SECONDS)
        members = _numbered(list(zip(actors, places, strict=True)))
        counts = [f"{len(here)} on {here[0].place.address}" for here in _by_node(members)]
        each = ", ".join(f"{count:g} {name}" for name, count in group.bundle_specs[0].items())
        say(f"Ray: {len(members)} rank(s) with {each} each, {', '.join(counts)}")
        if dry_run:
            members = members[:1]
        _start(members, config, ["--dry-run"] if dry_run else [])
        _watch(members, stops)
    except (RayActorError, GetTimeoutError) as error:
        return f"the ranks did not start; is the same ddetr installed on every node? {error}"
    finally:
        _end(actors)
    failed = [member for member in members if member.failed]
    mistaken = [member for member in failed if member.exit_status == MISTAKE]
    # Where one was killed, others may end with any error.
    killed = [member for member in failed if member.lost or member.exit_status == -signal.SIGKILL]
    if mistaken and not killed:
        first = mistaken[0]
        raise ValueError(
            f"rank {first.number} on {first.place.address}: " + "\n".join(first.message).removeprefix("ddetr: ")
        )
    return str((killed or failed)[0]) if failed else None


def _numbered(found: list[tuple[Any, Place]]) -> list[_Member]:
    """Ranks node after node, on each in the order of its GPUs: the same places always get the same numbers."""
    found = sorted(found, key=lambda item: (item[1].address, item[1].node, [gpu.zfill(4) for gpu in item[1].gpus]))
    return [_Member(actor, number, place) for number, (actor, place) in enumerate(found)]


def _by_node(members: list[_Member]) -> list[list[_Member]]:
    nodes: dict[str, list[_Member]] = {}
    for member in members:
        nodes.setdefault(member.place.node, []).append(member)
    return list(nodes.values())


def _start(members: list[_Member], config: Config, options: list[str]) -> None:
    """Tell every rank its place among the others, in the variables that torchrun sets as well."""
    import ray

    port = ray.get(members[0].actor.free_port.remote())
    started = []
    for here in _by_node(members):
        for local_rank, member in enumerate(here):
            environment = {
                "RANK": str(member.number),
                "WORLD_SIZE": str(len(members)),
                "LOCAL_RANK": str(local_rank),
                "LOCAL_WORLD_SIZE": str(len(here)),
                "MASTER_ADDR": members[0].place.address,
                "MASTER_PORT": str(port),
            }
            if member.place.gpus:  # Ray shows each actor its own; ranks choose theirs by number among the node's
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in here for gpu in other.place.gpus)
            started.append(member.actor.start.remote(dump(config), environment, options))
    ray.get(started)


def _watch(members: list[_Member], stops: Callable[[], int]) -> None:
    """Show what the ranks write until all have ended, one has failed, or the user has asked twice to stop."""
    import ray
    from ray.exceptions import ActorUnavailableError, RayActorError

    polls: dict[Any, _Member] = {member.actor.poll.remote(): member for member in members}
    failed_at, forwarded = None, False
    while polls and stops() < 2:
        time.sleep(POLL_SECONDS)
        if stops() and not forwarded:
            for member in members:
                member.actor.send.remote(signal.SIGTERM)
            forwarded = True
        for future in ray.wait(list(polls), num_returns=len(polls), timeout=0)[0]:
            member = polls.pop(future)
            try:
                answer = ray.get(future)
            except ActorUnavailableError:  # for now; Ray says later whether it is dead
                polls[member.actor.poll.remote()] = member
                continue
            except RayActorError:
                member.lost = True
                continue
            member.show(answer.lines)
            if answer.exit_status is None:
                polls[member.actor.poll.remote()] = member
            else:
                member.end(answer.exit_status)
        if any(member.failed for member in members):
            failed_at = failed_at or time.monotonic()
            if time.monotonic() - failed_at > GRACE_SECONDS:
                return


def _end(actors: list[Any]) -> None:
    """Kill what still runs. A rank without its fellows waits in a collective operation and hears nothing else."""
    import ray

    ray.wait([actor.send.remote(signal.SIGKILL) for actor in actors], num_returns=len(actors), timeout=KILL_SECONDS)
    for actor in actors:
        ray.kill(actor)


@contextlib.contextmanager
def _stops() -> Iterator[Callable[[], int]]:
    """How often SIGINT or SIGTERM came; only after Ray has connected, which installs handlers of its own."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            say(f"{signal.Signals(number).name}: the ranks save and stop; once more kills them")

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: len(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
