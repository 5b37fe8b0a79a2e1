"""Who evaluates shards: this process, or workers on a Ray cluster."""

import contextlib
from collections.abc import Callable, Iterator

import torch
from rich.console import Console

from ..core.checkpoint import TrainedDetector
from ..core.config import Config
from ..core.evaluation.evaluator import ShardResult, evaluate_shards
from ..core.training.world import device_for
from ..data.index import ShardIndex

CPU_THREADS = 2  # of every process that evaluates on a CPU, here or in a Ray worker, so that sums are the same

EvaluateShards = Callable[[TrainedDetector, ShardIndex, Callable[[int], None]], Iterator[ShardResult]]


def _evaluate_here(
    detector: TrainedDetector, index: ShardIndex, advance: Callable[[int], None]
) -> Iterator[ShardResult]:
    device = device_for(detector.config.train, local_rank=0)
    detector.model.to(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(CPU_THREADS)
    try:
        yield from evaluate_shards(detector, index, range(len(index.shards)), device, advance)
    finally:
        torch.set_num_threads(threads)


class Evaluators:
    """Evaluates shards in this process, or by workers on a Ray cluster that are kept from checkpoint to checkpoint.

    by: what the results say of who evaluated. report: prints a line about Ray's workers, by default on the console.
    """

    def __init__(
        self,
        ray_address: str | None,
        console: Console,
        by: str = "eval",
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.by = by
        self._address, self._report = ray_address, report or console.print
        self._seen: set[str] = set()  # places of shards
        self._workers: tuple[object, EvaluateShards] | None = None  # for which settings, and what they do
        self._open = contextlib.ExitStack()

    def __enter__(self) -> "Evaluators":
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def is_new(self, index: ShardIndex) -> bool:
        """Whether nobody asked about these shards yet."""
        is_new = index.real_location not in self._seen
        self._seen.add(index.real_location)
        return is_new

    def of(self, config: Config) -> EvaluateShards:
        """What evaluates shards with this configuration; on Ray its workers start."""
        if self._address is None:
            return _evaluate_here
        settings = config.train.device, config.eval.gpus, config.eval.workers
        if self._workers is not None and self._workers[0] != settings:
            self.release()
        if self._workers is None:
            workers = self._open.enter_context(_on_ray(self._address, *settings, self._report))
            self._workers = settings, workers
        return self._workers[1]

    def release(self) -> None:
        """Give the workers back to the cluster, and leave it."""
        self._workers = None
        self._open.close()


@contextlib.contextmanager
def _on_ray(
    address: str, device: str, gpus: float, wanted: int | None, report: Callable[[str], None]
) -> Iterator[EvaluateShards]:
    from .cluster import cluster
    from .workers import ShardWorkers

    with cluster(address):
        workers = ShardWorkers(device, gpus, wanted, CPU_THREADS, report)
        try:
            yield workers.evaluate
        finally:
            workers.close()
