"""Reports of a run to its observers: steps, checkpoints, evaluations, start, end; and progress lines in the log."""

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...data.text import visible
from ..config import Config
from ..evaluation.result import Result, without_score
from ..evaluation.scores import in_brief
from .schedule import Schedule

log = logging.getLogger("ddetr")


@dataclass(frozen=True)
class StepReport:
    """One optimizer step. The same on every rank, except times and memory, which are the rank's own."""

    step: int  # counted from 1
    epoch: int  # counted from 0
    parts: tuple[str, ...]  # of the loss: "class", "l1", "giou"
    losses: dict[str, float]  # weighted: "total", each part, and "class_0" .. "giou_proposals" of each part and layer
    learning_rate: float  # of the base group
    gradient_norm: float  # before clipping
    images: int  # over all ranks, that carried a loss
    step_seconds: float  # the whole step, waiting for data included
    data_wait_seconds: float
    own_seconds: float  # of this rank in the step: waiting for its batch, forward passes and losses
    skipped: bool  # a loss or a gradient was not finite: no rank changed its weights
    memory_bytes: int  # largest so far: allocated on the GPU, or resident on a CPU
    loss_scale: float
    class_error: float  # percent of the last layer's matched queries whose best class is wrong
    cardinality_error: float  # of the last layer: queries with an object, as DETR counts them, less objects; per image
    not_finite: str | None  # of a skipped step: what was not finite first, on which ranks and images
    bad_samples: tuple[str, ...]  # left out by any rank: shard, key, and what is wrong
    slow_ranks: tuple[str, ...]  # that have become slow: which, on which host, and their seconds


@dataclass(frozen=True)
class EvaluationReport:
    """The evaluation of one checkpoint on all validation images."""

    step: int
    epoch: int  # counted from 0, of that step
    result: Result
    bad_samples: Sequence[str] = ()  # damaged images, which are left out: shard, key, and what is wrong


@dataclass(frozen=True)
class MissedReport:
    """An evaluation beside training gave no result. Only rank 0 reports it.

    kind: "failed", "unreachable" (the cluster), or "left_out" without a try. again: whether it is tried again.
    repeats: the attempt before it was of the same checkpoint and ended in the same way.
    """

    step: int
    kind: str
    reason: str
    again: bool
    repeats: bool = False


@dataclass(frozen=True)
class WaitingReport:
    """So many checkpoints wait for their evaluation beside training now, the one at work included. Of rank 0 only."""

    waiting: int


@dataclass(frozen=True)
class SavingReport:
    """A save of the state after this step begins; a run may resume from there."""

    step: int


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint is complete, or could not be written. Only rank 0 reports it."""

    step: int
    path: str
    seconds: float  # until it was complete
    waited_seconds: float  # of these, that training stood still
    error: str | None = None  # why there is none


@dataclass(frozen=True)
class FaultReport:
    """This rank is healthy and ends because of others: one line that says why."""

    step: int
    message: str


@dataclass(frozen=True)
class StartReport:
    """The run starts or resumes. machines: what the ranks run on, as lines of the log."""

    resumes: bool
    ranks: int
    device: str
    torch: str
    machines: tuple[str, ...]


@dataclass(frozen=True)
class EndReport:
    """The run ended in order. reason: finished, or asked to stop."""

    reason: str


Report = (
    StartReport
    | StepReport
    | EvaluationReport
    | MissedReport
    | WaitingReport
    | SavingReport
    | CheckpointReport
    | FaultReport
    | EndReport
)
Observer = Callable[[Report], None]  # gets every report of its rank, and ignores what it does not know


def named_losses(values: list[float], parts: tuple[str, ...], layers: tuple[str, ...]) -> dict[str, float]:
    """The flattened (parts, layers) table as a dictionary with the sums first."""
    rows = {part: values[row * len(layers) : (row + 1) * len(layers)] for row, part in enumerate(parts)}
    named = {"total": sum(values)} | {part: sum(row) for part, row in rows.items()}
    for part, row in rows.items():
        named |= {f"{part}_{layer}": value for layer, value in zip(layers, row, strict=True)}
    return named


class Pace:
    """Finds slow ranks (stragglers), by their own seconds: waiting for a batch, forward passes and losses.

    Under ZeRO stage 3 a forward pass gathers weights from all ranks, so there only a slow data loader shows.
    """

    STEPS = 20  # looked at together
    LIMIT = 1.5  # times the median

    def __init__(self) -> None:
        self._window: list[list[float]] = []
        self._known: set[int] = set()

    def slow(self, seconds: list[float]) -> list[tuple[int, str]]:
        """Ranks that have become slow, each with a message. seconds: the own seconds of each rank in one step."""
        self._window.append(seconds)
        if len(self._window) < self.STEPS:
            return []
        means = [statistics.median(of_rank) for of_rank in zip(*self._window, strict=True)]
        self._window = []
        usual = statistics.median_low(means)
        slow = {rank: mean for rank, mean in enumerate(means) if mean > self.LIMIT * usual}
        new = [rank for rank in slow if rank not in self._known]
        self._known = set(slow)
        text = "needs {:.2f} s of a step for its batch and its losses, the ranks' median is {:.2f} s"
        return [(rank, text.format(slow[rank], usual)) for rank in new]


class Progress:
    """Logs a line every train.log_every_steps: losses, images per second since the last line, time left."""

    def __init__(self, config: Config, step: int, schedule: Schedule, quiet: bool) -> None:
        self.quiet = quiet
        self.config, self.last_step, self.num_epochs = config, schedule.last_step, schedule.num_epochs
        self._since = (time.perf_counter(), step)
        self._wait = 0.0

    def line(self, text: str) -> None:
        if not self.quiet:
            log.info(text)

    def observe(self, report: Report) -> None:
        if isinstance(report, StepReport):
            self._step(report)
        elif isinstance(report, EvaluationReport):
            self._evaluation(report)
        elif isinstance(report, MissedReport) and not report.repeats:
            end = "it is tried again" if report.again else "it has no score"
            log.warning("step %d is not evaluated, %s: %s", report.step, end, report.reason)

    def _step(self, report: StepReport) -> None:
        self._wait += report.data_wait_seconds
        if report.skipped and not self.quiet:
            log.warning("step %d skipped: %s", report.step, report.not_finite)
        for message in report.slow_ranks if not self.quiet else ():
            log.warning("%s: all wait for it", visible(message))
        for message in report.bad_samples if not self.quiet else ():
            log.warning("left out in step %d: %s", report.step, visible(message))
        if report.step % self.config.train.log_every_steps and report.step != self.last_step:
            return
        now, (then, step) = time.perf_counter(), self._since
        per_step = (now - then) / max(1, report.step - step)
        losses = " ".join(f"{name} {report.losses[name]:.3f}" for name in report.parts)
        self.line(
            f"epoch {report.epoch + 1}/{self.num_epochs} "
            f"step {report.step}/{self.last_step} loss {report.losses['total']:.3f} ({losses}) "
            f"gradient {report.gradient_norm:.2f} rate {report.learning_rate:.1e} "
            f"{report.images / per_step:.1f} images/s, {100 * self._wait / max(now - then, 1e-9):.0f} % data wait, "
            f"{report.memory_bytes / 2**30:.1f} GiB, {_clock(per_step * (self.last_step - report.step))} left"
        )
        self._since, self._wait = (now, report.step), 0.0

    def _evaluation(self, report: EvaluationReport) -> None:
        step, result = report.step, report.result
        for message in report.bad_samples if not self.quiet else ():
            log.warning("left out of the evaluation of step %d: %s", step, visible(message))
        if result.num_not_finite and not self.quiet:
            log.error("step %d: %s", step, without_score(result.num_not_finite))
            return
        scores = in_brief(result.metrics, result.headline, result.protocol)
        scores += f" ({result.departure})" if result.departure else ""
        self.line(f"evaluated step {step} on {result.images} images in {result.duration}: {scores}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
