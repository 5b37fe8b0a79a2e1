"""The files of a run directory: configuration, metrics, events, log, and the Prometheus targets of its ranks."""

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from ..core.config import Config, dump
from ..core.training.reports import (
    CheckpointReport,
    EndReport,
    EvaluationReport,
    FaultReport,
    MissedReport,
    Report,
    SavingReport,
    StartReport,
    StepReport,
)
from ..data.files import write_whole
from .console import LogFormatter, say
from .history import EVENTS, METRICS, evaluation_line, event_line, steps_line

log = logging.getLogger("ddetr")


@contextlib.contextmanager
def announced(addresses: list[str], run_directory: Path, run_label: str) -> Iterator[None]:
    """A context with every rank's address in targets.json for Prometheus, which is emptied if the run ends in order."""
    targets = run_directory / "targets.json"
    labels = [{"run": run_label, "rank": str(rank)} for rank in range(len(addresses))]
    write_targets(targets, zip(addresses, labels, strict=True))
    log.info("run directory %s", run_directory)
    if addresses:
        log.info("metrics of run %s at %s", run_label, ", ".join(f"http://{address}/metrics" for address in addresses))
    yield
    write_targets(targets, [])  # not after an error: Prometheus should report the ranks of a broken run as missing


def write_targets(path: Path, targets: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Write (address, labels) pairs as a Prometheus file_sd file, of which Prometheus never reads half.

    An empty list says that the run has ended: Prometheus forgets its ranks and does not report them missing.
    """
    groups = [{"targets": [address], "labels": dict(labels)} for address, labels in targets]
    write_whole(path, json.dumps(groups, indent=2).encode() + b"\n")


class Record:
    """config.yaml, metrics.jsonl, events.jsonl and log.txt of a run; only rank 0 writes them."""

    FILES = (METRICS, EVENTS, "log.txt")  # that are written to where they are

    def __init__(self, run_directory: Path, config: Config) -> None:
        run_directory.mkdir(parents=True, exist_ok=True)
        write_whole(run_directory / "config.yaml", dump(config).encode())
        self._every = config.train.log_every_steps
        self._steps: list[StepReport] = []  # since the last line of metrics.jsonl
        self._metrics = self._open(run_directory / METRICS)
        self._events = self._open(run_directory / EVENTS)
        self._log = logging.FileHandler(run_directory / "log.txt", encoding="utf-8")
        self._log.setFormatter(LogFormatter("%(asctime)s %(message)s"))
        log.addHandler(self._log)

    @staticmethod
    def _open(path: Path) -> TextIO:
        if path.is_file():  # half a line is left where the process was killed or the disk full
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        return path.open("a", buffering=1)

    def __enter__(self) -> "Record":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._write_steps()
        if error is not None:
            self.event("error", message=f"{type(error).__name__}: {error}")
        log.removeHandler(self._log)
        for file in (self._metrics, self._events, self._log):
            try:
                file.close()
            except OSError as error:  # lines for which there was no room: not what the run should end with
                say(f"{file.name}: its last lines are lost: {error.strerror}", file=sys.stderr)

    def event(self, name: str, **details: Any) -> None:
        self._append(self._events, event_line(name, **details))

    def _append(self, file: TextIO, line: str) -> None:
        """A disk that is full costs lines, not the run."""
        try:
            file.write(line + "\n")
        except OSError as error:
            say(f"{file.name}: not written: {error.strerror}: {line}", file=sys.stderr)

    def observe(self, item: Report) -> None:
        """Write a report: steps, several to a line, and evaluations to metrics.jsonl, events to events.jsonl."""
        if isinstance(item, StepReport):
            self._step(item)
            return
        if isinstance(item, SavingReport | FaultReport):
            self._write_steps()
        if isinstance(item, StartReport):
            self.event("resume" if item.resumes else "start", **self._without(item, "resumes"))
        elif isinstance(item, EndReport):
            self.event("stop", reason=item.reason)
        elif isinstance(item, FaultReport):
            self.event("ranks_lost", step=item.step, reason=item.message)
        elif isinstance(item, CheckpointReport):
            if item.error is None:
                self.event("checkpoint", **self._without(item, "error"))
            else:
                self.event("checkpoint_failed", step=item.step, reason=item.error)
        elif isinstance(item, MissedReport):
            if not item.repeats:
                self.event("evaluation_missed", **self._without(item, "repeats"))
        elif isinstance(item, EvaluationReport):
            found = item.result
            score = found.metrics[found.headline]
            self.event("evaluation", step=item.step, headline=found.headline, score=score, seconds=found.seconds)
            for message in item.bad_samples:
                self.event("bad_sample", step=item.step, reason=message)
            if found.num_not_finite:
                self.event("evaluation_not_finite", step=item.step, queries=found.num_not_finite)
            self._append(self._metrics, evaluation_line(item))

    @staticmethod
    def _without(item: Any, name: str) -> dict[str, Any]:
        return {key: value for key, value in asdict(item).items() if key != name}

    def _step(self, item: StepReport) -> None:
        for message in item.slow_ranks:
            self.event("slow_rank", step=item.step, reason=message)
        for message in item.bad_samples:
            self.event("bad_sample", step=item.step, reason=message)
        if item.skipped:
            self.event("skipped", step=item.step, reason=item.not_finite)
        if self._steps and self._steps[-1].epoch != item.epoch:
            self._write_steps()
        self._steps.append(item)
        if item.skipped or item.step % self._every == 0:
            self._write_steps()

    def _write_steps(self) -> None:
        """A line for the steps since the last one: every few steps, and wherever a run or an epoch may end."""
        steps, self._steps = self._steps, []
        if steps:
            self._append(self._metrics, steps_line(steps))
