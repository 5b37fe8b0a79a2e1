"""`ddetr eval --submit`: jobs of a real Ray cluster with its job server."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ddetr.core.checkpoint import contents
from ddetr.core.config import Config, changed
from ddetr.core.evaluation import result
from ddetr.launch import jobs
from ddetr.launch.evaluate import evaluate

from tests.processes import finished

pytestmark = pytest.mark.integration


def test_commands_as_they_are_on_any_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = ["data.validation=shards/val", "data.cache=cache", "eval.top_k=5", "data.train=https://host/train"]
    assert jobs._from_anywhere(given, changed(Config(), given, "the test")) == [
        f"data.validation={tmp_path}/shards/val",
        f"data.cache={tmp_path}/cache",
        "eval.top_k=5",
        "data.train=https://host/train",
    ]


@pytest.mark.parametrize(
    ("path", "what", "name"),
    [
        ("runs/first", 1234, "ddetr-eval-first-step1234"),
        ("runs/first/checkpoints/step_00001234", 1234, "ddetr-eval-first-step1234"),
        ("runs/with space é;$(x)", "all", "ddetr-eval-with-space-x--all"),
        ("weights/r50.pth", None, "ddetr-eval-r50.pth-weights"),
    ],
)
def test_the_name_of_a_job_says_run_and_step(path: str, what: str | int | None, name: str) -> None:
    assert jobs._name(Path(path), what) == name


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--submit"], "--submit needs the address of a Ray cluster: --ray HOST:PORT"),
        (["--wait"], "--wait: only with --submit"),
        (["--submit", "--ray"], "a job needs a Ray cluster that stays"),
        (["--submit", "--ray", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1"),
        (["--data", "a/val", "--data", "b/val"], "--data a/val and b/val: both would be called val"),
        (["--submit", "--ray", "127.0.0.1:1", "data.validaton=x"], "data.validation"),
    ],
)
def test_mistakes_are_named(arguments: list[str], said: str, run_directory: Path) -> None:
    done = finished("eval", run_directory, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """The address of a cluster of one node with a job server, whose shell finds this Python as `python`."""
    ports = []
    for _ in range(4):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            ports.append(probe.getsockname()[1])
    folder = tempfile.mkdtemp(prefix="ray-")
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_RAY_CLUSTER": "0"}
    command = ["ray", "start", "--head", "--block", "--num-cpus=2", f"--port={ports[0]}", f"--temp-dir={folder}/ray"]
    command += [f"--dashboard-port={ports[1]}", f"--dashboard-agent-listen-port={ports[2]}"]
    command += [
        "--node-ip-address=127.0.0.1",
        f"--ray-client-server-port={ports[3]}",
        f"--object-store-memory={100 << 20}",
    ]
    with open(f"{folder}/log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert process.poll() is None, Path(f"{folder}/log").read_text()
            assert time.monotonic() < deadline
            try:
                socket.create_connection(("127.0.0.1", ports[1]), 1).close()
                break
            except OSError:
                time.sleep(0.3)
        yield f"127.0.0.1:{ports[0]}"
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.slow
class TestJobs:
    def test_it_is_submitted_listed_and_joined(
        self, head: str, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ray.job_submission import JobSubmissionClient

        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what is on the command line counts
        run = tmp_path / "run"
        shutil.copytree(run_directory, run)
        (run / "checkpoints/step_00000020/evaluation.json").unlink(missing_ok=True)
        expected = evaluate(run_directory, [], output=tmp_path / "here")
        began = time.monotonic()
        submitted = finished("eval", run, "--ray", head, "--submit")
        assert submitted.returncode == 0, submitted.stderr
        (job,) = submitted.stdout.split()
        assert job.startswith("ddetr-eval-run-step20-")
        joined = finished("eval", run, "--ray", head, "--submit", "--wait")
        assert time.monotonic() - began < 300
        assert joined.returncode == 0, joined.stderr
        assert joined.stdout.split()[0] == job, "the same command that runs is joined"
        assert "AP50" in joined.stdout
        (found,) = result.read(run / "checkpoints/step_00000020")
        assert found.metrics == expected
        for name in ("detections.json", "ground_truth.json"):
            assert (run / "eval/step_00000020" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
        monkeypatch.delenv("RAY_ADDRESS")
        (listed,) = JobSubmissionClient(head).list_jobs()
        assert (listed.submission_id, listed.status) == (job, "SUCCEEDED")
        again = finished("eval", run, "--ray", head, "--submit")
        assert again.stdout.strip() != job, "it has ended"
        stopped = subprocess.run(
            ["ray", "job", "stop", again.stdout.strip(), "--address", head],
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert stopped.returncode == 0, stopped.stderr

    def test_several_sets_in_one_job_and_a_failure_is_one(self, head: str, run_directory: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        shutil.copytree(run_directory, run)
        own = Path(str(contents(run_directory).config.data.validation))
        second = tmp_path / "second"
        shutil.copytree(own, second)
        sets = ["--data", own, "--data", second]
        done = finished("eval", run, *sets, "--ray", head, "--submit", "--wait")
        assert done.returncode == 0, done.stdout + done.stderr
        for place in (own, second):
            expected = evaluate(run_directory, [], data=[place], output=tmp_path / f"here-{place.name}")
            (found,) = result.read(run / "eval/step_00000020" / place.name)
            assert found.metrics == expected
        failed = finished("eval", run, "--data", tmp_path / "missing", "--ray", head, "--submit", "--wait")
        assert failed.returncode == 2
        assert "missing: no such folder" in failed.stdout
        assert "has ended as FAILED" in failed.stderr
