"""What a run has recorded of itself: metrics.jsonl and events.jsonl, written and read; the scores of checkpoints."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.checkpoint import checkpoints
from ..core.evaluation import result
from ..core.evaluation.result import EVALUATION
from ..core.training.reports import EvaluationReport, StepReport
from ..data import documents

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
SUMMED = ("images", "step_seconds", "data_wait_seconds")  # over the steps that a line stands for
FIRST_PARTS, FIRST_HEADLINE = ["class", "l1", "giou"], "AP"  # of lines of the first release, which do not say

COUNTS = ("step", "epoch", "images")  # what a step and an evaluation both have, beside their time
AMOUNTS = ("learning_rate", "gradient_norm", "loss_scale", "memory_bytes")
SPANS = ("step_seconds", "data_wait_seconds")
LATEST = 4e9  # seconds since 1970: what is later is no time of a run

Record = dict[str, Any]


def evaluation_line(report: EvaluationReport) -> str:
    """A line of metrics.jsonl. What is not finite is null in it."""
    return documents.as_json({"kind": "evaluation", **_evaluation(report.step, report.epoch, report.result)})


def steps_line(steps: Sequence[StepReport]) -> str:
    """A line of metrics.jsonl: the last of some steps, with sums over all of them."""
    sums = {name: sum(getattr(step, name) for step in steps) for name in SUMMED}
    line = {"kind": "step", "time": time.time(), **asdict(steps[-1])}
    return documents.as_json({**line, "since_last_line": {"steps": len(steps), **sums}})


def event_line(name: str, **details: Any) -> str:
    """A line of events.jsonl."""
    return documents.as_json({"time": time.time(), "event": name, **details})


@dataclass(frozen=True)
class History:
    """Steps and evaluations are in order, and each occurs once.

    evaluations: those of one measure, whoever made them. others: how many there are beside them, on another set or with
    other settings. unreadable: "FILE line N" of what is no record, as half a line that a killed run left.
    """

    steps: list[Record]
    evaluations: list[Record]
    events: list[Record]
    others: int
    unreadable: list[str]


def read(run_directory: Path) -> History:
    """The records of a run. A resumed run repeats steps: what comes later replaces what it went back over."""
    unreadable: list[str] = []
    steps: list[Record] = []
    evaluations: list[Record] = []
    for record in _lines(run_directory / METRICS, _is_metric, unreadable):
        if record.get("kind") == "step":
            begin = record["step"] - record.get("since_last_line", {"steps": 1})["steps"]
            if steps and begin < steps[-1]["step"]:
                steps = [earlier for earlier in steps if earlier["step"] <= begin]
                evaluations = [earlier for earlier in evaluations if earlier["step"] <= begin]
            steps.append(_with_sums(record, steps[-1]["step"] if steps else 0))
        elif record.get("kind") == "evaluation":
            evaluations = [earlier for earlier in evaluations if earlier["step"] < record["step"]]
            evaluations.append({"headline": FIRST_HEADLINE, **record})
    own = _measure(evaluations[-1]) if evaluations else None
    found = _of_checkpoints(run_directory, steps, unreadable)
    chosen, others = _of_one_measure(evaluations, found, own)
    return History(steps, chosen, _lines(run_directory / EVENTS, _has_time, unreadable), others, unreadable)


def _of_checkpoints(run_directory: Path, steps: Sequence[Record], unreadable: list[str]) -> list[Record]:
    """The results beside the checkpoints that are still there."""
    found = []
    for checkpoint in checkpoints(run_directory):
        step = int(checkpoint.name.removeprefix("step_"))
        try:
            results = result.read(checkpoint)
        except ValueError:
            unreadable.append(f"{checkpoint.name}/{EVALUATION}")
            continue
        epoch = next((record["epoch"] for record in steps if record["step"] >= step), 0)
        records = (_evaluation(step, epoch, item) for item in results)
        found += [record for record in records if _is_evaluation(record)]
    return found


def _of_one_measure(lines: list[Record], found: list[Record], own: tuple | None) -> tuple[list[Record], int]:
    """The evaluations that may be compared: those of the run's own measure, or else of the most frequent one.

    Of one step the result beside the checkpoint counts before the line. Returns also how many others there are.
    """
    if own is None:
        counts = Counter(_measure(record) for record in (*lines, *found))
        own = max(counts, key=lambda measure: counts[measure], default=None)
    everything = [*lines, *found]
    chosen = {record["step"]: record for record in everything if _measure(record) == own}
    others = {(record["step"], _measure(record)) for record in everything if _measure(record) not in (own, None)}
    return [chosen[step] for step in sorted(chosen)], len(others)


def _evaluation(step: int, epoch: int, found: result.Result) -> Record:
    return {"step": step, "epoch": epoch, **found.to_json()}


def _measure(record: Record) -> tuple | None:
    digests = record.get("shards"), record.get("settings")
    return digests if all(isinstance(digest, str) for digest in digests) else None


def _lines(path: Path, is_record: Callable[[Record], bool], unreadable: list[str]) -> list[Record]:
    """The records of a file, one a line; the places of other lines are added to `unreadable`."""
    records = []
    if path.is_file():
        for place, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and is_record(record):
                records.append(record)
            elif line.strip():
                unreadable.append(f"{path.name} line {place}")
    return records


def _is_metric(record: Record) -> bool:
    """Whether a reader can work with the record of a step or an evaluation; one of another kind is not looked at."""
    kind = record.get("kind")
    if kind == "evaluation":
        return _is_evaluation(record)
    return _is_step(record) if kind == "step" else True


def _is_evaluation(record: Record) -> bool:
    metrics, headline = record.get("metrics"), record.get("headline", FIRST_HEADLINE)
    has_scores = isinstance(metrics, dict) and headline in metrics and all(map(_is_amount, metrics.values()))
    return has_scores and _has_counts(record) and _is_span(record.get("seconds"))


def _is_step(record: Record) -> bool:
    losses, parts = record.get("losses"), record.get("parts", FIRST_PARTS)
    sums = record.get("since_last_line", {"steps": 1, **dict.fromkeys(SUMMED, 0)})
    has_sums = isinstance(sums, dict) and all(_is_span(sums.get(name)) for name in ("steps", *SUMMED))
    has_losses = isinstance(parts, list) and isinstance(losses, dict)
    if isinstance(parts, list) and isinstance(losses, dict):
        has_losses = all(isinstance(part, str) and _is_amount(losses.get(part, "")) for part in ("total", *parts))
    has_amounts = all(_is_amount(record.get(name, "")) for name in AMOUNTS) and "skipped" in record
    has_spans = all(_is_span(record.get(name)) for name in SPANS)
    return has_sums and has_losses and has_amounts and has_spans and _has_counts(record)


def _has_counts(record: Record) -> bool:
    return _has_time(record) and all(_is_count(record.get(name)) for name in COUNTS)


def _has_time(record: Record) -> bool:
    return _is_span(record.get("time"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _is_span(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < LATEST


def _is_amount(value: object) -> bool:
    """A number that can be drawn, or marked as not finite: JSON written by others may hold null for that."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    return isinstance(value, int | float) and (value == 0 or 1e-99 < abs(value) < 1e99)


def _with_sums(record: Record, before: int) -> Record:
    """A record with its parts, and sums over the steps that it stands for: in version 0.1 it had none, and they follow
    `before`."""
    count = record["step"] - before
    sums = {"steps": count, **{name: count * record[name] for name in SUMMED}}
    return {"parts": FIRST_PARTS, "since_last_line": sums, **record}
