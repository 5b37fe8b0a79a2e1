"""One rank's exporter as a process of its own, fed as a trainer feeds it: `rank_process.py RUN RANK`.

Prints the address that it serves, then reports ten steps a second and an evaluation now and then, until its standard
input closes. The numbers follow formulas, so that a test knows what must arrive.
"""

import math
import select
import sys
from dataclasses import dataclass, field

from ddetr.monitoring.exporter import serve
from ddetr.monitoring.metrics import RunMetrics

SCORES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)


@dataclass(frozen=True)
class StepReport:
    step: int
    epoch: int
    parts: tuple[str, ...]
    losses: dict[str, float]
    learning_rate: float
    gradient_norm: float
    images: int
    step_seconds: float
    data_wait_seconds: float
    own_seconds: float
    skipped: bool
    memory_bytes: int
    loss_scale: float
    bad_samples: tuple[str, ...]


@dataclass(frozen=True)
class Result:
    metrics: dict[str, float]
    headline: str
    images: int
    seconds: float
    num_not_finite: int = 0
    num_bad: int = 0
    parts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvaluationReport:
    step: int
    result: Result


@dataclass(frozen=True)
class CheckpointReport:
    path: str
    error: str | None


@dataclass(frozen=True)
class WaitingReport:
    waiting: int


def step_report(step: int, rank: int = 0) -> StepReport:
    """A run that learns: ten steps an epoch, 8 images a step, rank r waits (r + 1) tenths of its step for data."""
    decay = math.exp(-step / 200)
    parts = {"class": 1.2 * decay + 0.4, "l1": 2.5 * decay + 0.5, "giou": 2.2 * decay + 0.7}
    return StepReport(
        step=step,
        epoch=step // 10,
        parts=tuple(parts),
        losses={"total": sum(parts.values()), **parts, "class_0": parts["class"] / 2, "class_1": parts["class"] / 2},
        learning_rate=4e-4,
        gradient_norm=8 * decay + 2,
        images=8,
        step_seconds=0.25,
        data_wait_seconds=0.025 * (rank + 1),
        own_seconds=0.05 * (rank + 1),
        skipped=step % 50 == 1,
        memory_bytes=900_000_000 + rank,
        loss_scale=65536.0,
        bad_samples=("shard-000003.tar: sample 000000000017: damaged",) if step % 40 == 3 else (),
    )


def evaluation_report(step: int) -> EvaluationReport:
    """AP 0.2, AP50 0.4, ...; the set has no large objects, which pycocotools marks by -1."""
    metrics = {name: 0.2 * (1 + index % 3) for index, name in enumerate(SCORES)}
    metrics["AP_large"] = metrics["AR_large"] = -1.0
    parts = {"decoding": 2.5, "model": 20.0, "scoring": 0.5}  # of two ranks
    return EvaluationReport(step, Result(metrics, "AP", images=100, seconds=12.5, num_bad=2, parts=parts))


def main(run: str, rank: int) -> None:
    metrics = RunMetrics(run, rank)
    with serve(metrics.registry, "127.0.0.1", 0) as exporter:
        print(exporter.address, flush=True)
        step = 0
        while not select.select([sys.stdin], [], [], 0.1)[0]:
            step += 1
            metrics.observe(step_report(step, rank))
            if step % 10 == 0 and rank == 0:
                metrics.observe(CheckpointReport(f"step_{step:08d}", None))
                metrics.observe(evaluation_report(step))
                metrics.observe(WaitingReport(step % 20))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
