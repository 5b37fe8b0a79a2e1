"""What a rank still does when the store of heartbeats or its log is lost; faults of whole runs: test_faults.py."""

import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ddetr.core.config import TrainConfig
from ddetr.core.training import heartbeat
from ddetr.core.training.heartbeat import TRY_AGAIN, Watch
from ddetr.core.training.verdict import Identity
from ddetr.core.training.world import World

from tests.core.runs import free_port


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Of rank 1 of two, as it is after it has entered; its store is gone."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    world = World(1, 2, 1, torch.device("cpu"))
    watch = Watch(world, TrainConfig(rank_timeout_seconds=1), lambda line: None, lambda seconds: None)
    watch._identities = [Identity(host, number, host) for number, host in enumerate("ab")]
    watch._prefix, watch._heard, watch._exchanged = "run", {0: (b"", 0.0)}, time.monotonic()
    return watch


@pytest.mark.parametrize("heard_seconds_ago", [0, 60])
def test_a_failure_of_a_rank_without_a_store_ends_it_all_the_same(
    watch: Watch, heard_seconds_ago: int, caplog: pytest.LogCaptureFixture
) -> None:
    watch._exchanged -= heard_seconds_ago
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING, "ddetr"):
        watch.__exit__(OSError, OSError("lost"), None)
    assert ("the other ranks cannot be told: " in caplog.text) == (heard_seconds_ago == 0), "then it is not even tried"
    assert time.monotonic() - begin < 20


class Hanging(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.go_on.wait(60)


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    """The log of a run on storage that does not answer."""
    handler, log = Hanging(), logging.getLogger("ddetr")
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)
    handler.go_on.set()


def test_the_last_words_go_to_the_terminal_where_the_log_hangs(
    watch: Watch, hanging: Hanging, monkeypatch, capfd
) -> None:
    def end(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(heartbeat, "_LAST_WORDS_SECONDS", 0.1)
    monkeypatch.setattr(heartbeat.os, "_exit", end)
    with pytest.raises(SystemExit) as ended:
        watch._give_up("rank 0 on a is lost\x1b[31m\nits stack")
    assert ended.value.code == TRY_AGAIN
    said = r"stopping, and the log cannot be written: rank 0 on a is lost\x1b[31m"
    assert said in capfd.readouterr().err.splitlines(), "the rest is for rank 0 to say"
    watch._give_up("rank 0 on a is lost")  # once is enough
    assert "stopping" not in capfd.readouterr().err


def test_without_namespaces_no_two_processes_are_taken_for_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    assert heartbeat._machine() == heartbeat._machine()
    assert heartbeat._machine().endswith(os.readlink("/proc/self/ns/pid"))
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert heartbeat._machine() != heartbeat._machine()
