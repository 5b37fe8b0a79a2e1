"""How long 256 GPUs wait for shards that come from an object store: the real plan, simulated connections.

    python benchmarks/feeding.py [--images 118287] [--epochs 3]

What is real: the order of the samples, the windows, and which shards each node needs at which step (`StepPlan`), what
is fetched when (up to AT_ONCE shards at once, at most one window ahead of the trainer; by each loader worker the one
that it needs), and that a node fetches a shard once as long as its cache holds it; with data.fetch=samples, how many
micro-batches a worker asks for early, and how many at once. What is assumed stands in the constants and in the table.
All ranks step together; a step begins when every node has what it needs. First the plan of every rank is run for an
epoch, and what they see together is compared with the set.
"""

import argparse
import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from ddetr.data.config import DataConfig
from ddetr.data.index import READS_AT_ONCE
from ddetr.data.plan import StepPlan
from ddetr.data.prefetch import AT_ONCE

NODES, RANKS_PER_NODE, IMAGES_PER_RANK = 32, 8, 4
RANKS = NODES * RANKS_PER_NODE
IMAGES_PER_SECOND = 25.0  # of one GPU
IMAGE_BYTES = 162 << 10  # COCO's mean
SHARD_IMAGES = 400  # of 64 MiB
LATENCY_SECONDS, LATENCY_SPREAD = 0.03, 1.0  # median and deviation of the logarithm, until a fetch's first byte
STEP_SECONDS = IMAGES_PER_RANK / IMAGES_PER_SECOND
WORKERS = DataConfig().workers
READ_AHEAD = 2 * WORKERS  # micro-batches that a rank's workers have ready or are making


@dataclass(frozen=True)
class Store:
    """What one connection gets. slow: (share of the fetches, by how much they take longer)."""

    name: str
    connection_bytes: float = 90e6  # a second
    slow: tuple[float, float] = (0.0, 1.0)
    slow_node: float = 1.0  # how many times slower node 0 is
    cached: bool = True  # whether the whole set fits the cache
    window: int = DataConfig().shuffle_window
    samples: bool = False  # data.fetch=samples


STORES = (
    Store("as assumed"),
    Store("every 100th fetch takes 10 times as long", slow=(0.01, 10.0)),
    Store("one node of 32 is 4 times slower", slow_node=4.0),
    Store("connections of 30 MB/s", connection_bytes=30e6),
    Store("the set does not fit the cache", cached=False),
    Store("the same, data.shuffle_window=32768", cached=False, window=32768),
    Store("data.fetch=samples", samples=True),
    Store("data.fetch=samples, every 100th 10 times", samples=True, slow=(0.01, 10.0)),
    Store("data.fetch=samples, one node 4 times slower", samples=True, slow_node=4.0),
    Store("data.fetch=samples, 30 MB/s", samples=True, connection_bytes=30e6),
)


def plan_of(rank: int, num_images: int, window: int) -> StepPlan:
    whole, left = divmod(num_images, SHARD_IMAGES)
    sizes = (SHARD_IMAGES,) * whole + ((left,) if left else ())
    return StepPlan(sizes, RANKS * IMAGES_PER_RANK, 1, rank, RANKS, 0, window, remainder="pad")


def seen_by_all(num_images: int) -> tuple[int, int, int]:
    """(steps, samples seen, different ones) of all ranks' plans in one epoch."""
    seen = np.zeros(num_images, dtype=np.int64)
    steps = set()
    for rank in range(RANKS):
        plan = plan_of(rank, num_images, DataConfig().shuffle_window)
        steps.add(plan.steps_per_epoch)
        own = np.concatenate([np.array(n) for _, n in islice(plan.micro_batches(0), plan.steps_per_epoch)])
        np.add.at(seen, own[own >= 0], 1)
    assert len(steps) == 1, "ranks differ in their steps"
    return steps.pop(), int(seen.sum()), int((seen > 0).sum())


class Node:
    """What one node has fetched, and when."""

    def __init__(self, plan: StepPlan, store: Store, slower: float, random: np.random.Generator) -> None:
        self._store, self._slower, self._random = store, slower, random
        self._windows = plan.windows(0)
        self._next = next(self._windows)
        self._begun = (-1, 0)  # the window taken last
        self._recent: list[list[int]] = []
        self._queue: deque[tuple[float, int]] = deque()  # since when a shard is to be fetched ahead
        self._ahead = [0.0] * AT_ONCE  # when each connection is free
        self._workers = [0.0] * (WORKERS * RANKS_PER_NODE)
        self._ready: dict[int, float] = {}  # shard -> when it is here
        self.fetched = 0

    def at(self, position: tuple[int, int], needed: list[int], now: float) -> None:
        """The trainer takes this step now, and workers need these shards: begin what nobody has begun."""
        while self._next[0] <= position or self._begun <= position:
            self._begun, shards = self._next
            self._queue += [(now, shard) for shard in shards]
            self._recent.append(shards)
            if not self._store.cached:
                kept = {shard for window in self._recent[-2:] for shard in window}
                self._ready = {shard: time for shard, time in self._ready.items() if shard in kept}
            self._next = next(self._windows)
        while self._queue and self._ahead[0] <= now:
            since, shard = self._queue.popleft()
            if shard not in self._ready:
                self._fetch(shard, self._ahead, since)
        for shard in needed:
            if shard not in self._ready:
                self._fetch(shard, self._workers, now)

    def _fetch(self, shard: int, connections: list[float], since: float) -> None:
        self._ready[shard] = max(since, heapq.heappop(connections)) + self._seconds()
        heapq.heappush(connections, self._ready[shard])
        self.fetched += 1

    def ready(self, shards: np.ndarray) -> float:
        return max(self._ready[shard] for shard in shards.tolist())

    def _seconds(self) -> float:
        latency = LATENCY_SECONDS * float(np.exp(LATENCY_SPREAD * self._random.standard_normal()))
        share, times = self._store.slow
        seconds = latency + SHARD_IMAGES * IMAGE_BYTES / self._store.connection_bytes
        return seconds * self._slower * (times if self._random.random() < share else 1.0)


def waits(store: Store, num_images: int, epochs: int) -> Iterator[tuple[float, float, float]]:
    """(seconds of steps, seconds of waiting, bytes fetched by a node) of each epoch."""
    plan = plan_of(0, num_images, store.window)
    nodes = [
        Node(plan, store, store.slow_node if number == 0 else 1.0, np.random.default_rng([1, number]))
        for number in range(NODES)
    ]
    now = 0.0
    for epoch in range(epochs):
        waited, before = 0.0, sum(node.fetched for node in nodes)
        batches = [batch.reshape(NODES, -1) // SHARD_IMAGES for batch in plan.batches(epoch)]
        for step, batch in enumerate(batches):
            begin = now
            soon = np.concatenate(batches[step : step + READ_AHEAD], axis=1)
            for node, own, needed in zip(nodes, batch, soon, strict=True):
                node.at((epoch, step), [shard for shard in dict.fromkeys(needed.tolist()) if shard >= 0], now)
                begin = max(begin, node.ready(np.unique(own[own >= 0])) if (own >= 0).any() else 0.0)
            waited += begin - now
            now = begin + STEP_SECONDS
        fetched = (sum(node.fetched for node in nodes) - before) / NODES
        yield plan.steps_per_epoch * STEP_SECONDS, waited, fetched * SHARD_IMAGES * IMAGE_BYTES


def waits_for_samples(store: Store, num_images: int, epochs: int) -> Iterator[tuple[float, float, float]]:
    """The same with data.fetch=samples: a rank's micro-batches, each read by a thread, one image after the other."""
    steps = plan_of(0, num_images, store.window).steps_per_epoch
    random = np.random.default_rng(2)
    slower = np.where(np.arange(RANKS) < RANKS_PER_NODE, store.slow_node, 1.0)
    begun, done, now = [], [], 0.0  # by step: when it began, when each rank (RANKS,) had its images
    for _ in range(epochs):
        waited = 0.0
        for _ in range(steps):
            shape = (RANKS, IMAGES_PER_RANK)
            latency = LATENCY_SECONDS * np.exp(LATENCY_SPREAD * random.standard_normal(shape))
            seconds = (latency + IMAGE_BYTES / store.connection_bytes) * slower[:, None]
            seconds = (seconds * np.where(random.random(shape) < store.slow[0], store.slow[1], 1.0)).sum(1)
            threads = WORKERS * READS_AT_ONCE
            asked = begun[-2 * threads] if len(begun) >= 2 * threads else 0.0
            free = done[-threads] if len(done) >= threads else np.zeros(RANKS)
            done.append(np.maximum(asked, free) + seconds)
            begun.append(max(now, float(done[-1].max())))
            waited += begun[-1] - now
            now = begun[-1] + STEP_SECONDS
        yield steps * STEP_SECONDS, waited, num_images / NODES * IMAGE_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=118_287, help="of the set; COCO train2017 by default")
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    steps, samples, different = seen_by_all(arguments.images)
    print(f"{RANKS} ranks, {steps} steps: {samples:,} samples seen, {different:,} different, of {arguments.images:,}")
    shown = f"{IMAGES_PER_SECOND:.0f} images/s a GPU, {IMAGES_PER_RANK} a step, latency {1e3 * LATENCY_SECONDS:.0f} ms"
    print(f"{NODES} nodes of {RANKS_PER_NODE}, {shown}, {AT_ONCE} connections a node ahead, one a worker")
    print("| object store | epoch | steps, s | waiting, s | share | fetched by a node, GB |")
    print("| --- " * 6 + "|")
    for store in STORES:
        simulated = waits_for_samples if store.samples else waits
        for epoch, (seconds, waited, fetched) in enumerate(simulated(store, arguments.images, arguments.epochs)):
            share = f"{100 * waited / (seconds + waited):.1f} %"
            print(
                f"| {store.name} | {epoch} | {seconds:.1f} | {waited:.1f} | {share} | {fetched / 1e9:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
