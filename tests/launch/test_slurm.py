"""Training under Slurm: a controller and two nodes of our own, and a job that goes on through what Slurm does to it.

Each node is a network namespace with a host name of its own; nothing outside them is touched or listened on.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.core.runs import SMALL, Run, collect
from tests.launch.hostile import hostile, recorded, recorder
from tests.launch.listening import beyond_loopback, listening_on
from tests.launch.nodes import NODES, joined, on

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
ENVIRONMENT = os.environ | {"PATH": PATH, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare")

# cred_expire is also how long a job that is queued again waits. A job of the partition "urgent" preempts others, whose
# ranks have GraceTime seconds to save.
CONFIGURATION = """
ClusterName=ddetr
SlurmctldHost={controller}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
StateSaveLocation={folder}/controller
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/controller.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2,bf_interval=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=usual Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=ALL PriorityTier=2
"""

pytestmark = pytest.mark.slow


@dataclass
class Cluster:
    folder: Path
    controller: str

    def run(self, *command: str | Path) -> str:
        arguments = [*on(self.controller), *map(str, command)]
        environment = ENVIRONMENT | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        result = subprocess.run(
            arguments, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, f"{command}: {result.stderr}\n{self.logs()}"
        return result.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Number of a job of the launch script, with less than it asks for."""
        options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=2", f"--output={self.folder}/job-%j.log"]
        return self.run("sbatch", *options, "launch/slurm.sbatch", *arguments)

    def state(self, job: str) -> str:
        return self.run("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T")

    def wait(self, until: Callable[[], bool], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, f"not in {seconds} s: {what}\n{self.logs()}"
            time.sleep(0.2)

    def logs(self) -> str:
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} missing (Debian: apt-get install slurm-wlm munge)")
    folder = tmp_path_factory.mktemp("slurm")
    with joined() as nodes, contextlib.ExitStack() as stack:
        controller, address = next(iter(nodes.items()))
        lines = [CONFIGURATION.format(folder=folder, controller=controller, address=address)]
        lines += [f"NodeName={name} NodeAddr={address} CPUs=2\n" for name, address in nodes.items()]
        (folder / "slurm.conf").write_text("".join(lines))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # asked for even if, as here, nothing uses it
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n" + "".join(f"{address} {name}\n" for name, address in nodes.items())
        )
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        for name in ("controller", *nodes):
            (folder / name).mkdir()

        def daemon(name: str, *command: str | Path) -> None:
            environment = ENVIRONMENT | {"SLURM_CONF": str(folder / "slurm.conf")}
            with (folder / f"{name}.log").open("w") as log:
                process = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=log)
            stack.callback(process.wait, timeout=30)
            stack.callback(process.terminate)

        munge = ["munged", "--foreground", "--force", "--num-threads=2", f"--key-file={folder}/munge.key"]
        munge += [f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
        daemon("munged", *munge, f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log")
        stack.callback(_end_all_on, nodes)
        for log, node, program in (
            ("slurmctld", controller, "slurmctld"),
            *((f"slurmd-{name}", name, "slurmd") for name in nodes),
        ):
            as_host = f"hostname {node} && mount --bind {folder}/hosts /etc/hosts && exec {program} -D"
            daemon(log, *on(node), "unshare", "--uts", "sh", "-c", as_host)
        made = Cluster(folder, controller)
        made.wait((folder / "munge.socket").exists, "munge")
        made.wait(lambda: _answers(made), "two idle nodes", 60)
        yield made


def _answers(cluster: Cluster) -> bool:
    with contextlib.suppress(AssertionError):  # the controller is not there yet
        return cluster.run("sinfo", "--noheader", "--Node", "--partition=usual", "--format=%T").split() == ["idle"] * 2
    return False


def _end_all_on(nodes: dict[str, str]) -> None:
    """Steps outlive the daemon that started them; whatever runs in our namespaces is ours."""
    for name in nodes:
        listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        for process in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)


def settings(shards: Path, output: Path, **train: object) -> list[str]:
    return [*SMALL, f"data.train={shards}", f"train.output={output}", *(f"train.{k}={v}" for k, v in train.items())]


def assert_no_gap(run: Run) -> None:
    """Every step was taken once, and the last one is saved."""
    steps = [step["step"] for step in run.steps]
    assert steps == list(range(1, len(steps) + 1))
    assert (run.directory / f"checkpoints/step_{steps[-1]:08}/checkpoint.json").is_file()


def test_a_job_goes_on_through_requeue_preemption_and_time_limit(
    cluster: Cluster, synthetic_shards: Path, tmp_path: Path
) -> None:
    endless = settings(synthetic_shards, tmp_path, name="endless", epochs=10_000, keep_checkpoints=2)
    job = cluster.submit("tiny", *endless, "train.auto_resume=true", "train.checkpoint_every_epochs=1000")

    def run() -> Run:
        return collect(tmp_path / "endless", "", 0)

    def begun() -> list[str]:
        return [event["event"] for event in run().events if "ranks" in event]

    def wait_for_steps(beginnings: int) -> None:
        """Until the run has begun so often, and taken some steps since."""
        cluster.wait(lambda: len(begun()) == beginnings, f"beginning {beginnings}")
        before = len(run().steps)
        cluster.wait(lambda: len(run().steps) >= before + 5, f"steps after beginning {beginnings}")

    wait_for_steps(1)
    cluster.run("scontrol", "requeue", job)
    wait_for_steps(2)
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--output=/dev/null", "--wrap=true")
    wait_for_steps(3)
    assert cluster.state(urgent) == "COMPLETED"
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=3")  # minutes, so the ranks are told at once
    cluster.wait(lambda: cluster.state(job) == "PENDING", "queued again before the time limit")
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for_steps(4)
    cluster.run("scancel", job)
    cluster.wait(lambda: cluster.state(job) == "CANCELLED", "cancelled")

    assert begun() == ["start", "resume", "resume", "resume"]
    assert [event["ranks"] for event in run().events if "ranks" in event] == [2] * 4
    assert [event["event"] for event in run().events].count("stop") == 4  # each time by itself, not killed
    assert_no_gap(run())


def test_a_job_ends(cluster: Cluster, synthetic_shards: Path, tmp_path: Path) -> None:
    """When its run has, is wrong, or cannot be gone on with: none of these is queued again."""

    done = cluster.submit("tiny", *settings(synthetic_shards, tmp_path, name="done", max_steps=2))
    cluster.wait(lambda: cluster.state(done) == "COMPLETED", "two steps")
    assert len(collect(tmp_path / "done", "", 0).steps) == 2

    wrong = cluster.submit("tiny", *settings(tmp_path / "absent", tmp_path, name="wrong", auto_resume="true"))
    cluster.wait(lambda: cluster.state(wrong) == "FAILED", "a failure")

    once = cluster.submit("tiny", *settings(synthetic_shards, tmp_path, name="once", epochs=10_000))
    cluster.wait(lambda: len(collect(tmp_path / "once", "", 0).steps) >= 3, "steps")
    for node, address in NODES.items():  # beside Slurm's own programs, which listen everywhere
        found = {item for item in beyond_loopback(listening_on(node)) if not item[2].startswith(("slurm", "srun"))}
        assert {where for where, _, _ in found} == {address}, found
    cluster.run("scancel", "--signal=USR1", once)
    cluster.wait(lambda: cluster.state(once) == "FAILED", "stopped by a signal to the ranks")
    log = (cluster.folder / f"job-{once}.log").read_text()
    assert "not queued again" in log
    assert "User defined signal" not in log  # torchrun outlives it
    run = collect(tmp_path / "once", "", 0)
    assert [event["event"] for event in run.events][-1] == "stop"
    assert_no_gap(run)


def test_a_member_of_an_array_is_queued_again_alone(cluster: Cluster, tmp_path: Path) -> None:
    """What is trained is left out: each member only says that it begins, and waits for the signal to stop."""
    begun = tmp_path / "begun"
    begun.touch()
    (tmp_path / "launch").mkdir()
    stub = tmp_path / "launch/torchrun.sh"
    line = 'echo "$SLURM_ARRAY_TASK_ID $SLURM_JOB_ID"'
    stub.write_text(f"#!/bin/bash\n{line} >>{begun}\ntrap 'exit 138' USR1\nsleep 600 &\nwait\n")
    stub.chmod(0o755)
    options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=2", "--nodes=1", "--array=0-1"]
    options += [f"--chdir={tmp_path}", f"--output={cluster.folder}/array-%a.log"]
    script = REPOSITORY / "launch/slurm.sbatch"
    array = cluster.run("sbatch", *options, script, "tiny", "train.name=a", "train.auto_resume=True")
    cluster.wait(lambda: begun.read_text().count("\n") == 2, "both members")
    members = dict(reversed(line.split()) for line in begun.read_text().splitlines())
    one = members.pop(array)  # whose own number is that of the array, too
    (other,) = members.values()
    cluster.run("scancel", "--signal=USR1", f"{array}_{one}")
    cluster.wait(lambda: begun.read_text().count("\n") == 3, "a member again")
    assert begun.read_text().splitlines()[-1].split()[0] == one
    assert "Restarts=1" in cluster.run("scontrol", "show", "job", f"{array}_{one}")
    assert "Restarts=0" in cluster.run("scontrol", "show", "job", f"{array}_{other}")
    cluster.run("scancel", array)


def test_arguments_arrive_as_they_are(cluster: Cluster, tmp_path: Path) -> None:
    arguments = ["tiny", *hostile(tmp_path)]
    variables = [f"{name}={value}" for name, value in recorder(tmp_path / "ranks").items()]
    options = ["--parsable", "--gpus-per-node=0", "--cpus-per-task=1", f"--output={cluster.folder}/job-%j.log"]
    job = cluster.run("env", *variables, "sbatch", *options, "launch/slurm.sbatch", *arguments)
    cluster.wait(lambda: cluster.state(job) not in ("PENDING", "RUNNING", "COMPLETING"), "the end")
    assert cluster.state(job) == "COMPLETED", cluster.logs()
    ranks = recorded(tmp_path / "ranks")
    assert sorted(ranks) == [0, 1]
    for rank in ranks.values():
        assert rank.arguments == [b"train", *map(os.fsencode, arguments)]
    assert not (tmp_path / "executed").exists()
