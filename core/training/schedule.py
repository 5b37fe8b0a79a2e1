"""The schedule of a run: epochs, learning-rate schedule, when to save and evaluate, where a resume continues.

Pure arithmetic. A step is an optimizer step, counted over the whole run. Progress is kept in epochs, because a resume
may find another number of steps per epoch: another batch size, or shards that were packed again.
"""

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from ..config import Config, OptimConfig, TrainConfig
from ..progress import Position

LINEAR_SHARE = 0.4  # of the run, at its end, in which the linear learning-rate schedule falls to zero


class End(Enum):
    """Why a run ended."""

    FINISHED = "finished"  # its last step is taken, and evaluated if that was due
    ASKED = "asked to stop"  # by a signal to this rank
    OTHERS = "others were asked to stop"  # but not this rank


class Due(NamedTuple):
    """What is due after a step. An evaluation reads a checkpoint, so it implies `save`.

    evaluate: by the ranks, before the next step. hand_over: beside training.
    """

    save: bool
    evaluate: bool
    last: bool
    hand_over: bool = False


@dataclass(frozen=True)
class Every:
    """How often checkpoints are saved and evaluated; 0 is never."""

    save_epochs: int = 0
    save_steps: int = 0  # within an epoch
    evaluate_epochs: int = 0
    beside: bool = False  # evaluations go on beside training


@dataclass(frozen=True)
class Schedule:
    """The steps of a run of `epochs` epochs, or `max_steps` steps if those are fewer.

    shift: steps done minus the steps that the same number of epochs takes at `per_epoch` steps an epoch; 0 unless a
    resume changed the steps per epoch.
    """

    per_epoch: int
    epochs: int
    max_steps: int | None = None
    shift: int = 0
    every: Every = Every()

    @classmethod
    def of(
        cls,
        train: TrainConfig,
        per_epoch: int,
        done: Position | None = None,
        *,
        evaluates: bool = True,
        beside: bool = False,
    ) -> "Schedule":
        """The schedule of a new run, or of one that resumes at `done`, at the same fraction of its epoch.

        evaluates: whether there is a validation set. beside: whether evaluations go on beside training.
        """
        every = Every(
            train.checkpoint_every_epochs,
            train.checkpoint_every_steps or 0,
            train.evaluate_every_epochs if evaluates else 0,
            beside,
        )
        shift = 0
        if done is not None:
            step_in_epoch = done.step_in_epoch * per_epoch // (done.steps_per_epoch or per_epoch)
            shift = done.step - (done.epochs * per_epoch + step_in_epoch)
        return cls(per_epoch, train.epochs, train.max_steps, shift, every)

    @property
    def last_step(self) -> int:
        """The step that ends the run."""
        last = self.epochs * self.per_epoch + self.shift
        return last if self.max_steps is None else min(last, self.max_steps)

    @property
    def num_epochs(self) -> int:
        """Epochs of the run, a last partial one included."""
        return -(-(self.last_step - self.shift) // self.per_epoch)

    def epoch(self, step: int) -> int:
        """The epoch, from 0, of step number `step + 1`."""
        return (step - self.shift) // self.per_epoch

    def step_in_epoch(self, step: int) -> int:
        """Number of steps done in the current epoch after `step` steps; 0 at the end of an epoch."""
        return (step - self.shift) % self.per_epoch

    def end_of_epoch(self, step: int) -> int:
        """The last step of the epoch of step number `step + 1`, at most `last_step`."""
        return min((self.epoch(step) + 1) * self.per_epoch + self.shift, self.last_step)

    def due(self, step: int) -> Due:
        """What is due after `step`.

        Saves and evaluations of every few epochs are due at the end of an epoch, saves of every few steps within it.
        After the last step a save is due, and an evaluation if the run evaluates.
        """
        epochs, last = self.epoch(step), step >= self.last_step
        whole = self.step_in_epoch(step) == 0

        def is_due(every: int) -> bool:
            return every > 0 and whole and epochs % every == 0

        evaluate = is_due(self.every.evaluate_epochs) or (last and self.every.evaluate_epochs > 0)
        within = self.every.save_steps > 0 and not whole and step % self.every.save_steps == 0
        save, beside = evaluate or last or within or is_due(self.every.save_epochs), self.every.beside
        return Due(save, evaluate and not beside, last, evaluate and beside)

    def position(self, step: int, order: str) -> Position:
        """The progress after `step` steps; order: the fingerprint of the order of the images."""
        return Position(step, self.epoch(step), self.step_in_epoch(step), self.per_epoch, order)

    def learning_rate(self, config: OptimConfig, step: int) -> float:
        """The base group's learning rate at step number `step + 1`.

        Linear warm-up over optim.warmup_steps. Of the two schedules, "step" multiplies by 0.1 at each of
        optim.drop_epochs (section 5), "linear" falls to zero over the last LINEAR_SHARE of the run.
        """
        warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "linear":
            falls = LINEAR_SHARE * (self.last_step - self.shift)
            return config.learning_rate * warm * min(1.0, (self.last_step - step) / falls)
        drops = sum(self.epoch(step) >= epoch for epoch in config.drop_epochs)
        return config.learning_rate * warm * 0.1**drops


def other_plan(done: Position, schedule: Schedule, order: str) -> str | None:
    """The message for a resume with other steps per epoch, or amid an epoch whose order of images changed."""
    in_epoch = schedule.step_in_epoch(done.step)
    again = ": some of its images come twice in it, others not" if done.step_in_epoch else ""
    if done.steps_per_epoch not in (0, schedule.per_epoch):
        return (
            f"an epoch has {schedule.per_epoch} steps now, and had {done.steps_per_epoch} until step {done.step}: "
            f"{done.epochs} epoch(s) and {done.step_in_epoch} of {done.steps_per_epoch} steps are done, so it goes on "
            f"at step {in_epoch} of {schedule.per_epoch} of epoch {done.epochs + 1}{again}"
        )
    if done.step_in_epoch and done.order and done.order != order:
        return (
            f"epoch {done.epochs + 1} has another order of images now, because its shards, train.seed or settings of "
            f"data changed; it goes on at step {in_epoch} of {schedule.per_epoch}{again}"
        )
    return None


def nothing_left(done: Position, schedule: Schedule) -> str | None:
    """The message for a resume of a run that has taken its last step already, with the setting that continues it."""
    if done.step < schedule.last_step:
        return None
    by_steps = schedule.max_steps is not None and done.step >= schedule.max_steps
    limit = f"train.max_steps={schedule.max_steps}" if by_steps else f"train.epochs={schedule.epochs}"
    return (
        f"nothing is left to do: {done.epochs} epoch(s), {done.step} steps are done, and {limit} asks for no more; "
        f"to go on, set a larger {limit.partition('=')[0]}"
    )


def planned(schedule: Schedule, num_images: int, config: Config, done: Position | None) -> str:
    """The epochs and steps of a run in one line."""
    left = num_images - schedule.per_epoch * config.train.batch_size
    parts = [
        f"{num_images} images: {schedule.per_epoch} steps of {config.train.batch_size} images per epoch",
        f"{schedule.num_epochs} epochs, {schedule.last_step} steps in all",
    ]
    if left > 0:
        parts.append(f"each epoch leaves out {left} images, as many as fill no batch (data.remainder=drop)")
    if schedule.max_steps is not None and schedule.last_step == schedule.max_steps:
        parts.append(f"train.max_steps={schedule.max_steps} ends it")
    if done is not None:
        parts.append(f"{done.step} steps are done")
    return "; ".join(parts)
