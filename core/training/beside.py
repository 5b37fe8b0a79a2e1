"""Evaluation beside training: rank 0 hands checkpoints to a process of its own, and takes the results as they come.

Training never waits for it. What is due when: schedule.py; what is evaluated next and what is left out: backlog.py.
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from ...data.text import visible
from ..checkpoint import checkpoints
from ..checkpoint.codec import position_of
from ..checkpoint.weights import WEIGHTS
from ..config import Config
from ..evaluation import result
from ..evaluation.result import Measure, Result
from .backlog import Backlog, Waiting
from .evaluator_process import Answer, EvaluatorProcess
from .reports import CheckpointReport, EvaluationReport, MissedReport, Report, StepReport, WaitingReport
from .schedule import Schedule

log = logging.getLogger("ddetr")

TRIES = 3  # of a checkpoint whose evaluation fails; a cluster that cannot be reached is asked without end
PAUSES = (5.0, 10.0, 20.0, 40.0, 60.0)  # seconds before the next try, the last one again and again
LOG = "eval/log.txt"  # what the process prints, in the run directory
WAITING_SECONDS = 60.0  # between lines that say what the end of a run waits for


class Beside:
    """The checkpoints of a run that wait for their evaluation, and the process that evaluates them.

    command: starts the process (evaluator_process.py). observe: gets an EvaluationReport for each result, under the
    step of its checkpoint, and a MissedReport for each attempt without one. asked: whether the run was asked to stop.
    Checkpoints from before a resume that were due and have no result are made up for, the newest first, as far as
    eval.most_waiting allows.
    """

    def __init__(
        self,
        command: Sequence[str],
        config: Config,
        run_directory: Path,
        schedule: Schedule,
        measure: Measure,
        observe: Callable[[Report], None],
        asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self._command, self._config, self._run_directory = command, config, run_directory
        self._schedule, self._measure, self._observe, self._asked = schedule, measure, observe, asked
        self._process: EvaluatorProcess | None = None
        self._dropped: list[EvaluatorProcess] = []
        self._failures, self._not_before = 0, 0.0  # in a row; time.monotonic of the next try
        self._num_waiting = 0  # as reported
        self._said: tuple[int, str, str] | None = None  # of the last attempt without a result: step, kind and why
        self._begin_step = max((_step(path) for path in checkpoints(run_directory)), default=0)
        self.missing: dict[int, str] = {}  # why a step has no evaluation, of those that are not tried any more
        self._backlog = Backlog(config.eval.most_waiting)
        self._from_before = [Waiting(_step(path), path) for path in unevaluated(run_directory, config, measure)]

    @property
    def held(self) -> Collection[Path]:
        """Checkpoints that may not be deleted yet; may be asked by any thread."""
        return [item.path for item in (*self._from_before, *self._backlog.all)]

    def observe(self, report: Report) -> None:
        """Take over a checkpoint that is due and complete; after each step look for what has come. Never waits."""
        if isinstance(report, CheckpointReport) and report.error is None and self._schedule.due(report.step).hand_over:
            self.missing.pop(report.step, None)
            self._add(Waiting(report.step, Path(report.path)))
        if isinstance(report, CheckpointReport | StepReport):
            self.look()

    def look(self) -> None:
        """Report what has come by now, and have the next checkpoint evaluated."""
        self._make_up()
        self._dropped = [process for process in self._dropped if not process.is_gone]
        if self._process is not None:
            status = self._process.status  # before the answers, of which none comes later
            for answer in self._process.answers():
                self._hear(answer)
            if status is not None:
                self._drop()
                if self._backlog.at_work and not self._asked():  # a signal to all of the run's processes, otherwise
                    why = f"its process ended with exit status {status}; {self._run_directory / LOG} has what it said"
                    self._end(Answer("failed", why))
        now = time.monotonic()
        if now >= self._not_before and not self._backlog.at_work and not self._asked():
            self._backlog = self._backlog.begun(now)
            if self._backlog.at_work:
                self._begin(self._backlog.at_work)
        if (waiting := len(self._backlog.all)) != self._num_waiting:
            self._num_waiting = waiting
            self._observe(WaitingReport(waiting))

    def finish(self, stop: Callable[[], bool]) -> list[int]:
        """Wait for what eval.required asks for, at most eval.wait_minutes; returns the required steps without a result.

        stop: whether the wait was asked to end. What still waits then is left out, and said.
        """
        began = told = time.monotonic()
        self._make_up()
        while (waited_for := self._awaited()) and not stop():
            if time.monotonic() - began > 60 * self._config.eval.wait_minutes:
                break
            if told <= time.monotonic():
                log.info(
                    "training is done; waiting up to %g min for the evaluation of step %s (eval.required=%s)",
                    self._config.eval.wait_minutes,
                    ", ".join(map(str, waited_for)),
                    self._config.eval.required,
                )
                told = time.monotonic() + WAITING_SECONDS
            time.sleep(0.1)
            self.look()
        self.close()
        left, self._backlog = self._backlog.all, Backlog(self._config.eval.most_waiting)
        for item in left:
            self._miss(item, "left_out", "the run has ended", again=False)
        return [step for step in sorted(self.missing) if self._is_required(step)]

    def close(self) -> None:
        """End the process; what it was at is made up for when the run resumes."""
        process, self._process = self._process, None
        if process is not None:
            process.end(at_work=self._backlog.at_work is not None)

    def _awaited(self) -> list[int]:
        return sorted(item.step for item in self._backlog.all if self._is_required(item.step))

    def _is_required(self, step: int) -> bool:
        required = self._config.eval.required
        return required == "all" or (required == "last" and step >= self._schedule.last_step)

    def _make_up(self) -> None:
        """Take over, once, what is left from before the resume."""
        self._add(*self._from_before)
        self._from_before = []

    def _add(self, *items: Waiting) -> None:
        self._backlog, left_out = self._backlog.with_(*items)
        self._leave_out(left_out)

    def _leave_out(self, items: Sequence[Waiting]) -> None:
        for item in items:
            why = f"newer ones wait as well (eval.most_waiting={self._backlog.most})"
            self._miss(item, "left_out", why, again=False)

    def _miss(self, item: Waiting, kind: str, why: str, *, again: bool) -> None:
        if not again:
            self.missing[item.step] = why
        repeats, self._said = again and self._said == (item.step, kind, why), (item.step, kind, why)
        self._observe(MissedReport(item.step, kind, visible(why), again, repeats))

    def _begin(self, item: Waiting) -> None:
        try:
            if self._process is None:
                self._process = EvaluatorProcess(self._command, self._config, self._run_directory / LOG)
            self._process.order(item.path)
        except OSError as error:  # it has ended, or cannot be started
            self._drop()
            self._end(Answer("failed", f"its process: {error}"))

    def _drop(self) -> None:
        if self._process is not None:
            self._process.drop()
            self._dropped.append(self._process)
        self._process = None

    def _hear(self, answer: Answer) -> None:
        if answer.kind == "said":
            log.info("evaluation: %s", visible(answer.text))
        elif self._backlog.at_work:
            self._end(answer)

    def _end(self, answer: Answer) -> None:
        item = self._backlog.at_work
        assert item is not None
        if answer.kind == "done":
            if (found := self._result(item.path)) is not None:
                self._backlog, _ = self._backlog.ended()
                self._failures, self._said = 0, None
                self.missing.pop(item.step, None)
                self._observe(EvaluationReport(item.step, self._epoch(item.step, found), found, answer.bad_samples))
                return
            answer = Answer("failed", "its result is not there")
        if answer.kind == "busy":  # a follower is at it: another one may be next
            self._backlog, left_out = self._backlog.ended(item._replace(not_before=time.monotonic() + PAUSES[0]))
            self._leave_out(left_out)
            return
        tries = item.tries + (answer.kind == "failed")
        again = answer.kind == "unreachable" or (answer.again and tries < TRIES)
        self._not_before = time.monotonic() + PAUSES[min(self._failures, len(PAUSES) - 1)]
        self._failures += 1
        self._backlog, left_out = self._backlog.ended(item._replace(tries=tries) if again else None)
        self._miss(item, answer.kind, answer.text, again=again)
        self._leave_out(left_out)

    def _epoch(self, step: int, found: Result) -> int:
        """From 0. A resume may have changed the number of steps in an epoch."""
        if step > self._begin_step:
            return self._schedule.epoch(step - 1)
        return max(0, (found.epochs or 1) - 1)

    def _result(self, checkpoint: Path) -> Result | None:
        try:
            found = [item for item in result.known(checkpoint / WEIGHTS) if item.measure == self._measure]
        except (OSError, ValueError) as error:
            log.error("%s", error)
            return None
        return found[-1] if found else None


def unevaluated(run_directory: Path, config: Config, measure: Measure) -> list[Path]:
    """The checkpoints of a run that were due and have no result of this measure, oldest first."""
    return [
        path for path in checkpoints(run_directory) if _was_due(path, config) and not result.is_evaluated(path, measure)
    ]


def _was_due(checkpoint: Path, config: Config) -> bool:
    """By its own position: a resume may have changed the number of steps in an epoch. The last step was, too."""
    every = config.train.evaluate_every_epochs
    try:
        position = position_of(checkpoint)
    except (OSError, ValueError) as error:
        log.warning("not evaluated: %s", error)
        return False
    if every == 0:
        return False
    whole = position.step_in_epoch == 0
    is_last = position.step == config.train.max_steps or (whole and position.epochs == config.train.epochs)
    return is_last or (whole and position.epochs % every == 0)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))
