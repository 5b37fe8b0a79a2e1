"""Every Prometheus metric of a training run, declared and documented once.

Names are `ddetr_<thing>_<unit>[_total]` in base units (seconds, bytes, ratios of 0 to 1). A quantity without a unit
ends in the noun that it is (loss, rate, norm, scale, epoch, step). Each metric carries the labels `run` and `rank`;
a further label takes its values from the names in the run's reports, the same in all of them, so the number of series
per process does not grow.

`python -m ddetr.monitoring.metrics` prints the reference table of docs/operations.md.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

ENDS = ("done", "failed", "unreachable", "left_out")  # of an evaluation
RESIDENT_PAGES = Path("/proc/self/statm")

# About a factor of 1.5 apart where training steps lie, so that a quantile read from them is off by at most that.
STEP_BUCKETS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.2, 1.8, 2.5, 4.0, 6.0, 9.0, 15.0, 30.0, 60.0, 180.0)
WAIT_BUCKETS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 15.0, 60.0)


@dataclass(frozen=True)
class Metric:
    """One metric. label: of its own, besides run and rank; values: of that label. buckets: bounds of a histogram."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    documentation: str
    label: str | None = None
    values: str = ""
    buckets: tuple[float, ...] = ()


LOSS = Metric(
    "ddetr_train_loss",
    "gauge",
    "Loss of the last step, weighted and summed over layers.",
    "part",
    "total, and each part of the run's loss (class, l1, giou)",
)
LEARNING_RATE = Metric("ddetr_learning_rate", "gauge", "Learning rate of the last step, of the transformer's group.")
GRADIENT_NORM = Metric("ddetr_gradient_norm", "gauge", "Gradient norm of the last step, before gradient clipping.")
LOSS_SCALE = Metric("ddetr_loss_scale", "gauge", "Loss scale of fp16 mixed precision; 1 in other precisions.")
EPOCH = Metric("ddetr_current_epoch", "gauge", "Epoch of the last step, from 0.")
STEP = Metric("ddetr_current_step", "gauge", "Last optimizer step, counted over the whole run, resumes included.")
STEPS = Metric("ddetr_steps_total", "counter", "Optimizer steps taken by this process, the skipped ones included.")
SKIPPED_STEPS = Metric(
    "ddetr_skipped_steps_total", "counter", "Optimizer steps skipped because a loss or a gradient was not finite."
)
IMAGES = Metric("ddetr_images_total", "counter", "Images trained on by all ranks together; do not sum this over ranks.")
BAD_SAMPLES = Metric(
    "ddetr_bad_samples_total", "counter", "Damaged images left out by all ranks together; do not sum this over ranks."
)
STEP_SECONDS = Metric(
    "ddetr_step_seconds", "histogram", "Duration of a step, the wait for data included.", buckets=STEP_BUCKETS
)
DATA_WAIT_SECONDS = Metric(
    "ddetr_data_wait_seconds", "histogram", "Time that a step waits for the data loader.", buckets=WAIT_BUCKETS
)
OWN_SECONDS = Metric(
    "ddetr_own_seconds_total",
    "counter",
    "Time that this rank spent waiting for batches and in forward passes and losses; the slowest rank sets the pace.",
)
PROCESS_MEMORY = Metric(
    "ddetr_process_memory_bytes", "gauge", "Resident memory of the training process, read at each scrape (Linux)."
)
DEVICE_MEMORY = Metric(
    "ddetr_device_memory_bytes", "gauge", "Peak memory so far: allocated on the GPU, or resident on a CPU."
)
SCORE = Metric(
    "ddetr_evaluation_score_ratio",
    "gauge",
    "Scores of the last evaluation, 0 to 1; NaN where the set has no such objects or the model has diverged.",
    "metric",
    "the scores' names (AP, AP50, AP75, AP_small ... AR_large)",
)
HEADLINE = Metric(
    "ddetr_evaluation_headline_ratio",
    "gauge",
    "The score of the last evaluation by which checkpoints are compared.",
    "metric",
    "its name (AP)",
)
EVALUATIONS = Metric(
    "ddetr_evaluations_total",
    "counter",
    "Evaluations of checkpoints, by how they ended; those beside training are counted by rank 0, by each attempt.",
    "result",
    "done, failed, unreachable (the Ray cluster), left_out (not tried, or not any more)",
)
WAITING = Metric(
    "ddetr_evaluation_waiting_checkpoints",
    "gauge",
    "Checkpoints that wait for their evaluation beside training, the one at work included (rank 0).",
)
EVALUATION_STEP = Metric(
    "ddetr_evaluation_step",
    "gauge",
    "Optimizer step of the newest checkpoint that is evaluated; the gauges of the last evaluation are its.",
)
EVALUATION_SECONDS = Metric("ddetr_evaluation_seconds", "gauge", "Duration of the last evaluation.")
EVALUATION_PART_SECONDS = Metric(
    "ddetr_evaluation_part_seconds",
    "gauge",
    "What a part of the last evaluation took of all ranks together: waiting for decoded images, the model, scoring.",
    "part",
    "decoding, model, scoring",
)
EVALUATION_IMAGES = Metric("ddetr_evaluation_images", "gauge", "Images of the last evaluation.")
EVALUATION_BAD_SAMPLES = Metric(
    "ddetr_evaluation_bad_images", "gauge", "Damaged images that the last evaluation left out."
)
EVALUATION_NOT_FINITE = Metric(
    "ddetr_evaluation_not_finite_queries",
    "gauge",
    "Queries of the last evaluation for which the model gave infinities or NaN; above 0 it has no score.",
)
START_TIME = Metric("ddetr_start_timestamp_seconds", "gauge", "Unix time at which this process began to train.")
STEP_TIME = Metric("ddetr_last_step_timestamp_seconds", "gauge", "Unix time at which the last step ended.")
CHECKPOINT_TIME = Metric(
    "ddetr_last_checkpoint_timestamp_seconds", "gauge", "Unix time at which the last checkpoint was complete."
)

METRICS = (
    *(LOSS, LEARNING_RATE, GRADIENT_NORM, LOSS_SCALE, EPOCH, STEP, STEPS, SKIPPED_STEPS, IMAGES, BAD_SAMPLES),
    *(STEP_SECONDS, DATA_WAIT_SECONDS, OWN_SECONDS, PROCESS_MEMORY, DEVICE_MEMORY),
    *(EVALUATIONS, WAITING, EVALUATION_STEP, SCORE, HEADLINE, EVALUATION_SECONDS, EVALUATION_PART_SECONDS),
    *(EVALUATION_IMAGES, EVALUATION_BAD_SAMPLES, EVALUATION_NOT_FINITE),
    *(START_TIME, STEP_TIME, CHECKPOINT_TIME),
)


@runtime_checkable
class StepReport(Protocol):
    """What the trainer reports after each optimizer step."""

    @property
    def step(self) -> int: ...
    @property
    def epoch(self) -> int: ...
    @property
    def parts(self) -> Sequence[str]: ...
    @property
    def losses(self) -> Mapping[str, float]: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def gradient_norm(self) -> float: ...
    @property
    def images(self) -> int: ...
    @property
    def bad_samples(self) -> Sequence[str]: ...
    @property
    def step_seconds(self) -> float: ...
    @property
    def data_wait_seconds(self) -> float: ...
    @property
    def own_seconds(self) -> float: ...
    @property
    def skipped(self) -> bool: ...
    @property
    def memory_bytes(self) -> int: ...
    @property
    def loss_scale(self) -> float: ...


class Result(Protocol):
    """What an evaluation found; a score below 0 has no objects to be computed on."""

    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def headline(self) -> str: ...
    @property
    def images(self) -> int: ...
    @property
    def num_not_finite(self) -> int: ...
    @property
    def num_bad(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def parts(self) -> Mapping[str, float]: ...


@runtime_checkable
class EvaluationReport(Protocol):
    """What the trainer reports after an evaluation."""

    @property
    def step(self) -> int: ...
    @property
    def result(self) -> Result: ...


@runtime_checkable
class MissedReport(Protocol):
    """What the trainer reports of an evaluation without a result; kind: one of ENDS."""

    @property
    def kind(self) -> str: ...
    @property
    def again(self) -> bool: ...


@runtime_checkable
class WaitingReport(Protocol):
    """What the trainer reports of the checkpoints that wait for their evaluation."""

    @property
    def waiting(self) -> int: ...


@runtime_checkable
class CheckpointReport(Protocol):
    """What the trainer reports of a checkpoint; error: why there is none."""

    @property
    def path(self) -> str: ...
    @property
    def error(self) -> str | None: ...


class RunMetrics:
    """The metrics of one rank of one run, in a registry of their own.

    A gauge appears when its first value is known; counters and histograms are there from the start, so that a rate
    over the first steps is right.
    """

    def __init__(self, run: str, rank: int):
        self.registry = CollectorRegistry()
        self._labels = {"run": run, "rank": str(rank)}
        self._gauges: dict[Metric, Gauge] = {}
        self._counters: dict[Metric, Counter] = {}
        self._ends: dict[str, Counter] = {}  # of evaluations
        self._evaluated_step = 0
        self._histograms: dict[Metric, Histogram] = {}
        for metric in METRICS:
            names = [*self._labels, *([metric.label] if metric.label else [])]
            declared = (metric.name, metric.documentation, names)
            if metric.kind == "gauge":
                self._gauges[metric] = Gauge(*declared, registry=self.registry)
            elif metric is EVALUATIONS:
                counter = Counter(*declared, registry=self.registry)
                self._ends = {end: counter.labels(**self._labels, result=end) for end in ENDS}
            elif metric.kind == "counter":
                self._counters[metric] = Counter(*declared, registry=self.registry).labels(**self._labels)
            else:
                histogram = Histogram(*declared, buckets=metric.buckets, registry=self.registry)
                self._histograms[metric] = histogram.labels(**self._labels)
        self._set(START_TIME, time.time())
        if RESIDENT_PAGES.exists():
            self._gauges[PROCESS_MEMORY].labels(**self._labels).set_function(_resident_bytes)

    def observe(self, report: object) -> None:
        """Update the metrics from a report of the trainer; one that has no metrics here is ignored."""
        if isinstance(report, StepReport):
            self._observe_step(report)
        elif isinstance(report, EvaluationReport):
            self._ends["done"].inc()
            if report.step >= self._evaluated_step:  # made up for later, an earlier one is not the state of the run
                self._evaluated_step = report.step
                self._set(EVALUATION_STEP, report.step)
                self._observe_evaluation(report.result)
        elif isinstance(report, MissedReport):
            self._ends[report.kind].inc()
        elif isinstance(report, WaitingReport):
            self._set(WAITING, report.waiting)
        elif isinstance(report, CheckpointReport) and report.error is None:
            self._set(CHECKPOINT_TIME, time.time())

    def _observe_step(self, report: StepReport) -> None:
        for part in ("total", *report.parts):
            self._set(LOSS, report.losses[part], part=part)
        self._set(LEARNING_RATE, report.learning_rate)
        self._set(GRADIENT_NORM, report.gradient_norm)
        self._set(LOSS_SCALE, report.loss_scale)
        self._set(EPOCH, report.epoch)
        self._set(STEP, report.step)
        self._set(STEP_TIME, time.time())
        self._set(DEVICE_MEMORY, report.memory_bytes)
        self._counters[STEPS].inc()
        self._counters[SKIPPED_STEPS].inc(int(report.skipped))
        self._counters[IMAGES].inc(report.images)
        self._counters[OWN_SECONDS].inc(report.own_seconds)
        self._counters[BAD_SAMPLES].inc(len(report.bad_samples))
        self._histograms[STEP_SECONDS].observe(report.step_seconds)
        self._histograms[DATA_WAIT_SECONDS].observe(report.data_wait_seconds)

    def _observe_evaluation(self, result: Result) -> None:
        scores = {name: math.nan if value < 0 else value for name, value in result.metrics.items()}
        for name, value in scores.items():
            self._set(SCORE, value, metric=name)
        self._set(HEADLINE, scores[result.headline], metric=result.headline)
        self._set(EVALUATION_SECONDS, result.seconds)
        for part, seconds in result.parts.items():
            self._set(EVALUATION_PART_SECONDS, seconds, part=part)
        self._set(EVALUATION_IMAGES, result.images)
        self._set(EVALUATION_BAD_SAMPLES, result.num_bad)
        self._set(EVALUATION_NOT_FINITE, result.num_not_finite)

    def _set(self, metric: Metric, value: float, /, **label: str) -> None:
        self._gauges[metric].labels(**self._labels, **label).set(value)


def reference_table() -> str:
    """The metrics as a Markdown table, for docs/operations.md."""
    rows = ["| metric | type | what it is |", "| --- | --- | --- |"]
    for metric in METRICS:
        values = f" `{metric.label}`: {metric.values}." if metric.label else ""
        rows.append(f"| `{metric.name}` | {metric.kind} | {metric.documentation}{values} |")
    return "\n".join(rows) + "\n"


def _resident_bytes() -> float:
    pages = int(RESIDENT_PAGES.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    print(reference_table(), end="")
