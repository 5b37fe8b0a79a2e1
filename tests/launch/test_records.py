"""metrics.jsonl and the report on it: every step of a run is counted once, wherever its processes end."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from ddetr.core.config import Config, load
from ddetr.core.evaluation import result
from ddetr.core.evaluation.coco import MEANINGS
from ddetr.core.training.reports import EvaluationReport, FaultReport, SavingReport, StepReport
from ddetr.launch.history import read
from ddetr.launch.record import Record
from ddetr.launch.report import report
from ddetr.launch.train import run

PER_EPOCH = 16


def step_report(step: int, *, skipped: bool = False) -> StepReport:
    """As many images as the number of the step, in as many seconds; a quarter of them is spent waiting."""
    return StepReport(
        step=step,
        epoch=(step - 1) // PER_EPOCH,
        parts=("class", "l1", "giou"),
        losses={"total": 3.0, "class": 1.0, "l1": 1.0, "giou": 1.0},
        learning_rate=1e-4,
        gradient_norm=1.0,
        images=step,
        step_seconds=float(step),
        data_wait_seconds=step / 4,
        own_seconds=0.1,
        skipped=skipped,
        memory_bytes=1,
        loss_scale=1.0,
        class_error=0.0,
        cardinality_error=0.0,
        not_finite="a loss" if skipped else None,
        bad_samples=(),
        slow_ranks=(),
    )


def evaluation_report(step: int, epoch: int) -> EvaluationReport:
    measure, scores = result.Measure("0" * 64, "1" * 64), dict.fromkeys(MEANINGS, 0.5)
    return EvaluationReport(
        step, epoch, result.Result(scores, "AP", 24, 0, 1.0, 1.79e9, step, epoch + 1, "2" * 64, measure)
    )


class Process:
    """One process of a run: its steps up to its end."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.record = Record(folder, config)

    def takes(self, steps: Iterable[int]) -> None:
        for step in steps:
            self.record.observe(step_report(step))

    def saves(self, step: int) -> None:
        self.record.observe(SavingReport(step))

    def ends(self) -> None:
        self.record.__exit__(None, None, None)


@pytest.fixture
def config() -> Config:
    return load("tiny", ["train.log_every_steps=10"])


def counted(folder: Path) -> tuple[int, int, float, float]:
    """Steps, images, seconds and seconds of waiting."""
    run = read(folder)
    assert run.unreadable == []
    sums = [record["since_last_line"] for record in run.steps]
    names = ("steps", "images", "step_seconds", "data_wait_seconds")
    steps, images, seconds, waited = (sum(line[name] for line in sums) for name in names)
    return steps, images, seconds, waited


def lines(folder: Path) -> list[int]:
    return [record["step"] for record in read(folder).steps]


def test_the_last_step_is_there_whatever_log_every_steps_divides(tmp_path: Path, config: Config) -> None:
    for name, steps in (("long", 96), ("short", 8)):
        process = Process(tmp_path / name, config)
        process.takes(range(1, steps + 1))
        process.ends()
        total = steps * (steps + 1) // 2
        assert lines(tmp_path / name)[-1] == steps
        assert counted(tmp_path / name) == (steps, total, total, total / 4)
    assert lines(tmp_path / "long") == sorted({*range(10, 91, 10), *range(16, 97, 16)})  # the epochs' ends, too
    page = report(tmp_path / "long").read_text()
    assert "4\N{THIN SPACE}656" in page  # 1 + 2 + ... + 96 images
    assert "25.0 % waiting for data" in page


def test_stopped_resumed_killed_and_resumed_again(tmp_path: Path, config: Config) -> None:
    """SIGTERM after step 13; SIGKILL after step 34 with a checkpoint of step 25 that was evaluated; the end at 36."""
    process = Process(tmp_path, config)
    process.takes(range(1, 14))
    process.saves(13)
    process.ends()
    assert counted(tmp_path)[:2] == (13, sum(range(1, 14)))

    process = Process(tmp_path, config)
    process.takes(range(14, 26))
    process.saves(25)
    process.record.observe(evaluation_report(25, 1))
    process.takes(range(26, 35))  # and no word after that
    assert lines(tmp_path) == [10, 13, 16, 20, 25, 30, 32]

    process = Process(tmp_path, config)
    process.takes(range(26, 28))
    process.saves(27)
    assert lines(tmp_path) == [10, 13, 16, 20, 25, 27]  # not 30 and 32, which this run went back over
    process.takes(range(28, 37))
    process.ends()
    assert lines(tmp_path) == [10, 13, 16, 20, 25, 27, 30, 32, 36]
    assert counted(tmp_path) == (36, 666, 666.0, 166.5)
    assert [record["step"] for record in read(tmp_path).evaluations] == [25]


def test_a_skipped_step_and_lost_ranks_leave_a_line(tmp_path: Path, config: Config) -> None:
    process = Process(tmp_path, config)
    process.takes(range(1, 4))
    process.record.observe(step_report(4, skipped=True))
    process.takes(range(5, 8))
    process.record.observe(FaultReport(7, "rank 1 is lost"))  # the process ends without another word
    assert lines(tmp_path) == [4, 7]
    assert counted(tmp_path)[:2] == (7, 28)


def test_a_record_with_sums_that_are_none_is_named(tmp_path: Path, config: Config) -> None:
    process = Process(tmp_path, config)
    process.takes([1])
    process.ends()
    file = tmp_path / "metrics.jsonl"
    line = file.read_text()
    for broken in ('"steps": null', '"steps": "1"', '"steps": -1', '"steps": Infinity', '"step": 1'):
        file.write_text(line.replace('"since_last_line": {"steps": 1', f'"since_last_line": {{{broken}'))
        assert read(tmp_path).unreadable == ["metrics.jsonl line 1"]


def test_reports_that_all_should_know_are_events(tmp_path: Path, config: Config) -> None:
    process = Process(tmp_path, config)
    process.record.observe(replace(step_report(1), slow_ranks=("rank 1 on b needs 2.00 s of a step",)))
    report = evaluation_report(1, 0)
    process.record.observe(replace(report, result=replace(report.result, num_not_finite=3)))
    process.ends()
    events = {event["event"]: event for event in read(tmp_path).events}
    assert events["slow_rank"]["reason"] == "rank 1 on b needs 2.00 s of a step"
    assert events["evaluation_not_finite"]["queries"] == 3


def test_a_full_disk_costs_lines_and_not_the_run(tmp_path: Path, config: Config, capsys) -> None:
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    process = Process(tmp_path, config)
    process.takes([1])
    process.ends()
    said = capsys.readouterr().err
    assert 'metrics.jsonl: not written: No space left on device: {"kind": "step"' in said
    assert "metrics.jsonl: its last lines are lost: No space left on device" in said


def test_a_result_that_cannot_be_read_is_named(tmp_path: Path, config: Config) -> None:
    process = Process(tmp_path, config)
    process.takes([1])
    process.ends()
    (folder := tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    (folder / "evaluation.json").write_text("{")
    (line,) = read(tmp_path).unreadable
    assert line.startswith(f"results of step_00000001 ({folder}/evaluation.json")


def test_the_log_goes_to_standard_output_as_long_as_the_run_alone() -> None:
    """A program that trains again, or whose output is elsewhere by then, gets each line once."""
    log = logging.getLogger("ddetr")
    before = list(log.handlers), log.level, log.propagate
    with pytest.raises(ValueError, match=r"data\.train is not set"):
        run(load("tiny"))
    assert (log.handlers, log.level, log.propagate) == before
