"""Ranks that die, freeze, hang or are slow, as real processes; and how a run that is asked to stop ends."""

import contextlib
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.evaluation import result
from ddetr.core.training.heartbeat import TRY_AGAIN

from tests.core.runs import SMALL, collect, free_port, succeeded, trained, wait_for
from tests.data import file_server
from tests.processes import Command

pytestmark = pytest.mark.integration

HOST = socket.gethostname()


class Ranks:
    """Two ranks without a launcher that would end one after the other."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        port = free_port()
        self.directory = folder / "run"
        self.processes: list[Command] = []
        self.stopped: list[psutil.Process] = []
        arguments = ("tiny", *SMALL, f"train.output={folder}", "train.name=run", "train.epochs=10000", *arguments)
        for rank in range(2):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environment = {name: str(value) for name, value in place.items()}
            self.processes.append(Command("train", *arguments, environment=environment))

    def wait_for_steps(self, number: int) -> None:
        wait_for(self.directory / "metrics.jsonl", self.processes[0], lines=number)

    def end(self, seconds: float, asked: int) -> None:
        """Wait for the end of a run of which one rank was asked to stop."""
        try:
            statuses = [process.wait(seconds) for process in self.processes]
        except subprocess.TimeoutExpired as error:
            raise AssertionError(self.output(0) + self.output(1)) from error
        assert statuses == [0 if rank == asked else TRY_AGAIN for rank in range(2)], self.output(0) + self.output(1)

    def output(self, rank: int) -> str:
        return self.processes[rank].output

    def workers(self, rank: int) -> list[psutil.Process]:
        """The processes that load the rank's data."""
        return psutil.Process(self.processes[rank].pid).children()

    def stop_workers(self, rank: int) -> None:
        """Whoever is stopped does not notice that its rank is gone."""
        self.stopped = self.workers(rank)
        for worker in self.stopped:
            worker.suspend()


@pytest.fixture
def ranks(synthetic_shards: Path, tmp_path: Path) -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(*arguments: str) -> Ranks:
        started.append(Ranks(tmp_path, f"data.train={synthetic_shards}", *arguments))
        return started[-1]

    yield start
    for those in started:
        for process in those.processes:
            process.kill()
        for worker in those.stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_is_killed_is_named(ranks: Callable[..., Ranks], victim: int) -> None:
    """Also the one whose process keeps the store."""
    run = ranks()
    run.wait_for_steps(3)
    run.processes[victim].kill()
    other = 1 - victim
    assert run.processes[other].wait(60) == TRY_AGAIN, run.output(other)
    output = run.output(other)
    assert f"stopping: rank {victim} on {HOST} died" in output
    if victim == 1:  # nobody keeps the beats of a store that died
        assert re.search(rf"  step \d+, \w.* for \d+ s, in .*: rank {victim} on {HOST}\n", output), output
        events = collect(run.directory, "", 0).events
        assert [event["event"] for event in events] == ["start", "ranks_lost"]
        assert events[-1]["reason"] == f"rank 1 on {HOST} died"


def test_a_frozen_rank_is_found_with_its_stack_and_images(ranks: Callable[..., Ranks]) -> None:
    run = ranks("train.rank_timeout_seconds=4")
    run.wait_for_steps(40)  # its second word about itself, a second after the first
    run.processes[1].send_signal(signal.SIGSTOP)
    assert run.processes[0].wait(90) == TRY_AGAIN, run.output(0)
    output = run.output(0)
    assert f"nothing was heard of rank 1 on {HOST} for 4 s" in output
    about = rf"rank 1 on {HOST} \(pid {run.processes[1].pid}, stopped by a signal\), its images \[\d+, \d+\]:\n"
    assert re.search(about + r"(  .*\n)* +core/\w+/\w+\.py:\d+ \w+\n", output), output
    run.processes[1].send_signal(signal.SIGCONT)
    assert run.processes[1].wait(60) == TRY_AGAIN  # it reads what the other one left, or misses it


def test_a_rank_that_gets_no_further_is_told_from_those_that_wait_for_it(ranks: Callable[..., Ranks]) -> None:
    """Its loader hangs: the rank itself lives, and the collective operation of the others would wait for ever."""
    run = ranks("train.collective_timeout_seconds=6", "data.workers=1")
    run.wait_for_steps(3)
    run.stop_workers(1)
    for process in run.processes:
        assert process.wait(90) == TRY_AGAIN, run.output(0)
    output = run.output(0)
    assert "stopping: no rank got any further for 6 s" in output
    assert re.search(rf"waiting for its batch for \d+ s, in .*: rank 1 on {HOST}\n", output), output
    assert re.search(rf"training for \d+ s, in .*distributed.*: rank 0 on {HOST}\n", output), output
    assert f"\n  rank 1 on {HOST} (pid" in output
    assert f"\n  rank 0 on {HOST} (pid" not in output
    assert "stopping: no rank got any further for 6 s" in run.output(1)


@pytest.mark.slow
def test_a_failure_of_one_rank_is_told_to_the_others(ranks: Callable[..., Ranks]) -> None:
    run = ranks("data.workers=1")
    run.wait_for_steps(3)
    for worker in run.workers(1):
        worker.kill()
    for process in run.processes:
        assert process.wait(90) != 0
    assert f"stopping: rank 1 on {HOST} failed in step" in run.output(0)
    assert re.search(r"OSError: a loader process was lost \(pid \d+ killed by SIGKILL\)", run.output(0))


@pytest.mark.slow
def test_a_slow_rank_is_named(ranks: Callable[..., Ranks]) -> None:
    """It is stopped for most of the time, as by another program on its cores."""
    run = ranks("data.workers=0", "train.max_steps=41", "train.checkpoint_every_epochs=0")
    run.wait_for_steps(1)
    done = threading.Event()

    def slow_down() -> None:
        while not done.wait(0.01) and run.processes[1].poll() is None:  # less than a step takes
            run.processes[1].send_signal(signal.SIGSTOP)
            time.sleep(0.2)
            run.processes[1].send_signal(signal.SIGCONT)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        assert [process.wait(1200) for process in run.processes] == [0, 0], run.output(0)
    finally:
        done.set()
        thread.join()
    told = [event["reason"] for event in collect(run.directory, "", 0).events if event["event"] == "slow_rank"]
    assert told
    assert all(reason.startswith(f"rank 1 on {HOST} needs ") for reason in told)
    assert f"rank 1 on {HOST} needs" in run.output(0)
    assert "all wait for it" in run.output(0)


def test_one_signal_to_one_rank_stops_all_though_a_batch_does_not_come(ranks: Callable[..., Ranks]) -> None:
    run = ranks("data.workers=1", "train.checkpoint_every_epochs=0")
    run.wait_for_steps(3)
    run.stop_workers(1)
    run.processes[0].send_signal(signal.SIGUSR1)
    run.end(30, asked=0)
    assert "SIGUSR1: saving after this step" in run.output(0)
    assert load_detector(run.directory).step == collect(run.directory, "", 0).steps[-1]["step"]


def test_an_evaluation_is_left_when_asked_to_stop_and_made_up_for(
    ranks: Callable[..., Ranks], synthetic_shards: Path
) -> None:
    """Also that of the last step, after which nothing else is left to do."""
    settings = [f"data.validation={synthetic_shards}", "data.validation_short_side=800", "eval.batch_size=1"]
    run = ranks(*settings, "train.evaluate_every_epochs=1", "train.max_steps=6")
    wait_for(run.directory / "events.jsonl", run.processes[0], lines=2)  # the checkpoint, then begins the evaluation
    run.processes[1].send_signal(signal.SIGTERM)
    run.end(30, asked=1)
    left = collect(run.directory, run.output(0), 0)
    assert [event["event"] for event in left.events] == ["start", "checkpoint", "stop"], left.output
    assert "the evaluation of step 6 is left for the run that continues this one" in left.output
    checkpoint = run.directory / "checkpoints/step_00000006"
    assert result.read(checkpoint) == []
    succeeded(trained(run.directory, "--resume", run.directory))
    assert len(result.read(checkpoint)) == 1


def test_a_dead_shard_server_is_named(ranks: Callable[..., Ranks], synthetic_shards: Path, tmp_path: Path) -> None:
    announced = tmp_path / "url"
    server = Command(synthetic_shards, announced, program=Path(file_server.__file__))
    try:
        wait_for(announced, server)
        url = announced.read_text()
        run = ranks(f"data.train={url}", "data.fetch=samples", "data.fetch_attempts=2")
        run.wait_for_steps(3)
    finally:
        server.kill()
    statuses = [process.wait(90) for process in run.processes]
    said = run.output(0) + run.output(1)
    assert set(statuses) <= {2, TRY_AGAIN}, said  # both may miss it, or one while the other waits for it
    assert 2 in statuses, said
    for rank, status in enumerate(statuses):
        told = "ddetr: " if status == 2 else rf"rank {1 - rank} on {HOST} failed in step \d+: SourceError: "
        assert re.search(rf"{told}{url}/\S+\.tar: .*; gave up after 2 attempts", run.output(rank)), said
