"""The training loop: batches in, optimizer steps, reports, checkpoints and evaluations out.

Every random number of step s on rank r follows from (seed, s, r), and the stream's position from s: a checkpoint
needs no generator state, and a resumed run repeats what the uninterrupted one does.
"""

import logging
import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..data.batch import Batch, normalised
from ..data.categories import Categories
from ..data.index import SampleError, ShardIndex
from ..data.stream import TrainStream
from .checkpoint import checkpoints, find_checkpoint, load_detector, load_parameters, load_weights
from .config import Config
from .criterion import criterion
from .detector import build
from .engine import Engine, World
from .evaluator import coco_metrics, evaluate_shard, merge
from .guard import finite_or_poison, first_not_finite
from .manifest import prune, record_evaluation
from .optimizer import learning_rate
from .reports import CheckpointReport, EvaluationReport, Observe, Progress, StepReport, named_losses

log = logging.getLogger("ddetr")


@dataclass(frozen=True)
class Step:
    """What one optimizer step did on this rank."""

    weighted: Tensor  # (3, layers) weighted losses of the rank's share; their mean over ranks is the global batch's
    errors: Tensor  # (2,) the last layer's class error in percent, and cardinality error in objects per image
    num_images: Tensor  # () how many images of all ranks carried a loss
    layers: tuple[str, ...]
    taken: bool  # not when a gradient of some rank was not finite


def train_step(engine: Engine, micro_batches: list[Batch], number: int, config: Config, world: World) -> Step:
    """Optimizer step `number`, from 1: forward, losses and backward for each micro-batch, then AdamW.

    All ranks divide by the same number of objects. Forward and losses make the host wait for the device once a
    micro-batch, for the matching; DeepSpeed's step does so too, for the norm of the gradients.
    """
    counts = torch.cat([batch.num_boxes for batch in micro_batches])
    real = torch.cat([batch.is_real for batch in micro_batches])
    totals = [counts.sum(), counts.clamp(max=config.model.queries).sum(), real.sum()]
    objects, matched, images = world.sum(torch.stack(totals).float())
    parts = world.size * len(micro_batches)
    all_losses, taken = [], True
    for batch in micro_batches:
        batch = batch.to(world.device)
        pixels = normalised(batch.images, batch.padding_mask, engine.dtype)
        predictions = engine.run(pixels, batch.padding_mask)
        losses = criterion(predictions, batch, config.optim, objects, parts, matched, images)
        engine.run.backward(finite_or_poison(losses.weighted(config.optim).sum()))  # divided by their number in there
        taken &= engine.step(number)  # takes effect after the last micro-batch
        all_losses.append(losses)
    weighted = torch.stack([losses.weighted(config.optim).detach() for losses in all_losses]).mean(0)
    last = len(predictions.aux)
    errors = [torch.stack([losses.class_error, losses.cardinality_error[last]]) for losses in all_losses]
    return Step(weighted, torch.stack(errors).mean(0), images, losses.layers, taken)


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
) -> dict[str, float] | None:
    """Train until config.train.epochs or max_steps, or until SIGTERM or SIGINT; returns the last evaluation's metrics.

    A step whose loss or gradient is not finite on some rank is skipped on all. Raises FloatingPointError after
    train.most_skipped_steps of them in a row, when the state from before them is saved; ValueError or
    FileNotFoundError when train.initial_weights cannot be loaded.
    """
    per_epoch = stream.steps_per_epoch
    last_step = config.train.epochs * per_epoch
    last_step = min(last_step, config.train.max_steps or last_step)
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    checkpoint = world.agree(lambda: find_checkpoint(run_directory)) if resume else None
    model_config = config.model
    if checkpoint or config.train.initial_weights:  # nothing to fetch that is not overwritten
        model_config = model_config.model_copy(update={"pretrained_backbone": False})
    model = build(model_config)
    if checkpoint:
        load_weights(model, checkpoint)
        model.load_state_dict(load_parameters(checkpoint, "weights"), strict=False)
    elif config.train.initial_weights:
        anew = load_weights(model, config.train.initial_weights, new_class_head=config.train.new_class_head)
        if world.rank == 0:
            started_anew = f"; started anew: {', '.join(anew)}" if anew else ""
            log.info("weights of %s%s", config.train.initial_weights, started_anew)
    engine = Engine(model.train(), config, world)
    step = engine.load(checkpoint)["step"] if checkpoint else 0
    skipped_in_a_row = 0
    known_bad: set[str] = set()
    progress = Progress(config, step, last_step, per_epoch, quiet=world.rank > 0)
    metrics = None

    def tidy() -> None:
        for old in world.agree(lambda: prune(checkpoints(run_directory), config.train.keep_checkpoints)):
            progress.line(f"deleted {old}")

    def save(last: bool = False, evaluates: bool = False) -> Path | None:
        """None when it cannot be written, which ends a run only at its last step: room may be made until then."""
        started = time.perf_counter()
        position = {"step": step, "epoch": step // per_epoch, "step_in_epoch": step % per_epoch}
        tidy()
        try:
            path = engine.save(run_directory, position, categories)
        except OSError as error:
            if last:
                raise
            reason = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            if world.rank == 0:
                log.error("step %d is not saved%s: %s", step, ", nor evaluated" if evaluates else "", reason)
            observe(CheckpointReport(step, position["epoch"], "", time.perf_counter() - started, reason))
            return None
        tidy()
        seconds = time.perf_counter() - started
        progress.line(f"saved {path} in {seconds:.1f} s")
        observe(CheckpointReport(step, position["epoch"], str(path), seconds))
        return path

    with _stop_requested() as stop_requested:
        while step < last_step:
            epoch = step // per_epoch
            clock = time.perf_counter()
            for micro_batches in stream.steps(epoch, step % per_epoch):
                waited = time.perf_counter() - clock
                rate = learning_rate(config.optim, step, per_epoch, last_step)
                engine.set_learning_rate(rate)
                _seed(config.train.seed, step, world.rank)
                done = train_step(engine, micro_batches, step + 1, config, world)
                step += 1
                bad = [message for batch in micro_batches for message in batch.bad_samples]
                means = torch.cat([done.weighted.flatten(), done.errors, done.num_images[None]])
                counts = done.errors.new_tensor([stop_requested(), len(bad)])
                *sums, stops, num_bad = world.sum(torch.cat([means, counts])).tolist()
                *losses, class_error, cardinality_error, num_images = (value / world.size for value in sums)
                bad = world.gather(bad) if num_bad else []
                report = StepReport(
                    step=step,
                    epoch=epoch,
                    losses=named_losses(losses, done.layers),
                    learning_rate=rate,
                    gradient_norm=engine.gradient_norm,
                    images=round(num_images),
                    step_seconds=time.perf_counter() - clock,
                    data_wait_seconds=waited,
                    skipped=not done.taken,
                    memory_bytes=_peak_memory_bytes(world.device),
                    loss_scale=engine.loss_scale,
                    class_error=class_error,
                    cardinality_error=cardinality_error,
                    not_finite=None if done.taken else _diagnosis(engine, micro_batches, losses, step, config, world),
                    bad_samples=tuple(bad),
                )
                clock = time.perf_counter()
                observe(report)
                progress.step(report)
                skipped_in_a_row = skipped_in_a_row + 1 if report.skipped else 0
                if skipped_in_a_row == config.train.most_skipped_steps:
                    save(last=True)
                    raise FloatingPointError(
                        f"skipped {skipped_in_a_row} steps in a row, the last one step {step}: {report.not_finite}. "
                        f"The weights from before them are saved. Lower optim.learning_rate, set optim.clip_norm, or "
                        f"use train.precision=fp32"
                    )
                known_bad.update(bad)
                if len(known_bad) > config.data.most_bad_samples * stream.num_samples:
                    save(last=True)
                    raise SampleError(
                        f"{len(known_bad)} of {stream.num_samples} images are damaged, more than "
                        f"data.most_bad_samples={config.data.most_bad_samples:g}; the last one: {bad[-1]}"
                    )
                if stops or step >= last_step:
                    break
                every = config.train.checkpoint_every_steps
                if every and step % every == 0 and step % per_epoch:
                    save()
                    clock = time.perf_counter()
            epochs_done, last = step // per_epoch, bool(stops) or step >= last_step
            due = None
            if not stops and _is_due(config.train.evaluate_every_epochs, epochs_done, last):
                due = validation_index
            saved = None
            if last or due is not None or _is_due(config.train.checkpoint_every_epochs, epochs_done):
                saved = save(last, evaluates=due is not None)
            if stops:
                progress.line(f"stopped after step {step} as asked; continue with --resume {run_directory}")
                break
            if due is not None and saved is not None:
                report = _evaluate(saved, due, world, step, epoch, config)
                progress.evaluation(report)
                observe(report)
                metrics = report.metrics
    stream.close()
    return metrics


def _evaluate(
    checkpoint: Path, index: ShardIndex, world: World, step: int, epoch: int, config: Config
) -> EvaluationReport:
    """COCO numbers of the checkpoint just saved. Each rank takes every world.size-th shard, with a plain copy of it."""
    started = time.perf_counter()
    detector = load_detector(checkpoint, world.device)
    mine = [
        evaluate_shard(detector, index, shard, world.device)
        for shard in range(world.rank, len(index.shards), world.size)
    ]
    gathered = world.gather(mine)
    metrics: list = [None]
    if world.rank == 0:
        found = merge(gathered)
        metrics = [coco_metrics(index.ground_truth(), found)]
        try:
            record_evaluation(checkpoint, metrics[0])
        except OSError as error:  # the disk is full: the report has the numbers
            log.error("%s: its evaluation is not recorded: %s", checkpoint, error)
    dist.broadcast_object_list(metrics, src=0)
    return EvaluationReport(step, epoch, metrics[0], index.num_samples, time.perf_counter() - started)


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
    return "; ".join(world.gather(mine)) or "the losses are not finite, every module's output is"


def _seed(seed: int, step: int, rank: int) -> None:
    """Dropout of this step: SplitMix64-like mixing keeps neighbouring steps and ranks apart."""
    torch.manual_seed((seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) % 2**63)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _stop_requested() -> Iterator[Callable[[], bool]]:
    """Whether SIGTERM or SIGINT came: the loop saves after the current step and stops, on all ranks together."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # signals reach the main one only; as under Ray Tune
        yield lambda: False
        return

    def remember(number: int, frame: FrameType | None) -> None:
        if not came:
            log.warning("%s: saving after this step, then stopping", signal.Signals(number).name)
        came.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
