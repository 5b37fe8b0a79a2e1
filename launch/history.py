"""The history of a run: metrics.jsonl and events.jsonl, written and read, and the scores of its checkpoints."""

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..core.checkpoint.weights import STEP, WEIGHTS
from ..core.evaluation import result, tally
from ..core.training.reports import EvaluationReport, StepReport
from ..data import documents
from ..data.protocols import PROTOCOLS
from ..data.text import visible

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
SUMMED = ("images", "step_seconds", "data_wait_seconds")  # over the steps that a line stands for
FIRST_PARTS, FIRST_HEADLINE = ["class", "l1", "giou"], "AP"  # of lines of the first release, which do not say

COUNTS = ("step", "epoch", "images")  # what a step and an evaluation both have, besides their time
AMOUNTS = ("learning_rate", "gradient_norm", "loss_scale", "memory_bytes")
SPANS = ("step_seconds", "data_wait_seconds")
MOST_PARTS, MOST_LOSSES = 32, 4096  # of a loss, and its parts in all layers
_LAST_BYTES = 1 << 16  # of events.jsonl, in which the newest event stands
LATEST = 4e9  # seconds since 1970: what is later is no time of a run

Entry = dict[str, Any]


def evaluation_line(report: EvaluationReport) -> str:
    """A line of metrics.jsonl. What is not finite is null in it."""
    return documents.as_json({"kind": "evaluation", **_evaluation(report.step, report.epoch, report.result)})


def last_event(run_directory: Path) -> Entry:
    """The newest event of a run; empty where there is none that can be read."""
    file = run_directory / EVENTS
    if not file.is_file():
        return {}
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _LAST_BYTES))
        lines = opened.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError):
            entry = json.loads(line)
            if isinstance(entry, dict) and _has_time(entry):
                return entry
    return {}


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
    """The recorded entries of a run. Steps and evaluations are in order, and each occurs once.

    evaluations: those of one measure, of the run or `ddetr eval`. others: how many more there are, on another set or
    with other settings. unreadable: "FILE line N" of what is no record, as half a line that a killed run left.
    """

    steps: list[Entry]
    evaluations: list[Entry]
    events: list[Entry]
    others: int
    unreadable: list[str]


def read(run_directory: Path) -> History:
    """Read the entries of a run. A resumed run repeats steps: later entries replace those that it went back over."""
    unreadable: list[str] = []
    steps: list[Entry] = []
    evaluations: list[Entry] = []
    for entry in _lines(run_directory / METRICS, _is_metric, unreadable):
        if entry.get("kind") == "step":
            begin = entry["step"] - entry.get("since_last_line", {"steps": 1})["steps"]
            if steps and begin < steps[-1]["step"]:
                steps = [earlier for earlier in steps if earlier["step"] <= begin]
                evaluations = [earlier for earlier in evaluations if earlier["step"] <= begin]
            steps.append(_with_sums(entry, steps[-1]["step"] if steps else 0))
        elif entry.get("kind") == "evaluation":
            evaluations = [earlier for earlier in evaluations if earlier["step"] != entry["step"]]
            evaluations.append({"headline": FIRST_HEADLINE, "protocol": "coco", **entry})
    chosen, others = _of_one_measure(evaluations, _results(run_directory, steps, unreadable))
    return History(steps, chosen, _lines(run_directory / EVENTS, _has_time, unreadable), others, unreadable)


def _results(run_directory: Path, steps: Sequence[Entry], unreadable: list[str]) -> list[Entry]:
    """The results of all checkpoints, also of deleted ones."""
    found = []
    folders = [*run_directory.glob("checkpoints/step_*"), *run_directory.glob("eval/step_*")]
    for name in sorted({folder.name for folder in folders if STEP.fullmatch(folder.name)}):
        try:
            results = result.known(run_directory / "checkpoints" / name / WEIGHTS)
        except (OSError, ValueError) as error:  # deleted meanwhile, or not ours to read
            unreadable.append(f"results of {name} ({visible(str(error))})")
            continue
        step = int(name.removeprefix("step_"))
        for item in results:
            before = max(0, (item.epochs or 1) - 1)
            epoch = next((entry["epoch"] for entry in steps if entry["step"] >= step), before)
            if _is_evaluation(entry := _evaluation(step, epoch, item)):
                found.append(entry)
    return found


def _of_one_measure(lines: list[Entry], found: list[Entry]) -> tuple[list[Entry], int]:
    """The evaluations that are compared, one a step, and how many others there are.

    A result counts before the line of its step, unless it is of the first release, which recorded less of it.
    """
    own = _measure(lines[-1]) if lines else None
    measures = result.counted(own, (_measure(entry) for entry in (*lines, *found)))
    chosen = {entry["step"]: entry for entry in found if _measure(entry) in measures and entry["weights"] is None}
    chosen |= {entry["step"]: entry for entry in lines if _measure(entry) in measures}
    chosen |= {entry["step"]: entry for entry in found if _measure(entry) in measures and entry["weights"] is not None}
    others = {(entry["step"], _measure(entry)) for entry in (*lines, *found) if _measure(entry) not in measures}
    return [chosen[step] for step in sorted(chosen)], len(others)


def _evaluation(step: int, epoch: int, found: result.Result) -> Entry:
    return {**found.to_json(), "step": step, "epoch": epoch}


def _measure(entry: Entry) -> result.Measure | None:
    shards, settings = entry.get("shards"), entry.get("settings")
    return result.Measure(shards, settings) if isinstance(shards, str) and isinstance(settings, str) else None


def _lines(path: Path, is_entry: Callable[[Entry], bool], unreadable: list[str]) -> list[Entry]:
    """The entries of a file, one a line; the places of other lines are added to `unreadable`."""
    entries = []
    if path.is_file():
        for place, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                entry = None
            if isinstance(entry, dict) and is_entry(entry):
                entries.append(entry)
            elif line.strip():
                unreadable.append(f"{path.name} line {place}")
    return entries


def _is_metric(entry: Entry) -> bool:
    """Whether a reader can work with the entry of a step or an evaluation; one of another kind is not looked at."""
    kind = entry.get("kind")
    if kind == "evaluation":
        return _is_evaluation(entry)
    return _is_step(entry) if kind == "step" else True


def _is_evaluation(entry: Entry) -> bool:
    metrics, headline = entry.get("metrics", {}), entry.get("headline", FIRST_HEADLINE)
    has_scores = _are_amounts(metrics, tally.MOST_SCORES) and isinstance(headline, str) and headline in metrics
    has_scores = has_scores and entry.get("protocol", "coco") in PROTOCOLS and _is_count(entry.get("top_k") or 0)
    return has_scores and _has_counts(entry) and _is_span(entry.get("seconds"))


def _is_step(entry: Entry) -> bool:
    losses, parts = entry.get("losses", {}), entry.get("parts", FIRST_PARTS)
    sums = entry.get("since_last_line", {"steps": 1, **dict.fromkeys(SUMMED, 0)})
    has_sums = isinstance(sums, dict) and all(_is_span(sums.get(name)) for name in ("steps", *SUMMED))
    has_parts = isinstance(parts, list) and len(parts) <= MOST_PARTS and all(isinstance(part, str) for part in parts)
    has_losses = has_parts and _are_amounts(losses, MOST_LOSSES) and all(part in losses for part in ("total", *parts))
    has_amounts = all(_is_amount(entry.get(name, "")) for name in AMOUNTS) and "skipped" in entry
    has_spans = all(_is_span(entry.get(name)) for name in SPANS)
    return has_sums and has_losses and has_amounts and has_spans and _has_counts(entry)


def _are_amounts(values: Any, most: int) -> bool:
    """At most so many numbers, under names that can be shown."""
    if not isinstance(values, dict) or len(values) > most:
        return False
    return all(len(name) <= tally.LONGEST_SCORE and _is_amount(value) for name, value in values.items())


def _has_counts(entry: Entry) -> bool:
    return _has_time(entry) and all(_is_count(entry.get(name)) for name in COUNTS)


def _has_time(entry: Entry) -> bool:
    return _is_span(entry.get("time"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _is_span(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < LATEST


def _is_amount(value: object) -> bool:
    """A number that can be drawn, or marked as not finite: JSON written by others may hold null for that."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    return isinstance(value, int | float) and (value == 0 or 1e-99 < abs(value) < 1e99)


def _with_sums(entry: Entry, before: int) -> Entry:
    """With its parts, and sums over the steps that it stands for.

    In version 0.1 it had none, and they follow `before`.
    """
    count = entry["step"] - before
    sums = {"steps": count, **{name: count * entry[name] for name in SUMMED}}
    return {"parts": FIRST_PARTS, "since_last_line": sums, **entry}
