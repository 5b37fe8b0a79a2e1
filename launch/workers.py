"""Evaluation on Ray: workers all over the cluster pull shards; another worker takes the shard of a lost one."""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..core.checkpoint import TrainedDetector
from ..core.evaluation.evaluator import ShardResult, evaluate_shards
from ..core.training.world import device_for
from ..data.cache import open_shards
from ..data.index import ShardIndex
from ..data.location import Location
from .placement import from_anywhere

RETRIES = 3  # of one shard, and of workers that die while they start
POLL_SECONDS = 1.0
WAITING_SECONDS = 30.0


class ShardWorker:
    """The Ray actor that evaluates one shard at a time on some node."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.images = 0  # of the shard at hand
        self._opened: tuple[object, ShardIndex] | None = None  # of which evaluation, and its shards

    def place(self) -> tuple[str, int]:
        return socket.gethostname(), os.getpid()

    def images_done(self) -> int:
        return self.images

    def evaluate(self, detector: TrainedDetector, location: Location, shard: int) -> ShardResult:
        self.images = 0
        torch.set_num_threads(self.threads)
        index = self._index(detector, location)
        device = device_for(detector.config.train, local_rank=0)
        detector.model.to(device)
        (result,) = evaluate_shards(detector, index, [shard], device, self._count)
        return result

    def _index(self, detector: TrainedDetector, location: Location) -> ShardIndex:
        """Opened once for all shards of a checkpoint: opening asks a source about each of them."""
        evaluation = (location, detector.config.data, detector.path)
        if self._opened is None or self._opened[0] != evaluation:
            try:
                self._opened = evaluation, open_shards(location, detector.config.data)
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"node {socket.gethostname()} cannot read the shards; every node of the cluster must see them "
                    f"under the same path. {error}"
                ) from error
        return self._opened[1]

    def _count(self, images: int) -> None:
        self.images += images


@dataclass
class _Worker:
    """The driver's view of one actor."""

    actor: Any
    node: str = "a node"
    process: int = 0
    poll: Any = None  # the answer to images_done() that is under way
    images: int = 0


class ShardWorkers:
    """A pool of ShardWorker actors over all nodes; `close` gives their resources back.

    location: of the shards. most: no more workers than this. device: as in train.device. threads: of a worker on a CPU.
    report: prints one line.
    """

    def __init__(
        self, location: str | Path, most: int, device: str, threads: int, report: Callable[[str], None]
    ) -> None:
        import ray

        self._location = Location(location).from_anywhere(Path.cwd())
        self._threads = threads
        self._report = report
        self._failed_starts = 0
        self.idle: list[_Worker] = []
        self.running: dict[Any, tuple[_Worker, int]] = {}  # future of evaluate() -> worker, shard
        self.starting: dict[Any, _Worker] = {}  # future of place() -> worker
        resources, possible = _resources(device, threads)
        self._actor = ray.remote(ShardWorker).options(
            scheduling_strategy="SPREAD",
            max_concurrency=2,  # images_done() answers while evaluate() works
            **resources,
        )
        count = min(possible, most)
        nodes = sum(node["Alive"] for node in ray.nodes())
        report(f"Ray: {count} worker(s) for {most} shard(s) on {nodes} node(s), each with {_described(resources)}")
        for _ in range(count):
            self._start()

    def evaluate(
        self, detector: TrainedDetector, index: ShardIndex, advance: Callable[[int], None]
    ) -> Iterator[ShardResult]:
        """Evaluate every shard once; results come in any order.

        The weights go to Ray's object store once, where the workers read them.

        Raises RuntimeError when a shard has lost its worker more than RETRIES times. What a worker raises as a
        user's mistake (ValueError, OSError) is raised here as it is.
        """
        import ray
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

        weights = ray.put(replace(detector, config=from_anywhere(detector.config)))
        queue = deque(number for number, shard in enumerate(index.shards) if len(shard.samples))
        lost = dict.fromkeys(queue, 0)
        finished, counted, waiting_since = 0, 0, time.monotonic()
        while queue or self.running:
            while queue and self.idle:
                worker, shard = self.idle.pop(), queue.popleft()
                worker.images = 0
                self.running[worker.actor.evaluate.remote(weights, self._location, shard)] = (worker, shard)
            for future in ray.wait([*self.running, *self.starting], timeout=POLL_SECONDS)[0]:
                if future in self.starting:
                    self._join(future)
                    continue
                worker, shard = self.running.pop(future)
                try:
                    result = _result(future)
                    self.idle.append(worker)
                except (RayActorError, OutOfMemoryError, ObjectLostError) as error:
                    lost[shard] += 1
                    where = f"shard {index.shards[shard].name}: its worker on {worker.node} died"
                    if lost[shard] > RETRIES:
                        raise RuntimeError(f"{where}, for the {lost[shard]}th time: {error}") from error
                    self._report(f"Ray: {where}; another one takes the shard (retry {lost[shard]} of {RETRIES})")
                    queue.append(shard)
                    self._start()
                    continue
                finished += len(index.shards[shard].samples)
                yield result
            if self.running:
                waiting_since = time.monotonic()
            elif time.monotonic() - waiting_since > WAITING_SECONDS:
                self._report(f"Ray: still waiting for a worker; free in the cluster: {ray.available_resources()}")
                waiting_since = time.monotonic()
            done = finished + self._images_under_way()
            advance(done - counted)
            counted = done

    def close(self) -> None:
        import ray

        for worker in [*self.idle, *self.starting.values(), *(worker for worker, _ in self.running.values())]:
            ray.kill(worker.actor)
        self.idle, self.starting, self.running = [], {}, {}

    def _start(self) -> None:
        worker = _Worker(self._actor.remote(self._threads))
        self.starting[worker.actor.place.remote()] = worker

    def _join(self, future: Any) -> None:
        from ray.exceptions import RayActorError

        worker = self.starting.pop(future)
        try:
            worker.node, worker.process = _result(future)
            self.idle.append(worker)
        except RayActorError as error:
            self._failed_starts += 1
            if self._failed_starts > RETRIES:
                raise RuntimeError(
                    f"Ray workers do not start; is the same ddetr installed on every node? {error}"
                ) from error
            self._report(f"Ray: a worker died while it started; another one starts ({error})")
            self._start()

    def _images_under_way(self) -> int:
        """Images of unfinished shards, as far as the workers have answered. Never waits for them."""
        import ray
        from ray.exceptions import RayError

        for worker, _ in self.running.values():
            if worker.poll is not None and ray.wait([worker.poll], timeout=0)[0]:
                try:
                    worker.images, worker.poll = ray.get(worker.poll), None
                except RayError:  # the future of evaluate() tells the same death
                    continue
            if worker.poll is None:
                worker.poll = worker.actor.images_done.remote()
        return sum(worker.images for worker, _ in self.running.values())


def _resources(device: str, threads: int) -> tuple[dict[str, int], int]:
    """What one worker asks of Ray, and how many such workers the cluster holds."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if device == "cuda" and not gpus:
        raise ValueError("train.device=cuda, but no node of the Ray cluster has a GPU; set train.device=cpu or auto")
    if device != "cpu" and gpus:
        return {"num_gpus": 1}, gpus
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus:
        raise ValueError("no node of the Ray cluster offers a CPU (ray start --num-cpus)")
    each = min(threads, *cpus)
    return {"num_cpus": each}, sum(count // each for count in cpus)


def _described(resources: dict[str, int]) -> str:
    return ", ".join(
        f"{count} {name.removeprefix('num_').removesuffix('s').upper()}" for name, count in resources.items()
    )


def _result(future: Any) -> Any:
    """The value of a future; a user's mistake on the node without Ray's wrapping."""
    import ray
    from ray.exceptions import RayTaskError

    try:
        return ray.get(future)
    except RayTaskError as error:
        if isinstance(error.cause, (ValueError, OSError)):
            raise error.cause from None
        raise
