"""Training over two nodes: network namespaces joined by a virtual cable, one rank in each, two real steps."""

import contextlib
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.core.runs import (
    SMALL,
    assert_no_step_is_left_out,
    collect,
    command,
    kill,
    start,
    steps_of_each_start,
    until_restarted,
    wait_for,
)
from tests.launch.nodes import DEVICES, ENVIRONMENT, FIRST, NODES, RAY_TOKEN, SECOND, RayNodes, on, ssh_servers

REPOSITORY = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.slow


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
        command += ["--master", nodes[FIRST] + ":29511"]
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
        command += ["--master", nodes[FIRST] + ":29512", "tiny", *SMALL, "train.auto_resume=true"]
        command += [f"{key}={value}" for key, value in settings.items()]
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": device, "TP_SOCKET_IFNAME": device}
        with (tmp_path / f"{name}.{len(started)}.log").open("w") as log:
            process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)
        started.append(process)
        return process

    def wait_until(expected: list[int], steps: int) -> None:
        """Until the ranks have begun with so many at a time, and have taken some steps in the last of them."""
        deadline = time.monotonic() + 400
        while True:
            found = steps_of_each_start(run_directory)
            if found and [ranks for ranks, _ in found] == expected and found[-1][1] >= steps:
                return
            logs = "".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
            assert time.monotonic() < deadline, f"{found}\n{logs}"
            assert started[0].poll() is None, logs
            time.sleep(0.5)

    try:
        launch(FIRST, DEVICES[0])
        other = launch(SECOND, DEVICES[1])
        wait_until([2], 5)
        if lost == "killed":
            kill(other)
        else:
            subprocess.run(["ip", "-n", SECOND, "link", "set", DEVICES[1], "down"], check=True)
        wait_until([2, 1], 5)
        if lost == "cut off":
            subprocess.run(["ip", "-n", SECOND, "link", "set", DEVICES[1], "up"], check=True)
            here, there = ((tmp_path / f"{name}.{number}.log").read_text() for number, name in enumerate(nodes))
            # Both nodes see one /proc here: whichever rank gives up first, the other may be seen to have ended.
            said = r"stopping: (nothing was heard of rank 1 on \S+ for 8 s|rank 1 on \S+ died)\n +where the ranks were"
            assert re.search(said, here), here
            assert "where the ranks met, has not answered for 8 s" in there
            kill(other)  # its launcher would end a minute later
        launch(SECOND, DEVICES[1])
        wait_until([2, 1, 2], 5)
    finally:
        for process in started:
            kill(process)
    run = collect(run_directory, "", 0)
    assert_no_step_is_left_out(run)
    # At most those since a checkpoint, and those taken while it was written, are taken twice.
    assert len(run.steps) - max(step["step"] for step in run.steps) <= 2 * 4


def test_ssh(nodes: dict[str, str], synthetic_shards: Path, tmp_path: Path) -> None:
    """An ssh server in each namespace; DeepSpeed's launcher reaches both through pdsh."""
    with ssh_servers(nodes, tmp_path) as client:
        hostfile = tmp_path / "hostfile"
        hostfile.write_text("".join(f"{address} slots=1\n" for address in nodes.values()))
        command = [*on(FIRST), REPOSITORY / "launch/ssh.sh", hostfile]
        command += two_steps(synthetic_shards, tmp_path / "runs")
        environment = ENVIRONMENT | {"PATH": f"{client}:{ENVIRONMENT['PATH']}"}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900, check=False
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert_two_steps_on_two_ranks(tmp_path / "runs")


@pytest.fixture
def ray_nodes(nodes: dict[str, str]) -> Iterator[dict[str, subprocess.Popen]]:
    """`ray start` with one CPU in each namespace."""
    with RayNodes(nodes) as started:
        for name in nodes:
            started.start(name)
        yield started.processes


def on_ray(*arguments: object) -> list[str]:
    """`ddetr train` from the first of the two nodes."""
    return [*on(FIRST), *command(1, "tiny", *SMALL, *map(str, arguments), "--ray", NODES[FIRST] + ":6379")]


def test_ray_gives_the_losses_of_torchrun(
    ray_nodes: dict[str, subprocess.Popen], synthetic_shards: Path, tmp_path: Path
) -> None:
    settings = [f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.max_steps=4"]
    line = on_ray(*settings, "train.name=ray", "--ranks", "2")
    environment = ENVIRONMENT | {"RAY_AUTH_TOKEN": RAY_TOKEN["RAY_AUTH_TOKEN"]}  # the mode ddetr finds out by itself
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 on 10.117.0.1, 1 on 10.117.0.2" in result.stdout
    here = command(2, "tiny", *SMALL, *settings, "train.name=torchrun")
    subprocess.run(here, env=ENVIRONMENT, capture_output=True, timeout=300, check=True)
    losses = collect(tmp_path / "ray", "", 0).losses
    assert len(losses) == 4
    assert losses == collect(tmp_path / "torchrun", "", 0).losses


def test_ray_goes_on_without_a_lost_node(
    ray_nodes: dict[str, subprocess.Popen], synthetic_shards: Path, tmp_path: Path
) -> None:
    """Ray dies on one node, and with it the rank there; the run goes on from its checkpoint with one rank."""
    settings = [f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=run", "train.epochs=10000"]
    settings += ["train.auto_resume=true", "train.checkpoint_every_steps=2", "train.keep_checkpoints=2"]
    process = start(
        ["env", *(f"{key}={value}" for key, value in RAY_TOKEN.items()), *on_ray(*settings, "--ranks", "1:2")]
    )
    try:
        wait_for(tmp_path / "run/checkpoints/step_00000002/checkpoint.json", process)
        other = psutil.Process(ray_nodes[SECOND].pid)
        family = [other, *other.children(recursive=True)]
        (rank,) = (member for member in family if "ddetr.launch.lifeline" in member.cmdline())
        for member in family:
            if member not in (rank, *rank.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        assert psutil.wait_procs([rank], timeout=60)[0], "the rank outlives Ray on its node"
        begun = until_restarted(tmp_path / "run", process, 200)
        process.terminate()
        output, _ = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert [ranks for ranks, _ in begun] == [2, 1]
    assert "all ranks start again (restart 1 of 3)" in output
    assert_no_step_is_left_out(collect(tmp_path / "run", "", 0))
