"""`ddetr train --ray`: the ranks of a run on a Ray cluster. Two nodes with addresses of their own: test_nodes.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from ddetr.launch.placement import Request

from tests.core.runs import (
    SMALL,
    assert_no_step_is_left_out,
    collect,
    command,
    start,
    succeeded,
    until_restarted,
    wait_for,
)
from tests.launch.nodes import two_ray_nodes

GPU_NODES = [{"GPU": 4.0, "CPU": 32.0}, {"GPU": 2.0, "CPU": 32.0}]
CPU_NODES = [{"CPU": 8.0}, {"CPU": 4.0}, {"memory": 1e9}]


@pytest.mark.parametrize(
    ("request_", "nodes", "expected"),
    [
        (Request(6, 6, "GPU", 0, 6), GPU_NODES, [{"GPU": 1}] * 6),
        (Request(7, 7, "GPU", 0, 7), GPU_NODES, []),
        (Request(2, 8, "GPU", 0, 32), GPU_NODES, [{"GPU": 1}] * 4),  # 6 fit, but 32 images divide among 4
        (Request(5, 8, "GPU", 0, 32), GPU_NODES, [{"GPU": 1}] * 6),  # none divides: the rank says so
        (Request(3, 3, "CPU", 0, 3), CPU_NODES, [{"CPU": 4}] * 3),  # an equal share
        (Request(12, 12, "CPU", 0, 12), CPU_NODES, [{"CPU": 1}] * 12),
        (Request(13, 13, "CPU", 0, 13), CPU_NODES, []),
        (Request(2, 2, "CPU", 3, 2), CPU_NODES, [{"CPU": 3}] * 2),  # train.threads=3
        (Request(4, 4, "CPU", 3, 4), CPU_NODES, []),  # 2 on the first node, 1 on the second
        (Request(1, 1, "CPU", 0, 1), [], []),
    ],
)
def test_ranks_that_a_cluster_holds(request_: Request, nodes: list[dict[str, float]], expected: list[dict]) -> None:
    assert request_.bundles(nodes) == expected


def ddetr_train(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "ddetr.launch.cli", "train", "tiny", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "2", "--wait", "9"], "--ranks, --wait: only with --ray"),
        (["--ray", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
    ],
)
def test_mistakes_before_ray_are_one_message(arguments: list[str], message: str) -> None:
    result = ddetr_train(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith(f"ddetr: {message}")
    assert len(result.stderr.splitlines()) == 1


def ranks_of(name: str) -> list[psutil.Process]:
    """The processes of the ranks of a run that a test has started, found by what Ray's workers gave them."""
    found = []
    for process in psutil.process_iter():
        try:
            if "ddetr.launch.lifeline" in process.cmdline() and process.environ().get("DDETR_TEST") == name:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return sorted(found, key=lambda process: process.environ()["RANK"])


@pytest.mark.slow
class TestCluster:
    """One Ray on this machine of two nodes with a CPU each; the first offers GPUs, but its ranks find none."""

    @pytest.fixture(scope="class")
    def address(self) -> Iterator[str]:
        os.environ["DDETR_TEST"] = "cluster"  # for Ray's workers and the ranks that they start
        try:
            with two_ray_nodes(num_gpus=2) as address:
                yield address
        finally:
            del os.environ["DDETR_TEST"]

    @pytest.fixture
    def line(self, address: str, synthetic_shards: Path, tmp_path: Path) -> Iterator[Callable[..., list[str]]]:
        """The command `ddetr train` of a run in the folder `run` on this cluster."""

        def make(*arguments: str) -> list[str]:
            where = (f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=run")
            return command(1, "tiny", *SMALL, *where, "--ray", address, *arguments)

        yield make
        assert not ranks_of("cluster"), "a rank outlives its run"

    def test_losses_equal_torchruns(self, line: Callable, synthetic_shards: Path, tmp_path: Path) -> None:
        result = subprocess.run(
            line("--ranks", "2", "train.device=cpu", "train.max_steps=4"),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        on_ray = succeeded(collect(tmp_path / "run", result.stdout + result.stderr, result.returncode))
        assert "2 rank(s) with 1 CPU each, 1 on " in result.stdout, "one rank on each node"
        where = (f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=torchrun")
        line_ = command(2, "tiny", *SMALL, *where, "train.device=cpu", "train.max_steps=4")
        subprocess.run(line_, capture_output=True, timeout=300, check=True)
        assert on_ray.losses == collect(tmp_path / "torchrun", "", 0).losses
        assert len(on_ray.losses) == 4
        assert on_ray.events[0]["ranks"] == 2

    def test_ranks_of_a_node_see_all_its_gpus_and_stop_together(self, line: Callable, tmp_path: Path) -> None:
        process = start(line("train.epochs=10000", "train.checkpoint_every_epochs=0"))  # by default a rank for each GPU
        try:
            wait_for(tmp_path / "run/metrics.jsonl", process, lines=3)
            places = [rank.environ() for rank in ranks_of("cluster")]
            names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES")
            assert [[place[name] for name in names] for place in places] == [
                ["0", "2", "0", "2", "0,1"],
                ["1", "2", "1", "2", "0,1"],
            ]
            process.send_signal(signal.SIGTERM)
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        stopped = succeeded(collect(tmp_path / "run", output, process.returncode))
        assert f"saved {tmp_path}/run/checkpoints/step_{len(stopped.steps):08d}" in output
        assert stopped.events[-1]["event"] == "stop"

        line_ = line("--ranks", "2", "train.auto_resume=true", f"train.max_steps={len(stopped.steps) + 2}")
        result = subprocess.run(line_, capture_output=True, text=True, timeout=300, check=False)
        resumed = succeeded(collect(tmp_path / "run", result.stdout + result.stderr, result.returncode))
        assert [step["step"] for step in resumed.steps] == list(range(1, len(stopped.steps) + 3))

    def test_a_killed_rank_restarts_all_from_the_newest_checkpoint(self, line: Callable, tmp_path: Path) -> None:
        process = start(
            line("--ranks", "2", "train.auto_resume=true", "train.epochs=10000", "train.checkpoint_every_steps=2")
        )
        try:
            wait_for(tmp_path / "run/checkpoints/step_00000002/checkpoint.json", process)
            ranks_of("cluster")[1].send_signal(signal.SIGKILL)
            begun = until_restarted(tmp_path / "run", process, 120)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 0, output
        assert [ranks for ranks, _ in begun] == [2, 2]
        assert "was killed by SIGKILL; all ranks start again (restart 1 of 3)" in output
        assert_no_step_is_left_out(collect(tmp_path / "run", "", 0))

    def test_without_auto_resume_a_killed_rank_ends_the_run(self, line: Callable, tmp_path: Path) -> None:
        process = start(line("--ranks", "2", "train.epochs=10000"))
        try:
            wait_for(tmp_path / "run/metrics.jsonl", process)
            ranks_of("cluster")[0].send_signal(signal.SIGKILL)
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 1
        assert "rank 0 on " in output
        assert "was killed by SIGKILL; with train.name=NAME train.auto_resume=true it would go on" in output

    def test_a_second_signal_kills(self, line: Callable, tmp_path: Path) -> None:
        process = start(line("--ranks", "2", "train.epochs=10000", "train.checkpoint_every_epochs=0"))
        try:
            wait_for(tmp_path / "run/metrics.jsonl", process)
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.1)  # two that wait to be delivered would be one
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert process.returncode == 130, output

    def test_mistakes_are_told_once(self, line: Callable, tmp_path: Path) -> None:
        for arguments, message in (
            (["--ranks", "2", f"data.train={tmp_path}/absent"], f"{tmp_path}/absent: no such folder"),
            (["--ranks", "5", "--wait", "1"], "5 rank(s) with 1 GPU each asked for, but the Ray cluster has 2 node(s)"),
            (["--ranks", "two"], "--ranks two: expected a number of ranks"),
        ):
            result = subprocess.run(
                line(*arguments, "train.auto_resume=true"), capture_output=True, text=True, timeout=300, check=False
            )
            assert result.returncode == 2, result.stdout + result.stderr
            assert result.stderr.startswith("ddetr: ")
            assert result.stderr.count(message) == 1
            assert "start again" not in result.stdout
            assert "Traceback" not in result.stderr
        assert not (tmp_path / "run").exists()

    def test_resume_and_dry_run(self, line: Callable, address: str, tmp_path: Path) -> None:
        result = subprocess.run(line("--dry-run"), capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        assert "2 rank(s) with 1 GPU each" in result.stdout
        assert "images: 6 steps of 4 images per epoch" in result.stdout
        assert not (tmp_path / "run").exists()
        subprocess.run(line("--ranks", "1", "train.max_steps=2"), capture_output=True, timeout=300, check=True)
        line_ = command(1, "--resume", str(tmp_path / "run"), "train.max_steps=3", "--ray", address, "--ranks", "2")
        result = subprocess.run(line_, capture_output=True, text=True, timeout=300, check=False)
        assert result.returncode == 0, result.stderr
        assert [step["step"] for step in collect(tmp_path / "run", "", 0).steps] == [1, 2, 3]
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["train"]["auto_resume"]
