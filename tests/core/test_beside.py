"""What rank 0 does about evaluations beside training, with a process that answers as it is told to; without Ray."""

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ddetr.core.config import Config, changed, load
from ddetr.core.evaluation import result
from ddetr.core.evaluation.result import Measure, Result
from ddetr.core.progress import Position
from ddetr.core.training import beside
from ddetr.core.training.beside import Beside
from ddetr.core.training.reports import CheckpointReport, EvaluationReport, MissedReport, Report, WaitingReport
from ddetr.core.training.schedule import Schedule

pytestmark = pytest.mark.integration

MEASURE = Measure("a" * 64, "b" * 64)
FOUND = Result({"AP": 0.25}, "AP", 24, 0, 1.5, 1e9, 10, 1, None, MEASURE)
# Reads FOLDER/step_X, which says what becomes of the checkpoint's evaluation; each order uses up one line of it.
PROGRAM = """
    import json, os, sys, time
    from pathlib import Path
    folder = Path(sys.argv[1])
    (folder / "config").write_text(Path(sys.argv[2]).read_text())
    for order in sys.stdin:
        checkpoint = Path(json.loads(order)["checkpoint"])
        with (folder / "orders").open("a") as file:
            file.write(f"{int(checkpoint.name[5:])}\\n")
        file = folder / checkpoint.name
        first, *more = file.read_text().splitlines() if file.exists() else ["done"]
        if file.exists() and more:
            file.write_text("\\n".join(more))
        if first == "die":
            os._exit(7)
        if first == "babble":
            print("no json {", flush=True)
            print('{"kind": "killed"}', flush=True)
            print('{"kind": "failed", "text": 5}', flush=True)
            first = "done"
        if first == "hang":
            time.sleep(60)
        if first == "done":
            (checkpoint / "evaluation.json").write_text((folder / "evaluation.json").read_text())
            print(json.dumps({"kind": "said", "text": "a worker died"}))
            print(json.dumps({"kind": "done", "bad_samples": ["shard 0, image 3: cut off"]}), flush=True)
        elif first == "busy":
            print(json.dumps({"kind": "busy"}), flush=True)
        else:
            kind, again = first.split()
            print(json.dumps({"kind": kind, "text": "so it goes", "again": again == "again"}), flush=True)
"""


class Bench:
    """A run directory and a Beside; each epoch of ten steps is evaluated, six of them make a run."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder, self.config = folder, config
        self.run, self.answers = folder / "run", folder / "answers"
        self.answers.mkdir()
        self.run.mkdir()
        result.write(self.answers, FOUND)
        (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
        self.reports: list[Report] = []
        self.beside: Beside | None = None

    def begin(self, *overrides: str) -> Beside:
        config = changed(self.config, overrides, "the test")
        schedule = Schedule.of(config.train, 10, beside=True)
        command = [sys.executable, str(self.folder / "program.py"), str(self.answers)]
        self.beside = Beside(command, config, self.run, schedule, MEASURE, self.reports.append)
        return self.beside

    def save(self, step: int, *answers: str) -> Path:
        checkpoint = self.run / f"checkpoints/step_{step:08d}"
        checkpoint.mkdir(parents=True)
        position = {"step": step, "epochs": step // 10, "step_in_epoch": step % 10, "steps_per_epoch": 10, "order": ""}
        (checkpoint / "checkpoint.json").write_text(json.dumps({"version": 2, "files": {}, **position}))
        if answers:
            (self.answers / checkpoint.name).write_text("\n".join(answers))
        return checkpoint

    def saved(self, step: int, *answers: str) -> None:
        assert self.beside is not None
        self.beside.observe(CheckpointReport(step, str(self.save(step, *answers)), 1.0, 0.1))

    def until(self, done: Callable[[], Any]) -> None:
        assert self.beside is not None
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline, self.reports
            self.beside.look()
            time.sleep(0.01)

    @property
    def orders(self) -> list[int]:
        file = self.answers / "orders"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    @property
    def evaluated(self) -> list[int]:
        return [report.step for report in self.reports if isinstance(report, EvaluationReport)]

    @property
    def missed(self) -> list[tuple[int, str, bool]]:
        found = [report for report in self.reports if isinstance(report, MissedReport)]
        return [(report.step, report.kind, report.again) for report in found]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(beside, "PAUSES", (0.0, 0.05))
    settings = ["train.epochs=6", "train.evaluate_every_epochs=1", "eval.ray=127.0.0.1:6379", "eval.most_waiting=2"]
    made = Bench(tmp_path, load("tiny", settings))
    yield made
    if made.beside:
        made.beside.close()


def test_results_come_under_the_step_of_their_checkpoint(bench: Bench) -> None:
    bench.begin()
    bench.saved(10)
    bench.saved(15)  # not due
    bench.until(lambda: bench.evaluated)
    waiting, *_, report = [report for report in bench.reports if report != WaitingReport(0)]
    assert waiting == WaitingReport(1)
    assert report == EvaluationReport(10, 0, FOUND, ("shard 0, image 3: cut off",))
    assert bench.orders == [10]
    assert "eval:\n  batch_size" in (bench.answers / "config").read_text()
    assert not bench.beside.held  # type: ignore[union-attr]


def test_a_backlog_is_worked_off_from_the_newest_and_says_what_it_leaves_out(bench: Bench) -> None:
    held = bench.begin()
    bench.save(10, "hang")
    bench.beside.observe(CheckpointReport(10, str(bench.run / "checkpoints/step_00000010"), 1.0, 0.1))  # type: ignore[union-attr]
    for step in (20, 30, 40):
        bench.saved(step)
    assert bench.missed == [(20, "left_out", False)]
    assert {int(path.name[5:]) for path in held.held} == {10, 30, 40}
    bench.until(lambda: bench.orders)
    held._process._process.kill()  # type: ignore[union-attr]
    bench.until(lambda: not held.held)
    assert bench.missed[1:] == [(10, "failed", True), (10, "left_out", False)]  # there is room for two
    assert bench.evaluated == [40, 30]


@pytest.mark.parametrize(
    ("answers", "missed", "is_evaluated"),
    [
        (["die", "done"], [("failed", True)], True),
        (["die"] * 5, [("failed", True), ("failed", True), ("failed", False)], False),
        (["failed again", "failed never"], [("failed", True), ("failed", False)], False),
        (["unreachable again"] * 9 + ["done"], [("unreachable", True)] * 9, True),
        (["busy"] * 9 + ["done"], [], True),
        (["babble"], [], True),
    ],
    ids=["dies once", "dies", "is wrong", "no cluster for long", "a follower is at it", "says what is no answer"],
)
def test_what_fails_is_tried_again(
    answers: list[str], missed: list[tuple[str, bool]], is_evaluated: bool, bench: Bench
) -> None:
    waiting = bench.begin()
    bench.saved(10, *answers)
    bench.until(lambda: not waiting.held)
    assert bench.missed == [(10, *item) for item in missed]
    assert bench.evaluated == [10] * is_evaluated
    assert set(waiting.missing) == set() if is_evaluated else {10}


def test_no_call_waits_for_the_process(bench: Bench) -> None:
    """Nor for one that reads nothing; it is ended with the run."""
    waiting = bench.begin("eval.most_waiting=100", "train.epochs=300")
    bench.saved(10, "hang")
    bench.until(lambda: bench.orders)
    process = waiting._process
    assert process is not None
    for step in range(20, 1000, 10):
        bench.saved(step)
    assert len(waiting.held) == 99
    bench.beside.close()  # type: ignore[union-attr]
    assert process.status is not None


def test_a_resumed_run_makes_up_for_the_newest(bench: Bench) -> None:
    for step in (10, 20, 25, 30, 40):
        bench.save(step)
    result.write(bench.run / "checkpoints/step_00000040", FOUND)
    other = replace(FOUND, measure=Measure("c" * 64, "b" * 64), metrics={"AP": 0.5})
    result.write(bench.run / "checkpoints/step_00000030", other)  # of another set
    waiting = bench.begin()
    assert len(waiting.held) == 3
    bench.until(lambda: not waiting.held)
    assert bench.evaluated == [30, 20]
    assert bench.missed == [(10, "left_out", False)]


def test_after_a_resume_with_other_steps_an_epoch_what_was_due_stays_so(bench: Bench) -> None:
    """The checkpoints are of ten steps an epoch, the run has four now."""
    for step in (10, 14, 20):
        bench.save(step)
    waiting = bench.begin()
    waiting._schedule = Schedule.of(waiting._config.train, 4, Position(20, 2, 0, 10), beside=True)
    bench.until(lambda: not waiting.held)
    found = [(report.step, report.epoch) for report in bench.reports if isinstance(report, EvaluationReport)]
    assert found == [(20, 0), (10, 0)], "their results say one epoch"


@pytest.mark.parametrize(
    ("required", "waited", "missing"),
    [("none", [], []), ("last", [60], []), ("all", [60, 50], [])],
)
def test_the_end_of_a_run_waits_for_what_is_required(
    required: str, waited: list[int], missing: list[int], bench: Bench
) -> None:
    for step in (50, 60):
        bench.save(step)
    waiting = bench.begin(f"eval.required={required}")
    assert waiting.finish(lambda: False) == missing
    assert bench.evaluated == waited
    assert bench.missed == [(step, "left_out", False) for step in (50, 60) if step not in waited]
    assert not waiting.held


@pytest.mark.parametrize(("required", "missing"), [("none", []), ("last", [60]), ("all", [30, 60])])
def test_the_end_of_a_run_tells_what_is_missing(required: str, missing: list[int], bench: Bench) -> None:
    waiting = bench.begin(f"eval.required={required}")
    bench.saved(30, "failed never")
    bench.until(lambda: not waiting.held)
    bench.saved(60, "unreachable again")
    waiting._config = changed(waiting._config, ["eval.wait_minutes=0.01"], "the test")
    assert waiting.finish(lambda: False) == missing
    assert bench.missed[-1] == (60, "left_out", False)


def test_a_signal_ends_the_wait(bench: Bench) -> None:
    waiting = bench.begin()
    bench.saved(60, "hang")
    asked = iter([False, False, True])
    assert waiting.finish(lambda: next(asked)) == [60]


def test_a_folder_that_cannot_be_made_is_a_failure(bench: Bench) -> None:
    waiting = bench.begin()
    (bench.run / "eval").write_text("")
    bench.saved(10)
    bench.until(lambda: not waiting.held)
    assert bench.missed == [(10, "failed", True), (10, "failed", True), (10, "failed", False)]


def test_a_program_that_cannot_be_started_is_a_failure(bench: Bench) -> None:
    waiting = bench.begin()
    waiting._command = ["/no/such/program"]
    bench.saved(10)
    bench.until(lambda: not waiting.held)
    assert bench.missed == [(10, "failed", True), (10, "failed", True), (10, "failed", False)]
