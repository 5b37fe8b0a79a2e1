"""The head of a Ray cluster is lost in the middle of evaluations, and comes back with the state that Redis has kept."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ddetr.core.evaluation import result
from ddetr.launch.evaluate import evaluate

from tests.core.runs import kill
from tests.launch.nodes import FIRST, NODES, SECOND, joined, named, need, on

pytestmark = pytest.mark.slow
AWAY_SECONDS = 15.0
IMPATIENT_SECONDS = 5
SHARD_SECONDS = 4
REDIS = f"{NODES[SECOND]}:6380"


@dataclass
class Program:
    """A started command line; its output is in a file."""

    process: subprocess.Popen[bytes]
    output: Path

    def says(self, text: str) -> bool:
        assert self.process.poll() in (None, 0), self.output.read_text()
        return text in self.output.read_text()


class Pod:
    """A network namespace with a PID namespace, whose first process the kernel ends together with all others."""

    def __init__(self, node: str, folder: Path) -> None:
        self.folder = folder  # of all pods
        alone = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", "echo up; exec sleep inf"]
        self._outside = subprocess.Popen([*on(node), *alone], stdout=subprocess.PIPE)
        assert self._outside.stdout is not None
        assert self._outside.stdout.readline() == b"up\n"
        (self._first,) = (child.pid for child in psutil.Process(self._outside.pid).children())

    def start(self, name: str, *command: str | Path, **variables: str) -> Program:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64, "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"HOME": str(self.folder), **variables}
        enter = ["nsenter", "--target", str(self._first), "--pid", "--mount", "--net"]
        output = self.folder / f"{name}.log"
        with output.open("wb") as log:
            process = subprocess.Popen(
                [*enter, *command], env=environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        return Program(process, output)

    def process(self, name: str) -> psutil.Process:
        """The one with this name."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                same = os.readlink(f"/proc/{process.pid}/ns/pid") == os.readlink(f"/proc/{self._first}/ns/pid")
                found += [process] * (same and process.name() == name)
        (process,) = found
        return process

    def end(self) -> None:
        kill(self._outside)


class Cluster:
    """A head that offers nothing, as in launch/kubernetes/ray.yaml, and a node with two workers, where Redis runs."""

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder, self.shards = folder, shards
        self.pods: list[Pod] = []
        self.programs: list[Program] = []

    def start(self) -> None:
        self.node = self._pod(SECOND)
        host, port = REDIS.split(":")
        line = f"redis-server --bind {host} --port {port} --requirepass secret --dir {self.folder}"
        self._up(self._started(self.node, "redis", line), "Ready to accept connections")
        self.start_head("head")
        line = "ray start --address=node0:6379 --num-cpus=4"
        self.raylet = self._up(self._started(self.node, "raylet", self._ray(line, "node")), "Ray runtime started")

    def start_head(self, name: str) -> None:
        self.head = self._pod(FIRST)
        line = "ray start --head --port=6379 --num-cpus=0 --include-dashboard=false --redis-password=secret"
        variables = {"RAY_REDIS_ADDRESS": REDIS, "RAY_external_storage_namespace": "ddetr-ray"}
        self.command = self._started(self.head, name, self._ray(line, name), **variables)
        self._up(self.command, "Ray runtime started")

    def evaluation(
        self, name: str, *arguments: str | Path, data: Path | None = None, pace: int = 0, **variables: str
    ) -> Program:
        """`ddetr eval`, started on the node. Each shard leaves a file when it is begun.

        Then it takes until the file `lost` is there, and `pace` seconds.
        """
        began = self.folder / f"{name}.shards"
        began.mkdir()
        wait = f"touch {began}/$1; until [ -e {self.folder}/lost ]; do sleep 0.1; done; sleep {pace}"
        script = self.folder / f"{name}.sh"
        script.write_text(f"case $1 in *.tar) {wait};; esac; cat {data or self.shards}/$1\n")
        source = ("--data", f"pipe:sh {script} {{}}", f"data.cache={self.folder}/{name}.cache")
        command = (sys.executable, "-m", "ddetr.launch.cli", "eval", *arguments, *source)
        self.programs.append(self.node.start(name, *command, **variables))
        return self.programs[-1]

    def num_begun(self, name: str) -> int:
        return len(list((self.folder / f"{name}.shards").iterdir()))

    def end(self) -> None:
        for pod in reversed(self.pods):
            pod.end()
        for program in self.programs:
            kill(program.process)

    def _ray(self, line: str, name: str) -> str:
        return f"{line} --object-store-memory=100000000 --temp-dir={self.folder}/{name} --block"

    def _pod(self, node: str) -> Pod:
        self.pods.append(Pod(node, self.folder))
        return self.pods[-1]

    def _started(self, pod: Pod, name: str, line: str, **variables: str) -> Program:
        self.programs.append(pod.start(name, *line.split(), **variables))
        return self.programs[-1]

    def _up(self, program: Program, text: str) -> Program:
        wait_until(lambda: program.says(text))
        return program


def wait_until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@dataclass
class Outcome:
    """What has become of the evaluations; their results are in `folder`, by name."""

    folder: Path
    status: dict[str, int]
    text: dict[str, str]
    num_meanwhile: int  # shards that `patient` began while there was no head


@pytest.fixture(scope="module")
def outcome(run_directory: Path) -> Iterator[Outcome]:
    """The head's GCS is killed in the middle of evaluations, and with it the head; AWAY_SECONDS later it is back.

    `client`, which follows a run through a ray:// address, has one of two workers, for a set of one shard. `patient`,
    as a job on the workers' node, has the other one. `impatient`, which is there as well, waits for one. `later` begins
    when the head is back and the others have ended.
    """
    need("redis-server", "unshare", "nsenter")
    folder = Path(tempfile.mkdtemp(prefix="ray_"))  # short: the paths of Ray's sockets go into 107 characters
    shutil.copytree(run_directory / "checkpoints/step_00000020", folder / "run/checkpoints/step_00000020")
    with joined() as nodes, named(nodes), contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        cluster = Cluster(folder, run_directory.parent / "shards")
        stack.callback(cluster.end)  # also of one that comes up in part
        cluster.start()

        follow = (folder / "run", "--follow", "--idle=0", "--ray=ray://node0:10001")
        client = cluster.evaluation("client", *follow, data=run_directory.parent / "drawn")
        wait_until(lambda: client.says("worker(s)") and cluster.num_begun("client"))

        def job(name: str, pace: int = 0, **variables: str) -> Program:
            arguments = (run_directory, "--ray", "node0:6379", "--output", folder / name)
            program = cluster.evaluation(name, *arguments, pace=pace, **variables)
            wait_until(lambda: program.says("worker(s)"))
            return program

        patient = job("patient", SHARD_SECONDS)
        wait_until(lambda: cluster.num_begun("patient"))
        impatient = job("impatient", RAY_gcs_rpc_server_reconnect_timeout_s=str(IMPATIENT_SECONDS))

        cluster.head.process("gcs_server").kill()
        (folder / "lost").touch()
        before, back = cluster.num_begun("patient"), time.monotonic() + AWAY_SECONDS
        cluster.command.process.wait(timeout=30)  # `ray start --block`, the command of the head's container
        cluster.head.end()  # as the kubelet does then
        impatient.process.wait(timeout=60)
        time.sleep(max(0.0, back - time.monotonic()))
        num_meanwhile = cluster.num_begun("patient") - before
        cluster.start_head("head2")
        programs = {"client": client, "patient": patient, "impatient": impatient}
        status = {name: program.process.wait(timeout=240) for name, program in programs.items()}
        programs["later"] = later = job("later")
        status["later"] = later.process.wait(timeout=120)
        assert cluster.raylet.process.poll() is None, "the node is the same one"
        yield Outcome(folder, status, {name: each.output.read_text() for name, each in programs.items()}, num_meanwhile)


@pytest.fixture(scope="module")
def local(run_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    evaluate(run_directory, [], output=folder)
    return folder


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("detections.json", "ground_truth.json")}


def test_an_evaluation_outlives_the_head(outcome: Outcome, local: Path) -> None:
    assert outcome.status["patient"] == 0, outcome.text["patient"]
    assert outcome.num_meanwhile >= 1, "workers work on without the head"
    assert "died" not in outcome.text["patient"]
    assert written(outcome.folder / "patient") == written(local)


def test_the_node_belongs_to_the_head_that_is_back(outcome: Outcome, local: Path) -> None:
    assert outcome.status["later"] == 0, outcome.text["later"]
    assert written(outcome.folder / "later") == written(local)


def test_a_driver_gives_up_after_the_time_that_it_is_given(outcome: Outcome) -> None:
    assert outcome.status["impatient"] == 1
    assert f"Failed to connect to GCS within {IMPATIENT_SECONDS} seconds" in outcome.text["impatient"]
    assert not (outcome.folder / "impatient").exists()


def test_a_follower_through_a_client_tries_again(outcome: Outcome, run_directory: Path, tmp_path: Path) -> None:
    """What it began is lost: its driver was on the head."""
    assert outcome.status["client"] == 0, outcome.text["client"]
    assert "is tried again: the connection to the Ray cluster was lost" in outcome.text["client"]
    evaluate(run_directory, [], [run_directory.parent / "drawn"], output=tmp_path)
    assert written(outcome.folder / "run/eval/step_00000020") == written(tmp_path)
    assert result.read(outcome.folder / "run/checkpoints/step_00000020")
