"""Training over two nodes: network namespaces joined by a virtual cable, one rank in each, two real steps."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.core.runs import SMALL
from tests.launch.nodes import DEVICES, joined, on

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    with joined() as namespaces:
        yield namespaces


def kill(process: subprocess.Popen) -> None:
    """A launcher and its ranks, which are process groups of their own."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            victim.kill()
    process.wait()


def two_steps(shards: Path, output: Path) -> list[str]:
    settings = {"data.train": shards, "train.output": output, "train.batch_size": 4, "train.max_steps": 2}
    settings |= {"train.log_every_steps": 1, "train.evaluate_every_epochs": 0, "monitor.port": 0}
    return ["tiny", *(f"{key}={value}" for key, value in settings.items())]


def assert_two_steps_on_two_ranks(output: Path) -> None:
    (run_directory,) = output.iterdir()
    lines = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2]
    start = json.loads((run_directory / "events.jsonl").read_text().splitlines()[0])
    assert start["ranks"] == 2


@pytest.mark.parametrize("numbered", [True, False], ids=["fixed nodes", "nodes numbered as they come"])
def test_torchrun(numbered: bool, nodes: dict[str, str], synthetic_shards: Path, tmp_path: Path) -> None:
    processes = []
    for rank, (name, device) in enumerate(zip(nodes, DEVICES, strict=True)):
        command = [*on(name), REPOSITORY / "launch/torchrun.sh", "--nodes", "2", "--ranks", "1"]
        command += ["--master", nodes["ddetr-a"] + ":29511"]
        command += ["--node-rank", str(rank)] if numbered else ["--restarts", "0"]
        command += two_steps(synthetic_shards, tmp_path / "runs")
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": device, "TP_SOCKET_IFNAME": device}
        with (tmp_path / f"{name}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
    statuses = [process.wait(timeout=900) for process in processes]
    assert statuses == [0, 0], "".join(log.read_text()[-3000:] for log in tmp_path.glob("*.log"))
    assert_two_steps_on_two_ranks(tmp_path / "runs")


@pytest.mark.parametrize("lost", ["killed", "cut off"])
def test_a_lost_node_is_done_without_and_taken_back(
    lost: str, nodes: dict[str, str], synthetic_shards: Path, tmp_path: Path
) -> None:
    """One of two nodes is gone: the other goes on alone from the newest checkpoint, and with it when it is back."""
    run_directory = tmp_path / "runs/elastic"
    settings = {"data.train": synthetic_shards, "train.output": tmp_path / "runs", "train.name": "elastic"}
    settings |= {"train.batch_size": 4, "train.epochs": 10_000, "train.checkpoint_every_steps": 2, "monitor.port": 0}
    settings |= {"train.evaluate_every_epochs": 0, "train.log_every_steps": 1, "train.keep_checkpoints": 2}
    settings |= {"train.rank_timeout_seconds": 8}
    started = []

    def launch(name: str, device: str) -> subprocess.Popen:
        command = [*on(name), REPOSITORY / "launch/torchrun.sh", "--nodes", "1:2", "--ranks", "1", "--restarts", "5"]
        command += ["--master", nodes["ddetr-a"] + ":29512", "tiny", *SMALL, "train.auto_resume=true"]
        command += [f"{key}={value}" for key, value in settings.items()]
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": device, "TP_SOCKET_IFNAME": device}
        with (tmp_path / f"{name}.{len(started)}.log").open("w") as log:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        started.append(process)
        return process

    def worlds() -> list[tuple[int, int]]:
        """(ranks, steps taken) of each time that the ranks began."""
        events, metrics = run_directory / "events.jsonl", run_directory / "metrics.jsonl"
        if not metrics.is_file():
            return []
        begun = [json.loads(line) for line in events.read_text().splitlines()]
        begun = [event for event in begun if "ranks" in event]
        times = [json.loads(line)["time"] for line in metrics.read_text().splitlines()]
        ends = [*(event["time"] for event in begun[1:]), float("inf")]
        return [
            (event["ranks"], sum(event["time"] <= time < end for time in times))
            for event, end in zip(begun, ends, strict=True)
        ]

    def wait_until(expected: list[int], steps: int) -> None:
        """Until the ranks have begun with so many at a time, and have taken some steps in the last of them."""
        deadline = time.monotonic() + 400
        while True:
            found = worlds()
            if [ranks for ranks, _ in found] == expected and found[-1][1] >= steps:
                return
            logs = "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
            assert time.monotonic() < deadline, f"{found}\n{logs}"
            assert started[0].poll() is None, logs
            time.sleep(0.5)

    try:
        launch("ddetr-a", DEVICES[0])
        other = launch("ddetr-b", DEVICES[1])
        wait_until([2], 5)
        if lost == "killed":
            kill(other)
        else:
            subprocess.run(["ip", "-n", "ddetr-b", "link", "set", DEVICES[1], "down"], check=True)
        wait_until([2, 1], 5)
        if lost == "cut off":
            subprocess.run(["ip", "-n", "ddetr-b", "link", "set", DEVICES[1], "up"], check=True)
            here, there = ((tmp_path / f"{name}.{number}.log").read_text() for number, name in enumerate(nodes))
            # Both nodes see one /proc here: whichever rank gives up first, the other may be seen to have ended.
            said = r"stopping: (nothing was heard of rank 1 on \S+ for 8 s|rank 1 on \S+ died)\nwhere the ranks were"
            assert re.search(said, here), here
            assert "where the ranks met, has not answered for 8 s" in there
            kill(other)  # its launcher would end a minute later
        launch("ddetr-b", DEVICES[1])
        wait_until([2, 1, 2], 5)
    finally:
        for process in started:
            kill(process)
    steps = [json.loads(line)["step"] for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    assert set(range(1, max(steps) + 1)) == set(steps)  # none is left out
    # At most those since a checkpoint, and those taken while it was written, are taken twice.
    assert len(steps) - len(set(steps)) <= 2 * 4


def test_ssh(nodes: dict[str, str], synthetic_shards: Path, tmp_path: Path) -> None:
    """An ssh server in each namespace; DeepSpeed's launcher reaches both through pdsh."""
    for tool in ("/usr/sbin/sshd", "ssh", "ssh-keygen", "pdsh"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is missing: apt-get install openssh-server pdsh")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / key], check=True)
    client = tmp_path / "bin/ssh"  # found first on the PATH, so that no file of the user's is touched
    client.parent.mkdir()
    options = f"-i {tmp_path}/user_key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F none {options} "$@"\n')
    client.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its privileges
    servers = []
    try:
        for (name, address), device in zip(nodes.items(), DEVICES, strict=True):
            configuration = tmp_path / f"{name}.sshd"
            configuration.write_text(
                f"ListenAddress {address}\nHostKey {tmp_path}/host_key\nAuthorizedKeysFile {tmp_path}/user_key.pub\n"
                f"StrictModes no\nPermitRootLogin yes\nPidFile none\nSetEnv GLOO_SOCKET_IFNAME={device}\n"
            )
            servers.append(subprocess.Popen([*on(name), "/usr/sbin/sshd", "-D", "-e", "-f", configuration]))
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in nodes.values()))
        command = [*on("ddetr-a"), REPOSITORY / "launch/ssh.sh", hostfile]
        command += two_steps(synthetic_shards, tmp_path / "runs")
        environment = ENVIRONMENT | {"PATH": f"{client.parent}:{ENVIRONMENT['PATH']}"}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    finally:
        for server in servers:
            server.terminate()
            server.wait()
    assert_two_steps_on_two_ranks(tmp_path / "runs")
