"""`ddetr eval --submit`: an evaluation as a job of a Ray cluster."""

import asyncio
import contextlib
import hashlib
import os
import re
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.checkpoint import contents, read_newest
from ..core.config import Config, changed
from ..core.overrides import written
from ..data.location import Location
from .cluster import ClusterError, reachable
from .console import say

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_SECONDS = 1.0
ONE_JOB = "ddetr_command"  # the metadata by which the same command is known again
_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")  # which win over an address that is given to Ray's client
# Ray's own `python` is where the job runs; it starts what is installed there.
_PROGRAM = ("python", "-m", "ddetr.launch.cli", "eval")


def submit(
    paths: Sequence[Path],
    overrides: Sequence[str],
    data: Sequence[str],
    options: Sequence[str],
    address: str,
    *,
    wait: bool = False,
) -> str:
    """Submit `ddetr eval PATH... [options] [overrides]` as a job of the cluster at `address`; returns the job's id.

    The same command that is pending or running there is joined, not started again. wait: print the job's output, and
    raise ChildProcessError if it fails. Paths are made absolute; the cluster's nodes must have what they name.

    Raises ClusterError without a cluster or its job server, and FileNotFoundError and ValueError for what is no
    checkpoint.
    """
    if address == "local":
        raise ValueError("--submit: a job needs a Ray cluster that stays; give its address with --ray")
    follows = "--follow" in options
    known = [] if follows else [read_newest(path, lambda file: contents(file, overrides)) for path in paths]
    shards = [f"--data={Location(location).from_anywhere(Path.cwd())}" for location in data]
    given = _from_anywhere(overrides, known[0].config if known else changed(Config(), overrides, "the settings"))
    command = [*_PROGRAM, *(str(path.absolute()) for path in paths), *shards, *options, *given, "--ray", "auto"]
    name = _name(paths[0], "follow" if follows else "all" if "--all" in options else known[0].step)
    with reachable(address) as found, _without(_ADDRESSES), _as_cluster_errors(address):
        client = _client(found)
        job = _known(client, command) or _submitted(client, name, command)
        say(job)
        say(f"`ray job logs {job}`, `ray job stop {job}`, with --address {client.get_address()}", file=sys.stderr)
        if wait:
            _join(client, job)
    return job


def _from_anywhere(overrides: Sequence[str], config: Config) -> list[str]:
    """The overrides, paths in them absolute. config: has them."""
    moved = []
    for override in overrides:
        section, _, name = override.partition("=")[0].strip().partition(".")
        value = getattr(getattr(config, section, None), name, None)
        is_place = isinstance(value, Location)
        moved.append(written(f"{section}.{name}", value.from_anywhere(Path.cwd())) if is_place else override)
    return moved


def _name(path: Path, what: str | int | None) -> str:
    """Says run and step; Ray takes letters, digits, dots, hyphens and underscores of any name."""
    run = next((part.parent for part in path.resolve().parents if part.name == "checkpoints"), path.resolve())
    step = f"step{what}" if isinstance(what, int) else what or "weights"
    return re.sub(r"[^\w.-]+", "-", f"ddetr-eval-{run.name[:80]}-{step}", flags=re.ASCII)


@contextlib.contextmanager
def _as_cluster_errors(address: str) -> Iterator[None]:
    """Ray's job client raises RuntimeError, whatever it is."""
    try:
        yield
    except RuntimeError as error:
        raise ClusterError(f"the job server of the Ray cluster at {address}: {error}") from error


def _client(address: str) -> "JobSubmissionClient":
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"the Ray cluster at {address} takes no jobs from here: {error}. Its head needs ray[default] and its "
            "dashboard an address that is reached from here (ray start --head --dashboard-host=0.0.0.0)"
        ) from error


def _known(client: "JobSubmissionClient", command: Sequence[str]) -> str | None:
    digest = _digest(command)
    for job in client.list_jobs():
        if (job.metadata or {}).get(ONE_JOB) == digest and not job.status.is_terminal():
            return job.submission_id
    return None


def _submitted(client: "JobSubmissionClient", name: str, command: Sequence[str]) -> str:
    return client.submit_job(
        entrypoint=shlex.join(command),
        submission_id=f"{name}-{secrets.token_hex(3)}",
        metadata={"name": name, ONE_JOB: _digest(command)},
    )


def _digest(command: Sequence[str]) -> str:
    return hashlib.sha256("\0".join(command).encode()).hexdigest()


def _join(client: "JobSubmissionClient", job: str) -> None:
    """Print what the job prints until it ends. Raises ChildProcessError unless it succeeds."""
    import aiohttp

    shown = 0  # characters: the log comes from its beginning each time

    async def follow() -> None:
        nonlocal shown
        seen = 0
        async for lines in client.tail_job_logs(job):
            new = lines[max(0, shown - seen) :]
            seen += len(lines)
            if seen > shown:
                shown = seen
                for line in new.splitlines():
                    say(line)

    while not (info := client.get_job_info(job)).status.is_terminal():  # raises when the job server is gone
        with contextlib.suppress(
            RuntimeError, aiohttp.ClientError
        ):  # the connection ends when the dashboard starts anew
            asyncio.run(follow())
        time.sleep(POLL_SECONDS)
    asyncio.run(follow())
    if info.status != "SUCCEEDED":
        raise ChildProcessError(f"job {job} has ended as {info.status}: {info.message}")


@contextlib.contextmanager
def _without(names: Sequence[str]) -> Iterator[None]:
    """A context without these variables: what the user gave on the command line counts."""
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)
