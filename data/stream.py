"""The data loader: batches from shards, in an endless, exactly ordered stream of training and a finite one to evaluate.

Both are short lists of WebDataset stages. What flows through the training stages is a micro-batch: first its sample
numbers (from `plan.py`), then bytes read by offset, then transformed samples, then a `PackedBatch`. In training a
sample that cannot be used leaves an empty image in its place and a message with the batch; evaluation leaves it out.
"""

import atexit
import hashlib
import json
import signal
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info
from webdataset import filters
from webdataset.pipeline import DataPipeline

from .batch import NOTHING_SIDE, Batch, PackedBatch, Sample, collate, nothing, packed_bytes
from .cache import CachedStorage
from .config import DataConfig
from .images import load_image
from .index import SampleError, ShardIndex, ShardReader
from .loader import Loader
from .parallel import threaded_map, until
from .plan import NOTHING, StepPlan
from .prefetch import Prefetch
from .shared_memory import PAGE_BYTES, SharedMemoryError
from .sources import SourceError
from .splitmix import random_numbers
from .transforms import annotated_sample, load_for
from .views import DRAWS, View, evaluation_sizes, evaluation_view, training_sizes, training_views

Result = TypeVar("Result")

# At which a run saves and stops: a scheduler's, Ctrl-C and the end of the terminal.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

_AHEAD = 2  # batches that each loader process has made or is making
_LOOKED_AT = 500_000  # samples, of the first epochs, whose sizes are looked at for the shared memory

_streams: "weakref.WeakSet[TrainStream]" = weakref.WeakSet()


@atexit.register
def _close_streams() -> None:
    # The workers ignore SIGTERM (see `_ignore_signals`), by which Python would end them when the program exits.
    for stream in list(_streams):
        stream.close()


@dataclass(frozen=True)
class StoredSample:
    """A sample as its shard holds it."""

    shard: int
    row: int
    image: bytes
    entry: dict[str, Any]  # image_id, file_name, height, width, annotations


class TrainStream:
    """The training data loader of one rank: its micro-batches, step by step.

    The global batch of a step is the same for every world size, accumulation and number of workers.

    batch_size: images of one optimizer step over all ranks and micro-batches (the global batch). Raises ValueError
    when it is no multiple of world_size * accumulation, or with remainder "drop" exceeds the number of images.
    """

    def __init__(
        self,
        index: ShardIndex,
        config: DataConfig,
        *,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        seed: int,
    ) -> None:
        self._index = index
        self._config = config
        self._plan = StepPlan(
            shard_sizes=tuple(len(shard.samples) for shard in index.shards),
            batch_size=batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            seed=seed,
            window=config.shuffle_window,
            remainder=config.remainder,
            seen_sizes=partial(seen_sizes, index.samples, config, seed) if config.similar_sizes else None,
        )
        self.num_samples = index.num_samples
        self.steps_per_epoch = self._plan.steps_per_epoch
        self.order = _order(index, config, batch_size, seed)
        self._batches: Generator[PackedBatch | OSError, None, None] | None = None
        self._position: tuple[int, int] | None = None  # (epoch, step) that the open loader gives next
        self._prefetch: Prefetch | None = None
        _streams.add(self)

    def steps(self, epoch: int, first_step: int = 0, stop: Callable[[], bool] = lambda: False) -> Iterator[list[Batch]]:
        """The micro-batches of each optimizer step of an epoch, from `first_step` on; fewer when `stop()` says so.

        The loader stays open between epochs and reads ahead into the next one. Raises SourceError when a shard cannot
        be fetched, SharedMemoryError when it is too small for a batch.
        """
        for step in range(first_step, self.steps_per_epoch):
            if self._position != (epoch, step):
                self._open(epoch, step, stop)
            assert self._batches is not None
            self._position = None
            if self._prefetch:
                self._prefetch.at(epoch, step)
            micro_batches = [self._checked(batch) for batch in islice(self._batches, self._plan.accumulation)]
            if len(micro_batches) < self._plan.accumulation:
                return self.close()
            self._position = (epoch, step + 1) if step + 1 < self.steps_per_epoch else (epoch + 1, 0)
            yield micro_batches

    def shared_bytes(self, steps: int, free: int, pinned: bool) -> int:
        """Peak shared memory, in bytes, of the batches of `steps` steps: those being made, queued and in use.

        Returns 0 if a rough bound, without the image sizes, is already below `free`. pinned: batches are copied to
        pinned memory as soon as they are made.
        """
        workers, accumulation, number = self._config.workers, self._plan.accumulation, self._plan.micro_batch_size
        if not workers:
            return 0
        at_once = _AHEAD * workers + 1
        if not pinned:  # a step's batches are freed when all of the next step's are there, and others begun
            at_once = _AHEAD * workers + 2 * accumulation
        longest = 2 * self._config.long_side
        if at_once * packed_bytes(number, longest, longest, 0) < free:
            return 0
        count = max(at_once, min(steps * accumulation + _AHEAD * workers, _LOOKED_AT // number))
        sizes = np.concatenate(list(self._seen(count)))
        needed = [
            -(-packed_bytes(number, height, width, 0) // PAGE_BYTES) * PAGE_BYTES
            for height, width in sizes.reshape(count, number, 2).max(axis=1).tolist()
        ]
        # A page more for the boxes of each; and one for each semaphore of the queues between the processes.
        pages = at_once + 4 * workers + 16
        return int(np.convolve(needed, np.ones(at_once, dtype=np.int64), "valid").max()) + pages * PAGE_BYTES

    def _seen(self, count: int) -> Iterator[np.ndarray]:
        """(n, 2) the (height, width) of the images of this rank's first micro-batches, epoch after epoch."""
        micro_batches = islice(self._plan.micro_batches(0), count)
        for epoch, group in groupby(micro_batches, key=lambda micro_batch: micro_batch[0]):
            samples = np.array([samples for _, samples in group]).ravel()
            sizes = seen_sizes(self._index.samples, self._config, self._plan.seed, epoch, samples)
            yield np.where((samples == NOTHING)[:, None], NOTHING_SIDE, sizes)

    def close(self) -> None:
        """End the loader's worker processes."""
        if self._batches is not None:
            self._batches.close()  # and with it the loader's iterator, which ends its workers
        if self._prefetch is not None:
            self._prefetch.close()
        self._batches = self._position = self._prefetch = None

    def _open(self, epoch: int, first_step: int, stop: Callable[[], bool]) -> None:
        self.close()
        workers = self._config.workers
        shards, storage = self._index.shards, self._index.storage
        if isinstance(storage, CachedStorage):
            windows = self._plan.windows(epoch, first_step)
            self._prefetch = Prefetch(windows, lambda shard: storage.ensure(shards[shard]))
        pipeline: Any = training_pipeline(self._index, self._plan, self._config, epoch, first_step)  # iterable
        loader: Loader[PackedBatch | OSError] = Loader(
            DataLoader(
                pipeline,
                batch_size=None,
                num_workers=workers,
                prefetch_factor=_AHEAD if workers else None,
                pin_memory=torch.cuda.is_available(),
                worker_init_fn=_ignore_signals if workers else None,
                # Its own generator: by default the loader draws a seed from the global one, which would make the
                # model's random numbers depend on when the loader was opened.
                generator=torch.Generator(),
            )
        )
        self._batches = until(stop, loader.batches(), loader.kill)
        self._position = (epoch, first_step)

    def _checked(self, batch: PackedBatch | OSError) -> Batch:
        if isinstance(batch, OSError):
            self.close()
            raise batch
        return batch.batch()


def _order(index: ShardIndex, config: DataConfig, batch_size: int, seed: int) -> str:
    """A fingerprint of all that decides which image comes in which step of an epoch."""
    settings = [batch_size, seed, config.shuffle_window, config.remainder, config.similar_sizes]
    if config.similar_sizes:
        settings += [config.short_sides, config.long_side, config.crop, config.crop_resize_short_sides]
        settings += [config.crop_sizes]
    settings += [[len(shard.samples) for shard in index.shards]]
    ids = np.ascontiguousarray(index.samples["image_id"]).tobytes()
    return hashlib.sha256(json.dumps(settings).encode() + ids).hexdigest()[:16]


def training_pipeline(
    index: ShardIndex, plan: StepPlan, config: DataConfig, epoch: int, first_step: int
) -> DataPipeline:
    """The stages from sample numbers to batches; runs inside each loader worker on the worker's own micro-batches."""
    reader = ShardReader(index)

    def planned() -> Iterator[tuple[int, list[int]]]:
        worker = get_worker_info()
        number, count = (worker.id, worker.num_workers) if worker else (0, 1)
        # The loader takes one batch from each worker in turn, so dealing them out keeps the order.
        return islice(plan.micro_batches(epoch, first_step), number, None, count)

    def read(micro_batch: tuple[int, list[int]]) -> tuple[int, list[StoredSample | SampleError | None]]:
        epoch, samples = micro_batch
        return epoch, [None if n == NOTHING else _or_error(read_sample, reader, *index.locate(n)) for n in samples]

    def augment(micro_batch: tuple[int, list[StoredSample | SampleError | None]]) -> list[Sample | SampleError | None]:
        epoch, found = micro_batch
        stored = [sample for sample in found if isinstance(sample, StoredSample)]
        views = iter(seen_views([sample.entry for sample in stored], config, plan.seed, epoch))
        return [
            _or_error(_seen, reader, sample, index, next(views), config.most_pixels, True)
            if isinstance(sample, StoredSample)
            else sample
            for sample in found
        ]

    return DataPipeline(
        planned, partial(reader.ahead, read), filters.map(augment), filters.map(packed), errors_as_items
    )


def errors_as_items(batches: Iterable[PackedBatch]) -> Iterator[PackedBatch | OSError]:
    """Pass an error that the user can fix on as the last item: raised in a worker, it would arrive as a traceback."""
    try:
        yield from batches
    except (SourceError, SharedMemoryError) as error:
        yield (SourceError if isinstance(error, SourceError) else SharedMemoryError)(str(error))


def packed(found: Sequence[Sample | SampleError | None]) -> PackedBatch:
    """A batch with an empty image in the place of each sample that is bad or not there."""
    samples = [sample if isinstance(sample, Sample) else nothing() for sample in found]
    return collate(samples, [str(sample) for sample in found if isinstance(sample, SampleError)])


def read_sample(reader: ShardReader, shard: int, row: int) -> StoredSample:
    return StoredSample(shard, row, *reader.sample(shard, row))


def seen_views(entries: Sequence[Mapping[str, Any]], config: DataConfig, seed: int, epoch: int) -> list[View]:
    """The training views of samples; their random numbers belong to (seed, epoch, image id)."""
    ids, heights, widths = (np.array([entry[name] for entry in entries]) for name in ("image_id", "height", "width"))
    return training_views(heights, widths, config, random_numbers(seed, epoch, ids, DRAWS))


def seen_sizes(rows: np.ndarray, config: DataConfig, seed: int, epoch: int, samples: np.ndarray) -> np.ndarray:
    """(n, 2) the (height, width) of those views, from the index alone. rows: of SAMPLE_DTYPE, by sample number."""
    chosen = rows[samples]
    random = random_numbers(seed, epoch, chosen["image_id"], DRAWS)
    return training_sizes(chosen["height"], chosen["width"], config, random)


@dataclass(frozen=True)
class EvaluationBatch:
    """Images of one shard and one exact size, their entries there, and what is wrong with those that are left out."""

    shard: int
    batch: Batch | None  # None where every image is left out
    entries: list[dict[str, Any]]
    bad_samples: tuple[str, ...]


def evaluation_batches(
    index: ShardIndex, shards: Sequence[int], config: DataConfig, *, batch_size: int
) -> Generator[EvaluationBatch, None, None]:
    """Each image of some shards once, in a fixed order; the images of a batch have one exact size, so none is padded.

    Images are decoded by `config.workers` threads (decoding and resizing release Python's lock), two batches ahead,
    also into the next shard. A sample that cannot be read or decoded is left out.
    """
    batches = [(shard, rows) for shard in shards for rows in _rows_of_batches(index, shard, config, batch_size)]
    reader = ShardReader(index)

    def read(place: tuple[int, int]) -> StoredSample | SampleError:
        return _or_error(read_sample, reader, *place)

    def decode(stored: StoredSample | SampleError) -> tuple[Sample, dict[str, Any]] | SampleError:
        if isinstance(stored, SampleError):
            return stored
        view = evaluation_view(stored.entry["height"], stored.entry["width"], config)
        sample = _or_error(_seen, reader, stored, index, view, config.most_pixels, False)
        return sample if isinstance(sample, SampleError) else (sample, stored.entry)

    pipeline = DataPipeline(
        lambda: ((shard, row) for shard, rows in batches for row in rows),
        partial(reader.ahead, read),
        partial(threaded_map, decode, threads=config.workers, ahead=2 * batch_size),
        lambda samples: (_evaluation_batch(shard, list(islice(samples, len(rows)))) for shard, rows in batches),
    )
    try:
        yield from pipeline
    finally:
        reader.close()


def _rows_of_batches(index: ShardIndex, shard: int, config: DataConfig, batch_size: int) -> list[list[int]]:
    samples = index.shards[shard].samples
    rows_of_size: dict[tuple[int, int], list[int]] = {}
    for row, (height, width) in enumerate(evaluation_sizes(samples["height"], samples["width"], config).tolist()):
        rows_of_size.setdefault((height, width), []).append(row)
    return [rows[i : i + batch_size] for rows in rows_of_size.values() for i in range(0, len(rows), batch_size)]


def _evaluation_batch(shard: int, found: Sequence[tuple[Sample, dict[str, Any]] | SampleError]) -> EvaluationBatch:
    bad = tuple(str(sample) for sample in found if isinstance(sample, SampleError))
    good = [sample for sample in found if not isinstance(sample, SampleError)]
    batch = collate([sample for sample, _ in good]).batch() if good else None
    return EvaluationBatch(shard, batch, [entry for _, entry in good], bad)


def _seen(
    reader: ShardReader, stored: StoredSample, index: ShardIndex, view: View, most_pixels: int, reduced: bool
) -> Sample:
    entry = stored.entry
    height, width = entry["height"], entry["width"]
    try:
        if reduced:
            image = load_for(stored.image, height, width, view, most_pixels, entry["orientation"])
        else:
            image = load_image(
                stored.image, most_pixels=most_pixels, stated=(height, width), orientation=entry["orientation"]
            )
        return annotated_sample(image, view, entry, index.categories)
    except ValueError as error:
        raise reader.error(stored.shard, stored.row, error) from error


def _or_error(function: Callable[..., Result], *arguments: Any) -> Result | SampleError:
    try:
        return function(*arguments)
    except SampleError as error:
        return error


def _ignore_signals(worker: int) -> None:
    # Ctrl-C and a scheduler's signals reach the whole process group; the trainer decides when its workers end.
    # They end by themselves within seconds when the trainer is gone.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
