"""Checkpoints in the background: what is reported, and what ends a run."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ddetr.core.training.reports import CheckpointReport, Report
from ddetr.core.training.saving import Saver
from ddetr.core.training.world import World


@pytest.fixture
def reports() -> list[Report]:
    return []


@pytest.fixture
def saver(tmp_path: Path, reports: list[Report]) -> Saver:
    return Saver(tmp_path, 1, None, World(0, 1, 0, torch.device("cpu")), reports.append)


def failing(error: Exception) -> Callable[[], Callable[[], Path]]:
    def write() -> Path:
        raise error

    return lambda: write


def test_so_long_and_no_longer_is_waited(saver: Saver, reports: list[Report], tmp_path: Path) -> None:
    go_on = threading.Event()
    saver.wait(60)  # for nothing

    def write() -> Path:
        go_on.wait(60)
        return tmp_path

    saver.begin(lambda: write, 1)
    saver.wait(0.01)
    saver.look()
    assert reports == []
    go_on.set()
    saver.wait(60)
    saver.look()
    (report,) = reports
    assert isinstance(report, CheckpointReport)
    assert (report.step, report.path, report.error) == (1, str(tmp_path), None)


def test_a_disk_that_fails_is_reported_and_a_defect_is_raised(saver: Saver, reports: list[Report]) -> None:
    saver.begin(failing(OSError(28, "No space left on device", "weights")), 1)
    saver.close()
    (report,) = reports
    assert isinstance(report, CheckpointReport)
    assert (report.path, report.error) == ("", "No space left on device: weights")
    saver.begin(failing(KeyError("a defect")), 2)
    with pytest.raises(KeyError, match="a defect"):
        saver.close()


def test_old_checkpoints_that_cannot_be_deleted_prevent_no_save(
    saver: Saver,
    reports: list[Report],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for step in (1, 2):
        (tmp_path / f"checkpoints/step_0000000{step}").mkdir(parents=True)

    def refused(self: Path, target: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "rename", refused)
    with caplog.at_level(logging.ERROR, "ddetr"):
        saver.begin(lambda: lambda: tmp_path, 3)
        saver.close()
    assert "old checkpoints stay: [Errno 13] Permission denied" in caplog.text
    assert [report.error for report in reports if isinstance(report, CheckpointReport)] == [None]
