"""Which sample comes when: pure arithmetic on numbers, without a file or a process.

The order of an epoch is a function of (seed, epoch, sizes of the shards, window) alone. Ranks, micro-batches and
loader workers only divide it. B is the global batch, A the micro-batches of a step, b = B / (A * world) images each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np


def random_numbers(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch, whoever loads it. Use only `.random()` (see `_shuffled`)."""
    # A counter-based generator: each sample is a place far away in the one stream of (seed, epoch).
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, sample, 1]))


def epoch_order(shard_sizes: Sequence[int], *, seed: int, epoch: int, window: int) -> np.ndarray:
    """A permutation of all samples, numbered through the shards in order: (num_samples,) int64.

    Shards come in random order; then samples are shuffled inside windows of `window` neighbours. So at any time only
    the shards of one window are being read, and a sample moves at most `window` places from its shard's.
    """
    ends = list(accumulate(shard_sizes))
    raw = np.random.Philox(key=[seed, epoch])
    shards = _shuffled(np.arange(len(shard_sizes)), raw)
    order = np.concatenate([np.arange(ends[i] - shard_sizes[i], ends[i]) for i in shards.tolist()])
    return np.concatenate([_shuffled(order[i : i + window], raw) for i in range(0, len(order), window)])


def _shuffled(values: np.ndarray, raw: np.random.Philox) -> np.ndarray:
    # Sorting by raw bits: numpy keeps a bit generator's stream the same for ever, but not `Generator.permutation`.
    return values[np.argsort(raw.random_raw(len(values)), kind="stable")]


@dataclass(frozen=True)
class StepPlan:
    """How the samples of an epoch become the optimizer steps of one rank.

    Raises ValueError when the global batch does not divide, or exceeds the data set. The samples left over at the end
    of an epoch's order, fewer than a batch, are not used in that epoch; each epoch leaves out others.
    """

    shard_sizes: tuple[int, ...]
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    window: int

    def __post_init__(self) -> None:
        if self.batch_size % (self.accumulation * self.world_size):
            raise ValueError(
                f"train.batch_size must be a multiple of ranks * train.accumulation "
                f"= {self.world_size} * {self.accumulation}, got {self.batch_size}"
            )
        if not self.steps_per_epoch:
            raise ValueError(
                f"train.batch_size must be at most the number of images in the shards, {sum(self.shard_sizes)}, "
                f"got {self.batch_size}"
            )

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.accumulation * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.shard_sizes) // self.batch_size

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, list[int]]]:
        """This rank's (epoch, samples) of every micro-batch from a step on, through all later epochs, without end."""
        while True:
            order = epoch_order(self.shard_sizes, seed=self.seed, epoch=epoch, window=self.window)
            for step in range(first_step, self.steps_per_epoch):
                batch = order[step * self.batch_size : (step + 1) * self.batch_size]
                for micro_batch in batch.reshape(self.accumulation, self.world_size, self.micro_batch_size):
                    yield epoch, micro_batch[self.rank].tolist()
            epoch, first_step = epoch + 1, 0
