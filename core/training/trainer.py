"""The training loop: batches in, optimizer steps, reports, checkpoints and evaluations out.

The position in the data stream and all random numbers are functions of the step: a resumed run repeats what the
uninterrupted one does.
"""

import logging
import resource
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from ...data.batch import Batch
from ...data.categories import Categories
from ...data.index import SampleError, ShardIndex
from ...data.stream import TrainStream
from ...data.text import visible
from ..checkpoint import find_checkpoint, load_weights
from ..checkpoint.codec import Checkpoint
from ..config import Config
from ..evaluation import result
from ..evaluation.result import Measure
from ..model.detector import build
from ..model.transfer import to_device
from ..progress import Position
from .beside import Beside
from .engine import Engine
from .heartbeat import Watch
from .limits import Limits
from .reports import (
    EvaluationReport,
    FaultReport,
    Observer,
    Pace,
    Progress,
    Report,
    SavingReport,
    StepReport,
    named_losses,
)
from .saving import Saver
from .schedule import End, Schedule, other_plan
from .signals import stop_signals
from .step import Step, diagnosis, train_step
from .validation import evaluate
from .world import World

log = logging.getLogger("ddetr")


def training_stream(config: Config, index: ShardIndex, world: World) -> TrainStream:
    """The data loader of this rank.

    Raises ValueError when train.batch_size is no multiple of world size times train.accumulation, or exceeds the
    number of images while data.remainder=drop.
    """
    return TrainStream(
        index,
        config.data,
        batch_size=config.train.batch_size,
        accumulation=config.train.accumulation,
        rank=world.rank,
        world_size=world.size,
        seed=config.train.seed,
    )


class Trainer:
    """The training loop of one rank, and what it works with. Constructing it is collective.

    observers: each gets every report. evaluator: with eval.ray, the command of the process that evaluates checkpoints
    beside training (core/training/beside.py); without, the ranks do. Raises ValueError or OSError when the model cannot
    be built, or when the checkpoint to resume from or train.initial_weights cannot be loaded.
    """

    def __init__(
        self,
        config: Config,
        *,
        run_directory: Path,
        world: World,
        stream: TrainStream,
        categories: Categories,
        validation_index: ShardIndex | None,
        resume: bool,
        observers: Sequence[Observer],
        evaluator: Sequence[str] = (),
    ) -> None:
        self.config, self.world, self.stream, self.index = config, world, stream, validation_index
        self.run_directory, self.categories = run_directory, categories
        torch.manual_seed(config.train.seed)  # the same initial weights on every rank
        self.engine, self.checkpoint, done = _engine(config, run_directory, world, categories, resume)
        evaluates = validation_index is not None
        beside = config.eval.ray is not None
        self.schedule = Schedule.of(config.train, stream.steps_per_epoch, done, evaluates=evaluates, beside=beside)
        self.step = self.saved_step = done.step if done else 0
        self.progress = Progress(config, self.step, self.schedule, quiet=world.rank > 0)
        self.observers = (*observers, self.progress.observe)
        if done and (other := other_plan(done, self.schedule, stream.order)):
            self.progress.line(other)
        self.limits = Limits(config.train.most_skipped_steps, config.data.most_bad_samples * stream.num_samples)
        self.pace = Pace()
        self.measure = Measure.of(config, validation_index) if validation_index else None
        self.beside: Beside | None = None
        if beside and self.measure and world.rank == 0:
            self.beside = Beside(
                evaluator, config, run_directory, self.schedule, self.measure, self.observe, self._is_asked
            )
            self.observers += (self.beside.observe,)
        keep = config.train.keep_checkpoints
        self.saver = Saver(run_directory, keep, self.measure, world, self.observe, self._held)
        self.watch = Watch(world, config.train, self._lost, self.saver.wait)

    def train(self) -> End:
        """Train up to train.epochs or train.max_steps, or until one of STOP_SIGNALS arrives; returns why it ended.

        A signal also ends an evaluation and the wait for a batch. A step whose loss or gradient is not finite on some
        rank is skipped on all. Raises FloatingPointError after train.most_skipped_steps of them in a row, and
        SampleError for more damaged images than data.most_bad_samples allows; the state is saved before. A state that
        is not finite is not saved, and raises FloatingPointError. Raises OSError when the last checkpoint cannot be
        written.
        """
        with closing(self.stream), self.watch, closing(self.saver), stop_signals(self.watch.ask_to_stop):
            evaluated = self._evaluates_what_was_left()
            for number, micro_batches, began in self._batches():
                report = self._step(number, micro_batches, began)
                if report is None:
                    return self._stopped()
                self.observe(report)
                self.saver.look()
                self._check(report)
                due = self.schedule.due(self.step)
                if due.save:
                    saved = self._save(wait=due.evaluate or due.last, needed=due.last)
                    if due.evaluate:
                        evaluated = self._evaluate(saved)
            return End.FINISHED if evaluated else self._asked()

    def observe(self, report: Report) -> None:
        for observer in self.observers:
            observer(report)

    def _batches(self) -> Iterator[tuple[int, list[Batch], float]]:
        """Number, micro-batches and begin of every step that is left; without micro-batches once asked to stop."""
        while self.step < self.schedule.last_step:
            epoch, first = self.schedule.epoch(self.step), self.schedule.step_in_epoch(self.step)
            batches = self.stream.steps(epoch, first, self.watch.stop)
            for number in range(self.step + 1, self.schedule.end_of_epoch(self.step) + 1):
                began = time.perf_counter()
                self.watch.at("waiting for its batch", number)
                yield number, next(batches, []), began

    def _step(self, number: int, micro_batches: list[Batch], began: float) -> StepReport | None:
        """Take a step and return its report; None when some rank was asked to stop."""
        waited = time.perf_counter() - began
        self.watch.at("training", number, [i for batch in micro_batches for i in batch.image_ids.tolist()])
        rate = self.schedule.learning_rate(self.config.optim, number - 1)
        self.engine.set_learning_rate(rate)
        done = train_step(self.engine, micro_batches, number, self.config, self.world, self.watch.stop())
        if done is None:
            return None
        bad = [visible(message) for batch in micro_batches for message in batch.bad_samples]
        losses, errors, images, ranks_seconds, num_bad = _of_all_ranks(
            done, waited + done.compute_seconds, len(bad), self.world
        )
        seconds, found = time.perf_counter() - began, None
        if not done.taken:
            found = diagnosis(self.engine, micro_batches, losses, number, self.config, self.world)
        self.step = number
        return StepReport(
            step=number,
            epoch=self.schedule.epoch(number - 1),
            parts=done.parts,
            losses=named_losses(losses, done.parts, done.layers),
            learning_rate=rate,
            gradient_norm=self.engine.gradient_norm,
            images=images,
            step_seconds=seconds,
            data_wait_seconds=waited,
            own_seconds=ranks_seconds[self.world.rank],
            skipped=not done.taken,
            memory_bytes=_peak_memory_bytes(self.world.device),
            loss_scale=self.engine.loss_scale,
            class_error=errors[0],
            cardinality_error=errors[1],
            not_finite=found,
            bad_samples=tuple(self.world.gather(bad, str)) if num_bad else (),
            slow_ranks=tuple(f"{self.watch.name(rank)} {text}" for rank, text in self.pace.slow(ranks_seconds)),
        )

    def _check(self, report: StepReport) -> None:
        """Save the state and raise when too many steps in a row are skipped or too many images are damaged."""
        self.limits = self.limits.after(report.skipped, report.bad_samples)
        if self.limits.has_skipped_too_many:
            self._save(wait=True)
            raise FloatingPointError(
                f"skipped {self.limits.skipped} steps in a row, the last one step {report.step}: {report.not_finite}. "
                f"The weights from before them are saved. Lower optim.learning_rate, set optim.clip_norm, or "
                f"use train.precision=fp32"
            )
        if self.limits.has_too_many_bad:
            self._save(wait=True)
            raise SampleError(
                f"{len(self.limits.bad)} of {self.stream.num_samples} images are damaged, more than "
                f"data.most_bad_samples={self.config.data.most_bad_samples:g}; the last one: {report.bad_samples[-1]}"
            )

    def _save(self, *, wait: bool, needed: bool = True) -> Path | None:
        """Save the state, unless that is done; with `wait`, until it is complete, and return the checkpoint's path.

        Raises OSError when the checkpoint is waited for, `needed` and not written. If it is not needed the error is
        only reported and None returned: by the last step there may be room on the disk.
        """
        self.watch.at("saving", self.step)
        if self.step > self.saved_step:
            self.observe(SavingReport(self.step))
            position = self.schedule.position(self.step, self.stream.order)
            self.saver.begin(lambda: self.engine.snapshot(self.run_directory, position, self.categories), self.step)
            self.saved_step = self.step
        try:
            return self.saver.written() if wait else None
        except OSError:  # reported
            if needed:
                raise
            return None

    def _evaluate(self, saved: Path | None) -> bool:
        """Evaluate the checkpoint `saved`, if there is one; False when a stop leaves that to the resumed run."""
        assert self.index is not None
        if saved is None:
            self.progress.line(f"step {self.step} is not evaluated either")
            return True
        found = evaluate(saved, self.config, self.index, self.world, self.watch, self.step)
        if found is not None:
            self.observe(EvaluationReport(self.step, self.schedule.epoch(self.step - 1), *found))
        return found is not None

    def _evaluates_what_was_left(self) -> bool:
        """Evaluate the checkpoint that the run resumes from, if that was due and not done; returns as `_evaluate`."""
        checkpoint, measure = self.checkpoint, self.measure
        if checkpoint is None or measure is None or not self.schedule.due(self.step).evaluate:
            return True
        if self.world.agree(lambda: result.is_evaluated(checkpoint, measure), bool):
            return True
        return self._evaluate(checkpoint)

    def _stopped(self) -> End:
        self._save(wait=True)
        how = f"to continue: the same launcher with --resume {self.run_directory}"
        self.progress.line(f"stopped after step {self.step} as asked; {how}")
        return self._asked()

    def _asked(self) -> End:
        return End.ASKED if self.watch.asked else End.OTHERS

    def _is_asked(self) -> bool:
        return self.watch.stop()

    def _held(self) -> Collection[Path]:
        return self.beside.held if self.beside else ()

    def _lost(self, message: str) -> None:
        self.observe(FaultReport(self.step, message))


def _engine(
    config: Config, run_directory: Path, world: World, categories: Categories, resume: bool
) -> tuple[Engine, Path | None, Position | None]:
    """Build the engine, with the checkpoint to resume from or train.initial_weights loaded.

    Returns it with that checkpoint's path and position; None without a resume.
    """
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


def _of_all_ranks(
    done: Step, own_seconds: float, num_bad: int, world: World
) -> tuple[list[float], list[float], int, list[float], int]:
    """Means of losses and errors over ranks, images of all ranks, seconds of each rank, bad samples of all ranks.

    Collective: one all-reduce.
    """
    means = torch.cat([done.losses.flatten(), done.errors, done.num_images[None]])
    seconds = torch.zeros(world.size).index_fill_(0, torch.tensor(world.rank), own_seconds)
    counts = torch.cat([seconds, torch.tensor([float(num_bad)])])
    sums = world.sum(torch.cat([means, to_device(counts, world.device)])).tolist()
    *losses, class_error, cardinality_error, num_images = (value / world.size for value in sums[: len(means)])
    *ranks_seconds, bad = sums[len(means) :]
    return losses, [class_error, cardinality_error], round(num_images), ranks_seconds, round(bad)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
