"""The training loop: batches in, optimizer steps, reports, checkpoints and evaluations out.

Every random number of step s on rank r follows from (seed, s, r), and the stream's position from s: a checkpoint
needs no generator state, and a resumed run repeats what the uninterrupted one does.
"""

import logging
import math
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import FrameType
from typing import cast

import torch
from torch import Tensor, nn

from ...data.batch import Batch, normalised
from ...data.categories import Categories
from ...data.index import SampleError, ShardIndex
from ...data.stream import STOP_SIGNALS, TrainStream
from ...data.text import visible
from ..checkpoint.codec import Checkpoint, Position
from ..checkpoint.manifest import is_evaluated, record_evaluation
from ..checkpoint.trained import load_detector, load_weights
from ..checkpoint.weights import find_checkpoint
from ..config import Config
from ..evaluation.evaluator import ShardResult, evaluate_shard, evaluation
from ..model.criterion import criterion
from ..model.detector import build
from ..model.finite import finite_or_poison, first_not_finite
from ..model.transfer import to_device
from .engine import Engine
from .heartbeat import Watch
from .reports import EvaluationReport, FaultReport, Observe, Pace, Progress, SavingReport, StepReport, named_losses
from .saving import Saver
from .schedule import Timetable, other_plan
from .world import World

log = logging.getLogger("ddetr")


@dataclass(frozen=True)
class Step:
    """What one optimizer step did on this rank."""

    weighted: Tensor  # (3, layers) weighted losses of the rank's share; their mean over ranks is the global batch's
    errors: Tensor  # (2,) the last layer's class error in percent, and cardinality error in objects per image
    num_images: Tensor  # () how many images of all ranks carried a loss
    layers: tuple[str, ...]
    taken: bool  # not when a gradient of some rank was not finite
    own_seconds: float  # that this rank's forward passes and losses took


def train_step(
    engine: Engine, micro_batches: list[Batch], number: int, config: Config, world: World, stop: bool
) -> Step | None:
    """Optimizer step `number`, from 1: forward, losses and backward for each micro-batch, then AdamW.

    None, and nothing is done, when some rank asks to `stop`; then its micro-batches may be missing.
    All ranks divide by the same number of objects. Forward and losses make the host wait for the device once a
    micro-batch, for the matching; DeepSpeed's step does so too, for the norm of the gradients.
    """
    totals = torch.tensor([0.0, 0.0, 0.0, float(stop)])
    for batch in micro_batches:
        counts = batch.num_boxes
        totals[:3] += torch.stack([counts.sum(), counts.clamp(max=config.model.queries).sum(), batch.is_real.sum()])
    objects, matched, images, stops = world.sum(totals)
    if stops:
        return None
    parts = world.size * len(micro_batches)
    all_losses, taken, own_seconds = [], True, 0.0
    for batch in micro_batches:
        began = time.perf_counter()
        batch = batch.to(world.device)
        pixels = normalised(batch.images, batch.padding_mask, engine.dtype)
        predictions = engine.run(pixels, batch.padding_mask)
        losses = criterion(predictions, batch, config.optim, objects, parts, matched, images)
        own_seconds += time.perf_counter() - began
        engine.run.backward(finite_or_poison(losses.weighted(config.optim).sum()))  # divided by their number in there
        taken &= engine.step(number)  # takes effect after the last micro-batch
        all_losses.append(losses)
    weighted = torch.stack([losses.weighted(config.optim).detach() for losses in all_losses]).mean(0)
    last = len(predictions.aux)
    errors = [torch.stack([losses.class_error, losses.cardinality_error[last]]) for losses in all_losses]
    return Step(weighted, torch.stack(errors).mean(0), images, losses.layers, taken, own_seconds)


def training_stream(config: Config, index: ShardIndex, world: World) -> TrainStream:
    """This rank's batches. Raises ValueError when train.batch_size does not divide among ranks and micro-batches."""
    return TrainStream(
        index,
        config.data,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
    )


def train(
    config: Config,
    *,
    run_directory: Path,
    world: World,
    stream: TrainStream,
    categories: Categories,
    validation_index: ShardIndex | None,
    resume: bool,
    observe: Observe,
) -> bool:
    """Train until config.train.epochs or max_steps, or until one of STOP_SIGNALS, also while it evaluates or
    waits for a batch; returns whether it goes no further although nobody asked this rank, only others, to stop.

    A step whose loss or gradient is not finite on some rank is skipped on all. Raises FloatingPointError after
    train.most_skipped_steps of them in a row, when the state from before them is saved; ValueError or
    FileNotFoundError when train.initial_weights cannot be loaded.
    """
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    engine, checkpoint, done_before = _engine(config, run_directory, world, categories, resume)
    timetable = Timetable.of(config.train, stream.steps_per_epoch, done_before)
    step = saved_step = done_before.step if done_before else 0
    last_step = timetable.last_step
    skipped_in_a_row, stopped, left = 0, False, False
    known_bad: set[str] = set()
    pace, progress = Pace(), Progress(config, step, timetable, quiet=world.rank > 0)
    if done_before and (other := other_plan(done_before, timetable, stream.order)):
        progress.line(other)
    saver = Saver(run_directory, config.train.keep_checkpoints, world, observe)

    def save(wait: bool = False) -> Path | None:
        """Where the state is saved, if that was waited for. Raises OSError if it is not saved and was waited for."""
        nonlocal saved_step
        watch.at("saving", step)
        if step > saved_step:
            observe(SavingReport(step))
            position = timetable.position(step, stream.order)
            saver.begin(lambda: engine.snapshot(run_directory, position, categories), step, position.epoch)
            saved_step = step
        return saver.written() if wait else None

    def evaluate(saved: Path) -> bool:
        """Whether that was done, and not left for the run that continues this one."""
        assert validation_index is not None
        report = _evaluate(saved, config, validation_index, world, watch, step, timetable.epoch(step - 1))
        if report is not None:
            progress.evaluation(report)
            observe(report)
        return report is not None

    def evaluation_is_due() -> bool:
        every, last = config.train.evaluate_every_epochs, step >= last_step
        return validation_index is not None and _is_due(every, timetable.epoch(step), last)

    watch = Watch(world, config.train, lambda message: observe(FaultReport(step, message)), saver.wait)
    with closing(stream), watch, closing(saver), _signals(watch.ask_to_stop):
        due = timetable.step_in_epoch(step) == 0 and evaluation_is_due()
        # The process had ended before.
        if checkpoint and due and not world.agree(lambda: is_evaluated(checkpoint), bool):
            left = not evaluate(checkpoint)
        while step < last_step and not stopped:
            epoch = timetable.epoch(step)
            batches = stream.steps(epoch, timetable.step_in_epoch(step), watch.stop)
            for number in range(step + 1, timetable.end_of_epoch(step) + 1):
                clock = time.perf_counter()
                watch.at("waiting for its batch", number)
                micro_batches = next(batches, [])  # nothing when asked to stop meanwhile
                waited = time.perf_counter() - clock
                watch.at("training", number, [i for batch in micro_batches for i in batch.image_ids.tolist()])
                rate = timetable.learning_rate(config.optim, step)
                engine.set_learning_rate(rate)
                _seed(config.train.seed, step, world.rank)
                done = train_step(engine, micro_batches, number, config, world, watch.stop())
                if done is None:
                    stopped = True
                    break
                step = number
                bad = [message for batch in micro_batches for message in batch.bad_samples]
                means = torch.cat([done.weighted.flatten(), done.errors, done.num_images[None]])
                own_seconds = torch.zeros(world.size).index_fill_(
                    0, torch.tensor(world.rank), waited + done.own_seconds
                )
                counts = torch.cat([own_seconds, torch.tensor([float(len(bad))])])
                sums = world.sum(torch.cat([means, to_device(counts, world.device)])).tolist()
                *losses, class_error, cardinality_error, num_images = (
                    value / world.size for value in sums[: len(means)]
                )
                *ranks_seconds, num_bad = sums[len(means) :]
                bad = world.gather([visible(line) for line in bad], str) if num_bad else []
                report = StepReport(
                    step=step,
                    epoch=epoch,
                    losses=named_losses(losses, done.layers),
                    learning_rate=rate,
                    gradient_norm=engine.gradient_norm,
                    images=round(num_images),
                    step_seconds=time.perf_counter() - clock,
                    data_wait_seconds=waited,
                    own_seconds=ranks_seconds[world.rank],
                    skipped=not done.taken,
                    memory_bytes=_peak_memory_bytes(world.device),
                    loss_scale=engine.loss_scale,
                    class_error=class_error,
                    cardinality_error=cardinality_error,
                    not_finite=None if done.taken else _diagnosis(engine, micro_batches, losses, step, config, world),
                    bad_samples=tuple(bad),
                    slow_ranks=tuple(f"{watch.name(rank)} {text}" for rank, text in pace.slow(ranks_seconds)),
                )
                observe(report)
                progress.step(report)
                saver.look()
                skipped_in_a_row = skipped_in_a_row + 1 if report.skipped else 0
                if skipped_in_a_row == config.train.most_skipped_steps:
                    save(wait=True)
                    raise FloatingPointError(
                        f"skipped {skipped_in_a_row} steps in a row, the last one step {step}: {report.not_finite}. "
                        f"The weights from before them are saved. Lower optim.learning_rate, set optim.clip_norm, or "
                        f"use train.precision=fp32"
                    )
                known_bad.update(bad)
                if len(known_bad) > config.data.most_bad_samples * stream.num_samples:
                    save(wait=True)
                    raise SampleError(
                        f"{len(known_bad)} of {stream.num_samples} images are damaged, more than "
                        f"data.most_bad_samples={config.data.most_bad_samples:g}; the last one: {bad[-1]}"
                    )
                every = config.train.checkpoint_every_steps
                if every and step % every == 0 and timetable.step_in_epoch(step) and step < last_step:
                    save()
            if stopped:
                save(wait=True)
                progress.line(f"stopped after step {step} as asked; continue with --resume {run_directory}")
            elif evaluation_is_due():
                try:
                    saved = save(wait=True)
                except OSError:  # reported; room may be made until the last step
                    if step >= last_step:
                        raise
                    progress.line(f"step {step} is not evaluated either")
                else:
                    left = not evaluate(cast(Path, saved))
            elif step >= last_step or _is_due(config.train.checkpoint_every_epochs, timetable.epoch(step)):
                save(wait=step >= last_step)
        return (left or step < last_step) and not watch.asked


def _engine(
    config: Config, run_directory: Path, world: World, categories: Categories, resume: bool
) -> tuple[Engine, Path | None, Position | None]:
    """The model in its engine, with the checkpoint that it goes on from, loaded, or the weights that are configured."""
    checkpoint = world.agree(lambda: find_checkpoint(run_directory), Path) if resume else None
    stored = Checkpoint.read(checkpoint) if checkpoint else None
    model_config = config.model
    if stored or config.train.initial_weights:  # nothing to fetch that is not overwritten
        model_config = model_config.model_copy(update={"pretrained_backbone": False})
    model = build(model_config)
    if stored:
        stored.fill(model)
    elif config.train.initial_weights:
        anew = load_weights(
            model,
            config.train.initial_weights,
            new_class_head=config.train.new_class_head,
            categories=categories,
            tell=log.info if world.rank == 0 else lambda line: None,
        )
        if world.rank == 0:
            started_anew = f"; started anew: {', '.join(anew)}" if anew else ""
            log.info("weights of %s%s", config.train.initial_weights, started_anew)
    engine = Engine(model.train(), config, world)
    return engine, checkpoint, engine.load(stored) if stored else None


def _evaluate(
    checkpoint: Path, config: Config, index: ShardIndex, world: World, watch: Watch, step: int, epoch: int
) -> EvaluationReport | None:
    """COCO numbers of a saved checkpoint; None when some rank is asked to stop meanwhile.

    Each rank takes every world.size-th shard, with a plain copy of the weights.
    """
    started = time.perf_counter()
    watch.at("evaluating", step)
    detector = load_detector(checkpoint, world.device, config=config)

    def one_batch(images: int) -> None:
        watch.at("evaluating", step)

    mine = [
        evaluate_shard(detector, index, shard, world.device, one_batch, watch.stop)
        for shard in range(world.rank, len(index.shards), world.size)
    ]
    if any(world.gather([watch.stop()], bool)):
        if world.rank == 0:
            log.warning("the evaluation of step %d is left for the run that continues this one", step)
        return None
    # A shard at a time: what a rank says at once is limited.
    rounds = range(-(-len(index.shards) // world.size))
    gathered = [world.to_first([_told(result) for result in mine[i : i + 1]], list[_Told]) for i in rounds]

    def scored() -> tuple[dict[str, float], int]:
        found = evaluation(index.ground_truth(), (_heard(told) for told in chain(*chain(*gathered))))
        try:
            record_evaluation(checkpoint, found.metrics)
        except OSError as error:  # the disk is full: the report has the numbers
            log.error("%s: its evaluation is not recorded: %s", checkpoint, error)
        return found.metrics, found.num_not_finite

    metrics, num_not_finite = world.agree(scored, tuple[dict[str, float], int])
    seconds = time.perf_counter() - started
    return EvaluationReport(step, epoch, metrics, index.num_samples, seconds, num_not_finite)


# What rank 0 is told of a shard: its number, its images, its queries that were not finite, and each detection's image,
# category, box and score.
_Told = tuple[int, int, int, list[tuple[int, int, list[float], float]]]


def _told(result: ShardResult) -> _Told:
    rows = [(row["image_id"], row["category_id"], row["bbox"], row["score"]) for row in result.detections]
    return result.shard, result.num_images, result.num_not_finite, rows


def _heard(told: _Told) -> ShardResult:
    shard, num_images, num_not_finite, rows = told
    keys = ("image_id", "category_id", "bbox", "score")
    return ShardResult(shard, [dict(zip(keys, row, strict=True)) for row in rows], num_images, num_not_finite)


def _is_due(every: int, done: int, last: bool = False) -> bool:
    """Whether something happens after `done` epochs when it happens every so many, and at the end; 0 is never."""
    return every > 0 and (last or done % every == 0)


def _diagnosis(
    engine: Engine, micro_batches: list[Batch], losses: list[float], step: int, config: Config, world: World
) -> str:
    """Where numbers of a skipped step stopped being finite, on which ranks and images. Collective.

    The weights are still those of the step, and its random numbers can be drawn again.
    """
    if all(math.isfinite(value) for value in losses):
        return "every loss is finite, a gradient is not" + (" (the loss scale)" if engine.loss_scale != 1 else "")
    mine: list[str] = []
    _seed(config.train.seed, step - 1, world.rank)
    for batch in micro_batches:
        batch = batch.to(world.device)
        module = cast(nn.Module, engine.run.module)
        with torch.compiler.set_stance("force_eager"), torch.no_grad(), first_not_finite(module) as found:
            module(normalised(batch.images, batch.padding_mask, engine.dtype), batch.padding_mask)
        if found:
            mine.append(f"first in {found[0]} on rank {world.rank}, images {batch.image_ids.tolist()}")
    return "; ".join(world.gather(mine, str)) or "the losses are not finite, every module's output is"


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of this step: SplitMix64-like mixing keeps neighbouring steps and ranks apart."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _signals(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Within it, a signal that a scheduler, a launcher or Ctrl-C sends lets the run save and stop, on all ranks."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main one only; as under Ray Tune
        yield
        return
    came: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        came.append(number)
        ask_to_stop()
        if len(came) == 1:  # not by the log: this may have interrupted it in the middle of a line
            os.write(2, f"{signal.Signals(number).name}: saving after this step, then stopping\n".encode())

    # One that is ignored already, such as a hangup under nohup, stays so.
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
