"""How tests start `ddetr train` on a small model, and what such a run leaves."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.processes import Command, finished

# Half a million parameters, everything switched on; batches of 4 of the 24 images of `synthetic_shards`.
SMALL = (
    "model.backbone=test_resnet.r160_in1k",
    "model.hidden_dim=64",
    "model.heads=4",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.feedforward_dim=64",
    "model.queries=12",
    "model.dropout=0.1",
    "data.short_sides=[96]",
    "data.validation_short_side=96",
    "train.batch_size=4",
    "train.epochs=10",
    "train.log_every_steps=1",
    "train.evaluate_every_epochs=0",
    "train.threads=1",
    "train.bandwidth_test_seconds=0",
    "train.precision=fp32",
    "optim.warmup_steps=0",
    "optim.schedule=step",
    "optim.learning_rate=1e-4",
    "monitor.port=0",
)


@dataclass
class Run:
    directory: Path
    output: str
    exit_status: int
    steps: list[dict] = field(default_factory=list)
    events: list[dict] = field(default_factory=list)

    @property
    def losses(self) -> list[float]:
        return [step["losses"]["total"] for step in self.steps]


def trained(directory: Path, *arguments: str | Path, ranks: int = 1, **settings: Any) -> Run:
    """What `ddetr train ARGUMENT...`, which has ended, has left in its run directory."""
    ended = finished("train", *arguments, ranks=ranks, **settings)
    return collect(directory, ended.stdout + ended.stderr, ended.returncode)


def command(ranks: int, *arguments: str) -> list[str]:
    """The command line, for who starts it from the shell."""
    start = [sys.executable, "-m", "ddetr.launch.cli"]
    if ranks > 1:
        start = [sys.executable, "-m", "ddetr.launch.torchrun", "--standalone", f"--nproc-per-node={ranks}", "--"]
    return [*start, "train", *arguments]


def collect(directory: Path, output: str, exit_status: int) -> Run:
    def lines(name: str) -> list[dict]:
        file = directory / name
        return [strict_json(line) for line in file.read_text().splitlines()] if file.is_file() else []

    steps = [line for line in lines("metrics.jsonl") if line["kind"] == "step"]
    return Run(directory, output, exit_status, steps, lines("events.jsonl"))


def strict_json(text: str) -> Any:
    """As every reader but Python's takes it: NaN and Infinity are no JSON (RFC 8259, section 6)."""

    def refused(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refused)


Train = Callable[..., Run]


def succeeded(run: Run) -> Run:
    assert run.exit_status == 0, run.output[-3000:]
    return run


def start(arguments: Sequence[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(path: Path, process: subprocess.Popen[str] | Command, lines: int = 1, seconds: float = 300) -> None:
    """Until `path` exists and, if a file, has so many lines."""
    deadline = time.monotonic() + seconds
    while not path.exists() or (path.is_file() and len(path.read_text().splitlines()) < lines):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline, f"{path} did not appear in {seconds} s"
        time.sleep(0.05)


def steps_of_each_start(run_directory: Path) -> list[tuple[int, int]]:
    """(ranks, steps taken) of each time that the ranks of a run began, also while it runs."""

    def lines(name: str) -> list[dict]:
        file = run_directory / name
        return [json.loads(line) for line in file.read_text().split("\n")[:-1]] if file.is_file() else []

    begun = [event for event in lines("events.jsonl") if "ranks" in event]
    times = [line["time"] for line in lines("metrics.jsonl") if line["kind"] == "step"]
    ends = [*(event["time"] for event in begun), float("inf")][1:]
    return [
        (event["ranks"], sum(event["time"] <= time < end for time in times))
        for event, end in zip(begun, ends, strict=True)
    ]


def until_restarted(run_directory: Path, process: subprocess.Popen[str], seconds: float) -> list[tuple[int, int]]:
    """`steps_of_each_start`, when the ranks have begun a second time and taken three steps."""
    deadline = time.monotonic() + seconds
    while len(begun := steps_of_each_start(run_directory)) < 2 or begun[1][1] < 3:
        assert time.monotonic() < deadline, begun
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    return begun


def assert_no_step_is_left_out(run: Run) -> None:
    """Those since a checkpoint may have been taken twice."""
    steps = {step["step"] for step in run.steps}
    assert steps == set(range(1, max(steps) + 1))


def kill(process: subprocess.Popen | Command) -> None:
    """A process and all that it started, such as a launcher's ranks, which are process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.kill()
    process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
