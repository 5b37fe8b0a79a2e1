"""Evaluation beside training: rank 0 hands checkpoints to a process of its own, and takes the results as they come.

The process may wait, fail or be killed: training never waits for it. It reads lines of JSON, the configuration first
and then one checkpoint at a time, and answers with lines of JSON: what it says, and how the evaluation ended.
"""

import contextlib
import json
import logging
import os
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from ...data.documents import parse_json
from ...data.text import visible
from ..checkpoint import checkpoints
from ..checkpoint.weights import STEP, WEIGHTS
from ..config import Config, dump
from ..evaluation import result
from ..evaluation.result import Measure, Result
from .backlog import Backlog, Waiting
from .reports import CheckpointReport, EvaluationReport, MissedReport, Report, StepReport
from .schedule import Schedule

log = logging.getLogger("ddetr")

TRIES = 3  # of a checkpoint whose evaluation fails; a cluster that cannot be reached is asked without end
PAUSES = (5.0, 10.0, 20.0, 40.0, 60.0)  # seconds before the next try, the last one again and again
LOG = "eval/log.txt"  # what the process prints, in the run directory
ENDING_SECONDS = 5.0
WAITING_SECONDS = 60.0  # between lines that say what the end of a run waits for


class Beside:
    """The checkpoints of a run that wait for their evaluation, and the process that evaluates them.

    command: starts the process. observe: gets an EvaluationReport for each result, under the step of its checkpoint,
    and a MissedReport for each attempt without one. Those of earlier attempts of the run that have no result are made
    up for, the newest first, as far as train's eval.most_waiting allows.
    """

    def __init__(
        self,
        command: Sequence[str],
        config: Config,
        run_directory: Path,
        schedule: Schedule,
        measure: Measure,
        observe: Callable[[Report], None],
    ) -> None:
        self._command, self._config, self._run_directory = command, config, run_directory
        self._schedule, self._measure, self._observe = schedule, measure, observe
        self._process: subprocess.Popen[bytes] | None = None
        self._read = b""  # the begin of a line
        self._failures, self._not_before = 0, 0.0  # in a row; time.monotonic of the next try
        self.missing: dict[int, str] = {}  # why a step has no evaluation, of those that are not tried any more
        found = [self._waiting(path) for path in checkpoints(run_directory)]
        left = [item for item in found if self._is_due(item.step) and not result.is_evaluated(item.path, measure)]
        self._backlog, older = Backlog(config.eval.most_waiting).with_(*left)
        if older:
            log.warning(
                "%d older checkpoint(s) have no evaluation and are left out: ddetr eval %s --follow makes up for them",
                len(older),
                run_directory,
            )

    @property
    def held(self) -> Collection[Path]:
        """Checkpoints that may not be deleted yet; may be asked by any thread."""
        return [item.path for item in self._backlog.all]

    def observe(self, report: Report) -> None:
        """Take over a checkpoint that is due and complete; after each step look for what has come. Never waits."""
        if isinstance(report, CheckpointReport) and report.error is None and self._is_due(report.step):
            self.missing.pop(report.step, None)
            self._add(self._waiting(Path(report.path)))
        if isinstance(report, CheckpointReport | StepReport):
            self.look()

    def look(self) -> None:
        """Report what has come by now, and have the next checkpoint evaluated."""
        status = self._process.poll() if self._process else None  # before the answers, of which none comes later
        for answer in self._answers():
            if "said" in answer:
                log.info("evaluation: %s", visible(str(answer["said"])))
            elif self._backlog.at_work and "result" in answer:
                self._end(answer)
        if status is not None:
            self.close()
            if self._backlog.at_work:
                why = f"its process ended with exit status {status}; {self._run_directory / LOG} has what it said"
                self._end({"result": "failed", "why": why, "again": True})
        if time.monotonic() >= self._not_before and not self._backlog.at_work:
            self._backlog = self._backlog.begun()
            if self._backlog.at_work:
                self._begin(self._backlog.at_work)

    def finish(self, stop: Callable[[], bool]) -> list[int]:
        """Wait for what eval.required asks for, at most eval.wait_minutes; returns the required steps without a result.

        stop: whether the wait was asked to end. What still waits then is left out, and said.
        """
        began = told = time.monotonic()
        while (waited_for := self._awaited()) and not stop():
            if time.monotonic() - began > 60 * self._config.eval.wait_minutes:
                break
            if told <= time.monotonic():
                log.info(
                    "training is done; waiting up to %g min for the evaluation of %s (eval.required=%s)",
                    self._config.eval.wait_minutes,
                    _steps(waited_for),
                    self._config.eval.required,
                )
                told = time.monotonic() + WAITING_SECONDS
            time.sleep(0.1)
            self.look()
        self.close()
        for item in self._backlog.all:
            self._miss(item, "left_out", "the run has ended", again=False)
        self._backlog = Backlog(self._config.eval.most_waiting)
        return [step for step in sorted(self.missing) if self._is_required(step)]

    def close(self) -> None:
        """End the process; what it was at is made up for when the run resumes."""
        process, self._process, self._read = self._process, None, b""
        if process is None:
            return
        assert process.stdin is not None
        with process:  # closes its pipes
            with contextlib.suppress(OSError):
                process.stdin.close()  # the end, for one that waits for orders
            if self._backlog.at_work:
                process.terminate()  # it still gives back what it has of the cluster
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(ENDING_SECONDS)
            process.kill()

    def _awaited(self) -> list[int]:
        return sorted(item.step for item in self._backlog.all if self._is_required(item.step))

    def _is_required(self, step: int) -> bool:
        required = self._config.eval.required
        return required == "all" or (required == "last" and step == self._schedule.last_step)

    def _is_due(self, step: int) -> bool:
        return self._schedule.due(step).hand_over

    @staticmethod
    def _waiting(path: Path) -> Waiting:
        assert STEP.fullmatch(path.name), path
        return Waiting(int(path.name.removeprefix("step_")), path)

    def _add(self, item: Waiting) -> None:
        self._backlog, left_out = self._backlog.with_(item)
        for old in left_out:
            why = f"newer ones wait as well (eval.most_waiting={self._backlog.most})"
            self._miss(old, "left_out", why, again=False)

    def _miss(self, item: Waiting, kind: str, why: str, *, again: bool) -> None:
        if not again:
            self.missing[item.step] = why
        self._observe(MissedReport(item.step, kind, visible(why), again))

    def _begin(self, item: Waiting) -> None:
        try:
            if self._process is None:
                self._process = self._started()
                self._send({"config": dump(self._config)})
            self._send({"checkpoint": str(item.path)})
        except OSError as error:  # it has ended, or cannot be started
            self.close()
            self._end({"result": "failed", "why": f"its process: {error}", "again": True})

    def _started(self) -> subprocess.Popen[bytes]:
        file = self._run_directory / LOG
        file.parent.mkdir(exist_ok=True)
        with file.open("ab") as printed:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=printed,
                start_new_session=True,  # Ctrl-C is for the ranks
            )
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        return process

    def _send(self, order: dict[str, Any]) -> None:
        """Less than a pipe holds, as the process answers each order before the next: this does not wait."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def _answers(self) -> list[dict[str, Any]]:
        """The lines that have come."""
        if self._process is None or self._process.stdout is None:
            return []
        while chunk := self._process.stdout.read(1 << 16):  # None for nothing yet, empty at the end
            self._read += chunk
        *lines, self._read = self._read.split(b"\n")
        answers = []
        for line in lines:
            try:
                answers.append(parse_json(line))
            except ValueError as error:  # printed by something in there
                log.warning("the process that evaluates gave no answer: %s", error)
        return [answer for answer in answers if isinstance(answer, dict)]

    def _end(self, answer: dict[str, Any]) -> None:
        item, kind = self._backlog.at_work, answer["result"]
        assert item is not None
        self._backlog = self._backlog.ended()
        if kind == "done":
            if measured := self._results(item.path):
                self._failures = 0
                self.missing.pop(item.step, None)
                epoch = self._schedule.epoch(item.step - 1)
                self._observe(EvaluationReport(item.step, epoch, measured[-1], answer["bad_samples"]))
                return
            kind, answer = "failed", {"why": "its result is not there", "again": True}
        tries = item.tries + (kind == "failed")
        again = kind in ("busy", "unreachable") or (answer["again"] and tries < TRIES)
        if kind != "busy":  # somebody else is at it
            self._miss(item, kind, answer["why"], again=again)
        self._not_before = time.monotonic() + PAUSES[min(self._failures, len(PAUSES) - 1)]
        self._failures += 1
        if again:
            self._add(item._replace(tries=tries))

    def _results(self, checkpoint: Path) -> list[Result]:
        try:
            return [found for found in result.known(checkpoint / WEIGHTS) if found.measure == self._measure]
        except (OSError, ValueError) as error:
            log.error("%s", error)
            return []


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps))}"
