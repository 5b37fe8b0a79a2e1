"""The order of samples: which rank gets which sample at which step. Pure arithmetic, without a file or a process.

The order of an epoch is a function of seed, epoch, sizes of the shards, window and global batch size alone; with
`seen_sizes` also of the sizes at which images are seen.
World size, gradient accumulation and loader workers only divide it. B is the global batch size, A the number of
micro-batches of a step, each of b = B / (A * world size) images.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from .multiples import nearest

NOTHING = -1  # in place of a sample: an image without pixels of interest that carries no loss

SeenSizes = Callable[[int, np.ndarray], np.ndarray]  # epoch, samples (n,) -> (height, width) they are seen at, (n, 2)


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

    seen_sizes: images of similar size come in one step; None: as the shuffling has it. remainder: what becomes of the
    samples at the end of an epoch's order that fill no batch. "drop" leaves them out of this epoch (each epoch leaves
    out others), "pad" makes a last step of them, filled up with `NOTHING`.
    Raises ValueError when the global batch size is no multiple of world size times accumulation, or when "drop" leaves
    no step.
    """

    shard_sizes: tuple[int, ...]
    batch_size: int
    accumulation: int
    rank: int
    world_size: int
    seed: int
    window: int
    remainder: Literal["drop", "pad"] = "drop"
    seen_sizes: SeenSizes | None = None

    def __post_init__(self) -> None:
        divisor, images = self.accumulation * self.world_size, sum(self.shard_sizes)
        if self.batch_size % divisor:
            raise ValueError(
                f"train.batch_size must be a multiple of ranks * train.accumulation = {self.world_size} * "
                f"{self.accumulation}, got {self.batch_size}; {nearest(self.batch_size, divisor)}"
            )
        if not self.steps_per_epoch:
            raise ValueError(
                f"train.batch_size must be at most the number of images in the shards, {images}, got "
                f"{self.batch_size}; {nearest(self.batch_size, divisor, images)}; or set data.remainder=pad"
            )

    @property
    def micro_batch_size(self) -> int:
        return self.batch_size // (self.accumulation * self.world_size)

    @property
    def steps_per_epoch(self) -> int:
        steps, left = divmod(sum(self.shard_sizes), self.batch_size)
        return steps + (left > 0 and self.remainder == "pad")

    @property
    def _steps_per_window(self) -> int:
        return max(1, self.window // self.batch_size)

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[np.ndarray]:
        """The global batch (B,) of every step of an epoch from `first_step` on.

        With `seen_sizes` the samples of a window are sorted by area into strata: all ranks of a step have equal work.
        Inside a stratum they are sorted by aspect ratio: little is padded. The steps of a window come in random order.
        """
        steps_per_window = self._steps_per_window
        window = steps_per_window * self.batch_size
        order = epoch_order(self.shard_sizes, seed=self.seed, epoch=epoch, window=window)
        raw = np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, 1])
        whole_steps = len(order) // self.batch_size
        for start in range(0, whole_steps, steps_per_window):
            end = min(start + steps_per_window, whole_steps)
            turns = _shuffled(np.arange(end - start), raw)
            if end <= first_step:
                continue
            batches = self._by_size(epoch, order[start * self.batch_size : end * self.batch_size])[turns]
            yield from batches[max(0, first_step - start) :]
        left = order[whole_steps * self.batch_size :]
        if len(left) and self.remainder == "pad":
            yield np.concatenate([left, np.full(self.batch_size - len(left), NOTHING)])

    def windows(self, epoch: int, first_step: int = 0) -> Iterator[tuple[tuple[int, int], list[int]]]:
        """((epoch, step), shards) of every window from the one of a step on, without end: what is read from then on."""
        ends = np.cumsum(self.shard_sizes)
        window = self._steps_per_window * self.batch_size
        while True:
            order = epoch_order(self.shard_sizes, seed=self.seed, epoch=epoch, window=window)
            for start in range(first_step // self._steps_per_window * window, len(order), window):
                shards = np.searchsorted(ends, order[start : start + window], side="right")
                yield (epoch, start // self.batch_size), list(dict.fromkeys(shards.tolist()))
            epoch, first_step = epoch + 1, 0

    def micro_batches(self, epoch: int, first_step: int = 0) -> Iterator[tuple[int, list[int]]]:
        """This rank's (epoch, samples) of every micro-batch from a step on, through all later epochs, without end."""
        while True:
            for batch in self.batches(epoch, first_step):
                for micro_batch in batch.reshape(self.accumulation, self.world_size, self.micro_batch_size):
                    yield epoch, micro_batch[self.rank].tolist()
            epoch, first_step = epoch + 1, 0

    def _by_size(self, epoch: int, samples: np.ndarray) -> np.ndarray:
        """(steps, B); where sizes are equal the order stays."""
        if self.seen_sizes is not None:
            height, width = self.seen_sizes(epoch, samples).T
            aspect = height / width
            by_area = np.argsort(height * width, kind="stable")
            # About as many strata of area as differ in aspect ratio inside one: then groups of 8 differ least in both.
            stratum = max(1, round((8 * len(samples)) ** 0.5 / self.batch_size)) * self.batch_size
            strata = (by_area[i : i + stratum] for i in range(0, len(samples), stratum))
            samples = samples[np.concatenate([s[np.argsort(aspect[s], kind="stable")] for s in strata])]
        return samples.reshape(-1, self.batch_size)
