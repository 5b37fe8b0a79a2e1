"""The training loop: batches in, optimizer steps, reports, checkpoints and evaluations out.

Every random number of step s on rank r follows from (seed, s, r), and the stream's position from s: a checkpoint
needs no generator state, and a resumed run repeats what the uninterrupted one does.
"""

import json
import logging
import math
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from ..data.batch import Batch, normalised
from ..data.categories import Categories
from ..data.index import ShardIndex
from ..data.stream import TrainStream
from .checkpoint import find_checkpoint, load_detector, load_weights
from .config import Config
from .criterion import PARTS, Losses, criterion
from .detector import build
from .engine import Engine, World
from .evaluator import coco_metrics, evaluate_shard, merge
from .optimizer import learning_rate

log = logging.getLogger("ddetr")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. The same on every rank, but for the times and the memory, which are the rank's own."""

    step: int  # counted from 1
    epoch: int  # counted from 0
    losses: dict[str, float]  # weighted: "total", "class", "l1", "giou", and "class_0" .. "giou_proposals" per layer
    learning_rate: float  # of the base group
    gradient_norm: float  # before clipping
    images: int  # over all ranks
    step_seconds: float  # the whole step, waiting for data included
    data_wait_seconds: float
    skipped: bool  # DeepSpeed found a gradient that is not finite and left the weights alone
    memory_bytes: int  # largest so far: allocated on the GPU, or resident on a CPU
    loss_scale: float


@dataclass(frozen=True)
class EvaluationReport:
    """The evaluation of one checkpoint on all validation images."""

    step: int
    epoch: int
    metrics: dict[str, float]  # COCO's twelve numbers
    images: int
    seconds: float


@dataclass(frozen=True)
class CheckpointReport:
    step: int
    epoch: int
    path: str
    seconds: float


Report = StepReport | EvaluationReport | CheckpointReport
Observe = Callable[[Report], None]


def train_step(engine: Engine, micro_batches: list[Batch], config: Config, world: World) -> Losses:
    """One optimizer step: forward, losses and backward for each micro-batch, then AdamW.

    Returns the weighted losses of this rank's share, summed over the micro-batches. Their mean over the ranks is the
    loss of the global batch, because all divide by the same number of objects.
    """
    objects = sum(int(batch.num_boxes.sum()) for batch in micro_batches)
    normaliser = max(world.sum(torch.tensor(float(objects))).item(), 1.0) / (world.size * len(micro_batches))
    values, layers = [], ()
    for batch in micro_batches:
        batch = batch.to(world.device)
        images = normalised(batch.images, batch.padding_mask, engine.dtype)
        predictions = engine.run(images, batch.padding_mask)
        losses = criterion(predictions, batch, config.optim, normaliser)
        weighted = losses.weighted(config.optim)
        engine.run.backward(weighted.sum())  # divided by the number of micro-batches in there
        engine.run.step()  # takes effect after the last micro-batch
        values.append(weighted.detach())
        layers = losses.layers
    return Losses(torch.stack(values).mean(0), layers)


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

    Raises FloatingPointError, before another checkpoint is written, when the loss is not finite.
    """
    per_epoch = stream.steps_per_epoch
    last_step = config.train.epochs * per_epoch
    last_step = min(last_step, config.train.max_steps or last_step)
    torch.manual_seed(config.train.seed)  # the same initial weights on every rank
    checkpoint = find_checkpoint(run_directory) if resume else None
    model_config = config.model.model_copy(update={"pretrained_backbone": False}) if checkpoint else config.model
    model = build(model_config)
    if checkpoint:
        load_weights(model, checkpoint)
    engine = Engine(model.train(), config, world)
    step = engine.load(checkpoint)["step"] if checkpoint else 0
    progress = _Progress(config, step, last_step, per_epoch, quiet=world.rank > 0)
    metrics = None

    def save() -> None:
        started = time.perf_counter()
        position = {"step": step, "epoch": step // per_epoch, "step_in_epoch": step % per_epoch}
        path = engine.save(run_directory, position, categories)
        seconds = time.perf_counter() - started
        progress.line(f"saved {path} in {seconds:.1f} s")
        observe(CheckpointReport(step, position["epoch"], str(path), seconds))

    with _stop_requested() as stop_requested:
        while step < last_step:
            epoch = step // per_epoch
            clock = time.perf_counter()
            for micro_batches in stream.steps(epoch, step % per_epoch):
                waited = time.perf_counter() - clock
                rate = learning_rate(config.optim, step, per_epoch, last_step)
                engine.set_learning_rate(rate)
                _seed(config.train.seed, step, world.rank)
                skipped_before = engine.run.skipped_steps
                losses = train_step(engine, micro_batches, config, world)
                step += 1
                shared = world.sum(torch.cat([losses.values.flatten(), losses.values.new_tensor([stop_requested()])]))
                *values, stops = shared.tolist()
                report = StepReport(
                    step=step,
                    epoch=epoch,
                    losses=_named([value / world.size for value in values], losses.layers),
                    learning_rate=rate,
                    gradient_norm=engine.gradient_norm,
                    images=config.train.batch_size,
                    step_seconds=time.perf_counter() - clock,
                    data_wait_seconds=waited,
                    skipped=engine.run.skipped_steps > skipped_before,
                    memory_bytes=_peak_memory_bytes(world.device),
                    loss_scale=engine.loss_scale,
                )
                clock = time.perf_counter()
                _check_finite(report, config, micro_batches)
                observe(report)
                progress.step(report)
                if stops or step >= last_step:
                    break
                every = config.train.checkpoint_every_steps
                if every and step % every == 0 and step % per_epoch:
                    save()
                    clock = time.perf_counter()
            done, last = step // per_epoch, bool(stops) or step >= last_step
            evaluates = (
                validation_index is not None and not stops and _is_due(config.train.evaluate_every_epochs, done, last)
            )
            if last or evaluates or _is_due(config.train.checkpoint_every_epochs, done):
                save()
            if stops:
                progress.line(f"stopped after step {step} as asked; continue with --resume {run_directory}")
                break
            if validation_index is not None and evaluates:
                report = _evaluate(run_directory, validation_index, world, step, epoch, config)
                progress.evaluation(report)
                observe(report)
                metrics = report.metrics
    stream.close()
    return metrics


def _evaluate(
    run_directory: Path, index: ShardIndex, world: World, step: int, epoch: int, config: Config
) -> EvaluationReport:
    """COCO numbers of the checkpoint just saved. Each rank takes every world.size-th shard, with a plain copy of it."""
    started = time.perf_counter()
    detector = load_detector(run_directory, world.device)
    mine = [
        evaluate_shard(detector, index, shard, world.device)
        for shard in range(world.rank, len(index.shards), world.size)
    ]
    gathered: list = [None] * world.size
    dist.all_gather_object(gathered, mine)
    metrics: list = [None]
    if world.rank == 0:
        found = merge(result for results in gathered for result in results)
        metrics = [coco_metrics(index.ground_truth(), found)]
    dist.broadcast_object_list(metrics, src=0)
    return EvaluationReport(step, epoch, metrics[0], index.num_samples, time.perf_counter() - started)


def _is_due(every: int, done: int, last: bool = False) -> bool:
    """Whether something happens after `done` epochs when it happens every so many, and at the end; 0 is never."""
    return every > 0 and (last or done % every == 0)


def _named(values: list[float], layers: tuple[str, ...]) -> dict[str, float]:
    """The flattened (3, layers) table as a dictionary with the sums first."""
    rows = {part: values[row * len(layers) : (row + 1) * len(layers)] for row, part in enumerate(PARTS)}
    named = {"total": sum(values)} | {part: sum(row) for part, row in rows.items()}
    for part, row in rows.items():
        named |= {f"{part}_{layer}": value for layer, value in zip(layers, row, strict=True)}
    return named


def _check_finite(report: StepReport, config: Config, micro_batches: list[Batch]) -> None:
    if math.isfinite(report.losses["total"]):
        return
    images = [image_id for batch in micro_batches for image_id in batch.image_ids.tolist()]
    raise FloatingPointError(
        f"the loss of step {report.step} is {report.losses['total']} (this rank's images: {images}); the last "
        f"checkpoint is from before. Lower optim.learning_rate, set optim.clip_norm, or use train.precision=fp32"
    )


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


class _Progress:
    """One readable line every few steps, with the rate since the last line and the time left."""

    def __init__(self, config: Config, step: int, last_step: int, per_epoch: int, quiet: bool) -> None:
        self.quiet = quiet
        self.config, self.last_step, self.per_epoch = config, last_step, per_epoch
        self._since = (time.perf_counter(), step)
        self._wait = 0.0

    def line(self, text: str) -> None:
        if not self.quiet:
            log.info(text)

    def step(self, report: StepReport) -> None:
        self._wait += report.data_wait_seconds
        if report.step % self.config.train.log_every_steps and report.step != self.last_step:
            return
        now, (then, step) = time.perf_counter(), self._since
        per_step = (now - then) / max(1, report.step - step)
        losses = " ".join(f"{name} {report.losses[name]:.3f}" for name in PARTS)
        self.line(
            f"epoch {report.epoch + 1}/{math.ceil(self.last_step / self.per_epoch)} "
            f"step {report.step}/{self.last_step} loss {report.losses['total']:.3f} ({losses}) "
            f"gradient {report.gradient_norm:.2f} rate {report.learning_rate:.1e} "
            f"{report.images / per_step:.1f} images/s, {100 * self._wait / max(now - then, 1e-9):.0f} % data wait, "
            f"{report.memory_bytes / 2**30:.1f} GiB, {_clock(per_step * (self.last_step - report.step))} left"
            + (", step skipped: the gradient is not finite" if report.skipped else "")
        )
        self._since, self._wait = (now, report.step), 0.0

    def evaluation(self, report: EvaluationReport) -> None:
        shown = ", ".join(f"{name} {report.metrics[name]:.3f}" for name in ("AP", "AP50", "AP75", "AP_small"))
        self.line(f"evaluated step {report.step} on {report.images} images in {report.seconds:.1f} s: {shown}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def as_json(report: Report) -> str:
    """One line of metrics.jsonl."""
    kind = {StepReport: "step", EvaluationReport: "evaluation", CheckpointReport: "checkpoint"}[type(report)]
    return json.dumps({"kind": kind, "time": time.time(), **asdict(report)})
