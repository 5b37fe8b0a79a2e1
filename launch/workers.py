"""Evaluation on Ray: workers all over the cluster pull shards; another worker takes the shard of a lost one."""

import contextlib
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from .cluster import ClusterError
from .placement import from_anywhere
from .versions import check_nodes

RETRIES = 3  # of one shard, and of workers that die while they start
POLL_SECONDS = 1.0
WAITING_SECONDS = 30.0  # before the first line that no worker comes; each line waits twice as long as the last one
MOST_WAITING_SECONDS = 600.0


@dataclass(frozen=True)
class Evaluation:
    """A detector and the shards to evaluate it on. detector: its place in Ray's object store, unread, in a list."""

    number: int  # of this driver
    detector: list[Any]
    location: Location


class ShardWorker:
    """The Ray actor that evaluates one shard at a time on some node. Detector and index are loaded once for all."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.images = 0  # of the shard at hand
        self._at_hand: int | None = None  # number of the evaluation that is open

    def place(self) -> tuple[str, str, int]:
        import ray

        return ray.get_runtime_context().get_node_id(), socket.gethostname(), os.getpid()

    def images_done(self) -> int:
        return self.images

    def evaluate(self, evaluation: Evaluation, shard: int) -> ShardResult:
        if self._at_hand != evaluation.number:
            import ray

            self._at_hand = None
            self.open(ray.get(evaluation.detector[0]), evaluation.location)
            self._at_hand = evaluation.number
        return self.detect(shard)

    def open(self, detector: TrainedDetector, location: Location) -> None:
        """Opening the shards asks a source about each of them."""
        torch.set_num_threads(self.threads)
        try:
            self._index = open_shards(location, detector.config.data)
        except (OSError, ValueError) as error:
            raise (OSError if isinstance(error, OSError) else ValueError)(
                f"node {socket.gethostname()} cannot read the shards; every node of the cluster must see them "
                f"under the same path. {error}"
            ) from error
        self._device = device_for(detector.config.train, local_rank=0)
        detector.model.to(self._device)
        self._detector = detector

    def detect(self, shard: int) -> ShardResult:
        self.images = 0
        (result,) = evaluate_shards(self._detector, self._index, [shard], self._device, self._count)
        return result

    def _count(self, images: int) -> None:
        self.images += images


@dataclass
class _Worker:
    """The driver's view of one actor."""

    actor: Any
    host: str = "a node"
    process: int = 0
    poll: Any = None  # the answer to images_done() that is under way
    images: int = 0


class ShardWorkers:
    """A pool of ShardWorker actors over all nodes, for one evaluation after another; `close` ends them.

    device: as in train.device. gpus, wanted: as eval.gpus and eval.workers. threads: of a worker on a CPU. report:
    prints one line. Workers for which there is no room yet are waited for by none of those that work.
    """

    def __init__(
        self, device: str, gpus: float, wanted: int | None, threads: int, report: Callable[[str], None]
    ) -> None:
        import ray

        self._threads, self._report = threads, report
        self._num_evaluations = self._failed_starts = 0
        self._checked: set[str] = set()  # nodes, by Ray's id, that have the same programs
        self.idle: list[_Worker] = []
        self.running: dict[Any, tuple[_Worker, int]] = {}  # future of evaluate() -> worker, shard
        self.starting: dict[Any, _Worker] = {}  # future of place() -> worker
        nodes = [node for node in ray.nodes() if node["Alive"]]
        self._check(nodes)
        offers = [node["Resources"] for node in nodes]
        self._resources, self._most = _resources(device, gpus, wanted, threads, offers)
        self._actor = ray.remote(ShardWorker).options(
            scheduling_strategy="SPREAD",
            max_concurrency=2,  # images_done() answers while evaluate() works
            **self._resources,
        )

    def evaluate(
        self, detector: TrainedDetector, index: ShardIndex, advance: Callable[[int], None]
    ) -> Iterator[ShardResult]:
        """Evaluate every shard once; results come in any order.

        The weights go to Ray's object store once, where each worker reads them once.

        Raises RuntimeError when a shard has lost its worker more than RETRIES times, and for other errors of Ray, and
        ClusterError when a client (`ray://`) loses the cluster. What a worker raises as a user's mistake
        (ValueError, OSError) is raised here as it is.
        """
        import grpc
        from ray.exceptions import RayError

        try:
            yield from self._evaluated(detector, index, advance)
        except RayError as error:
            raise RuntimeError(f"Ray: {error}") from error
        except grpc.RpcError as error:
            raise ClusterError("the connection to the Ray cluster was lost") from error
        finally:  # if it ended early, what is left of it is nobody's
            for worker, _ in self.running.values():
                self._kill(worker)
            self.running = {}

    def _evaluated(
        self, detector: TrainedDetector, index: ShardIndex, advance: Callable[[int], None]
    ) -> Iterator[ShardResult]:
        import ray
        from ray.exceptions import ObjectLostError, OutOfMemoryError, RayActorError

        weights = ray.put(replace(detector, config=from_anywhere(detector.config)))
        location = Location(index.real_location).from_anywhere(Path.cwd())
        self._num_evaluations += 1
        evaluation = Evaluation(self._num_evaluations, [weights], location)
        queue = deque(number for number, shard in enumerate(index.shards) if len(shard.samples))
        lost = dict.fromkeys(queue, 0)
        self._start_for(len(queue))
        finished, counted, waiting_since, patience = 0, 0, time.monotonic(), WAITING_SECONDS
        while queue or self.running:
            while queue and self.idle:
                worker, shard = self.idle.pop(), queue.popleft()
                worker.images = 0
                self.running[worker.actor.evaluate.remote(evaluation, shard)] = (worker, shard)
            for future in ray.wait([*self.running, *self.starting], timeout=POLL_SECONDS)[0]:
                if future in self.starting:
                    self._join(future)
                    continue
                worker, shard = self.running.pop(future)
                self.idle.append(worker)
                try:
                    result = _result(future)
                except (RayActorError, OutOfMemoryError, ObjectLostError) as error:
                    self.idle.remove(worker)
                    lost[shard] += 1
                    where = f"shard {index.shards[shard].name}: its worker on {worker.host} died"
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
            elif time.monotonic() - waiting_since > patience:
                self._report(f"Ray: still waiting for a worker; free in the cluster: {ray.available_resources()}")
                waiting_since, patience = time.monotonic(), min(2 * patience, MOST_WAITING_SECONDS)
            done = finished + self._images_under_way()
            advance(done - counted)
            counted = done

    def close(self) -> None:
        for worker in [*self.idle, *self.starting.values(), *(worker for worker, _ in self.running.values())]:
            self._kill(worker)
        self.idle, self.starting, self.running = [], {}, {}

    @staticmethod
    def _kill(worker: _Worker) -> None:
        import ray

        with contextlib.suppress(ConnectionError):  # of a client that lost the cluster: they ended with its driver
            ray.kill(worker.actor)

    def _start_for(self, shards: int) -> None:
        """As many workers as there are shards for, at most as many as the cluster holds."""
        import ray

        count, there = min(self._most, shards), len(self.idle) + len(self.starting)
        if count > there:
            nodes = sum(node["Alive"] for node in ray.nodes())
            self._report(
                f"Ray: {count} worker(s) for {shards} shard(s) on {nodes} node(s), each with "
                f"{_described(self._resources)}"
            )
        for _ in range(count - there):
            self._start()

    def _check(self, nodes: Sequence[Mapping[str, Any]]) -> None:
        if new := [node for node in nodes if node["NodeID"] not in self._checked]:
            self._checked |= check_nodes(new)

    def _start(self) -> None:
        worker = _Worker(self._actor.remote(self._threads))
        self.starting[worker.actor.place.remote()] = worker

    def _join(self, future: Any) -> None:
        import ray
        from ray.exceptions import RayActorError

        worker = self.starting.pop(future)
        try:
            node, worker.host, worker.process = _result(future)
            self._check([known for known in ray.nodes() if known["NodeID"] == node])
            if node in self._checked:
                self.idle.append(worker)
                return
            why = f"node {worker.host} does not say which programs it has"
        except RayActorError as error:
            why = str(error)
        self._kill(worker)
        self._failed_starts += 1
        if self._failed_starts > RETRIES:
            raise RuntimeError(f"Ray workers do not start: {why}")
        self._report(f"Ray: a worker did not start; another one does ({why})")
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


def _resources(
    device: str, gpus: float, wanted: int | None, threads: int, nodes: Sequence[Mapping[str, float]]
) -> tuple[dict[str, float], int]:
    """What one worker asks of Ray, and how many there are at most: as many as wanted, or as these nodes hold."""
    with_gpus = [node for node in nodes if node.get("GPU", 0)]
    if device == "cuda" or (device == "auto" and with_gpus):
        if not with_gpus and wanted is None:
            raise ClusterError(
                "train.device=cuda, but no node of the Ray cluster has a GPU; set train.device=cpu or auto, or, where "
                "the cluster adds nodes with GPUs, eval.workers"
            )
        a_gpu = int(1 / gpus + 1e-9)  # holds as many workers: Ray gives none a part of two
        return {"num_gpus": gpus}, wanted or sum(int(node["GPU"]) * a_gpu for node in with_gpus)
    cpus = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
    if not cpus and wanted is None:
        raise ClusterError(
            "no node of the Ray cluster offers a CPU (ray start --num-cpus); where the cluster adds nodes by itself, "
            "set eval.workers"
        )
    each = min(threads, *cpus) if cpus else 1  # which any node will offer
    return {"num_cpus": each}, wanted or sum(count // each for count in cpus)


def _described(resources: Mapping[str, float]) -> str:
    return ", ".join(
        f"{count:g} {name.removeprefix('num_').removesuffix('s').upper()}" for name, count in resources.items()
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
