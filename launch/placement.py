"""How many ranks of a run a Ray cluster holds, and the placement group that keeps their resources."""

import contextlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.config import Config, changed
from ..core.overrides import written
from ..data.location import Location

Bundle = dict[str, float]
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Request:
    """What a run asks of a Ray cluster: `least` to `most` ranks with `resource` each."""

    least: int
    most: int
    resource: str  # GPU or CPU
    threads: int  # of a rank on CPUs; 0 for an equal share of what the cluster has
    images: int  # of a micro-batch over all ranks, which must divide among them

    def bundles(self, nodes: Sequence[Bundle]) -> list[Bundle]:
        """One bundle for each rank, as many as these nodes hold; none if they do not hold enough.

        From a range it takes the largest number that divides the micro-batch, if there is one.
        """
        offered = [int(node.get(self.resource, 0)) for node in nodes]
        smallest = self.threads or 1 if self.resource == "CPU" else 1
        count = min(self.most, sum(number // smallest for number in offered))
        if count < self.least:
            return []
        count = next((n for n in range(count, self.least - 1, -1) if self.images % n == 0), count)
        each = smallest
        if self.resource == "CPU" and not self.threads:
            each = next(n for n in range(max(offered), 0, -1) if sum(number // n for number in offered) >= count)
        return [{self.resource: each}] * count

    def __str__(self) -> str:
        ranks = str(self.least) if self.least == self.most else f"{self.least} to {self.most}"
        each = self.threads or 1 if self.resource == "CPU" else 1
        return f"{ranks} rank(s) with {each} {self.resource} each"


def requested(config: Config, ranks: str | None) -> Request:
    """What `config` and the option --ranks (N, MIN:MAX or none) ask of the connected cluster.

    Raises ValueError for `ranks` of another form, and without them when no node offers the resource.
    """
    match = re.fullmatch(r"([1-9]\d*)(?::([1-9]\d*))?", ranks) if ranks is not None else None
    if ranks is not None and (match is None or int(match[2] or match[1]) < int(match[1])):
        raise ValueError(f"--ranks {ranks}: expected a number of ranks, N, or a range of it, MIN:MAX")
    nodes = _nodes()
    gpus = sum(int(node.get("GPU", 0)) for node in nodes.values())
    resource = "GPU" if config.train.device == "cuda" or (config.train.device == "auto" and gpus) else "CPU"
    if match is not None:
        least, most = int(match[1]), int(match[2] or match[1])
    else:
        least = most = gpus if resource == "GPU" else sum(node.get("CPU", 0) >= 1 for node in nodes.values())
    if least == 0:
        raise ValueError(
            f"train.device={config.train.device}, but no node of the Ray cluster offers a {resource} ({_described()}); "
            + ("set train.device=cpu or auto, or " if resource == "GPU" else "")
            + "give --ranks N to wait for nodes that come later"
        )
    return Request(least, most, resource, config.train.threads, config.train.batch_size // config.train.accumulation)


def from_anywhere(config: Config, here: Path | None = None) -> Config:
    """The same configuration for a process that Ray starts on some node in some folder.

    here: the folder that relative paths and commands mean, by default the one of this process.
    """
    here = here or Path.cwd()
    moved: dict[str, str] = {
        f"{name}.{key}": value.from_anywhere(here)
        for name, section in config
        for key, value in section
        if isinstance(value, Location)
    }
    scheme, colon, folder = config.model.backbone.partition(":")
    if colon and scheme.lower() == "local-dir":
        moved["model.backbone"] = f"{scheme}:{Location(folder).from_anywhere(here)}"
    return changed(config, [written(key, value) for key, value in moved.items()], "the configuration")


@contextlib.contextmanager
def placed(
    request: Request, wait_seconds: float, given_up: Callable[[], bool], report: Callable[[str], None]
) -> Iterator[Any]:
    """A context with a placement group of one bundle for each rank; None when `given_up` says so.

    If the cluster shrinks or grows before that, the group is made again. Raises ValueError that names request and
    cluster when it does not hold the ranks after `wait_seconds`.
    """
    from ray.util.placement_group import placement_group, remove_placement_group

    group, bundles, told = None, [], False
    deadline = time.monotonic() + wait_seconds
    try:
        while not given_up():
            now = request.bundles(list(_nodes().values()))
            if now != bundles:
                if group is not None:
                    remove_placement_group(group)
                group = placement_group(now, strategy="PACK") if now else None
                bundles = now
            if group is None:
                time.sleep(RETRY_SECONDS)
            elif group.wait(RETRY_SECONDS):
                yield group
                return
            if time.monotonic() > deadline:
                raise ValueError(_refusal(request, bundles, wait_seconds))
            if not told:
                report(f"Ray: waiting up to {wait_seconds:g} s for {request}; the cluster has {_described()}")
                told = True
        yield None
    finally:
        if group is not None:
            remove_placement_group(group)


def _refusal(request: Request, bundles: list[Bundle], wait_seconds: float) -> str:
    import ray

    asked = f"{request} asked for, but the Ray cluster has {_described()}"
    if not bundles:
        return f"{asked} (waited {wait_seconds:g} s); ask for fewer with --ranks, add nodes, or wait longer with --wait"
    free = ray.available_resources()
    return (
        f"{asked}, of which {free.get('GPU', 0):g} GPU and {free.get('CPU', 0):g} CPU are free (waited "
        f"{wait_seconds:g} s for {len(bundles)} x {bundles[0][request.resource]:g} {request.resource}); "
        f"end what uses the others (`ray status`), or wait longer with --wait"
    )


def _nodes() -> dict[str, Bundle]:
    """The resources of each node that is alive, by Ray's id of it."""
    import ray

    return {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}


def _described() -> str:
    nodes = list(_nodes().values())
    return f"{len(nodes)} node(s): " + "; ".join(
        f"{node.get('GPU', 0):g} GPU and {node.get('CPU', 0):g} CPU" for node in nodes
    )
