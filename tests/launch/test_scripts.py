"""The launch scripts, manifests and make targets: they parse, explain themselves and really run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parent.parent.parent
LAUNCH = REPOSITORY / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def run(*command: str | Path, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command],
        cwd=REPOSITORY,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_explain_themselves(script: Path) -> None:
    result = run("bash", script, "--help")
    assert result.returncode == 0
    assert result.stdout.startswith("usage: ")
    assert script.name in result.stdout.splitlines()[0]


def test_wrong_use_is_one_message() -> None:
    for command, message in (
        (["torchrun.sh", "tiny"], "--nodes is needed"),
        (["torchrun.sh", "--nodes", "2", "tiny"], "--master is needed"),
        (["ssh.sh", "absent_hostfile", "tiny"], "absent_hostfile: no such hostfile"),
    ):
        result = run("bash", LAUNCH / command[0], *command[1:])
        assert result.returncode == 2
        assert message in result.stderr


MINE = "train: {name: a, auto_resume: on}\n"


@pytest.mark.parametrize(
    ("arguments", "member", "requeued"),
    [
        (["tiny", "train.name=a", "train.auto_resume=True"], "", "7"),
        (["tiny", "train.name=a", "train.auto_resume=false", "train.auto_resume=yes"], "3", "5_3"),
        (["{folder}/mine.yaml"], "0", "5_0"),
        (["--resume", "{folder}"], "", "7"),
        (["--resume={folder}", "train.auto_resume=false"], "", "7"),
        (["{folder}/mine.yaml", "train.auto_resume=off"], "", None),
        (["tiny", "train.name=auto_resume=true"], "", None),
        (["tiny", "train.output=x train.auto_resume=true"], "", None),
        (["tiny", "train.name=a", "train.auto_resume=true", "train.auto_resume=false"], "3", None),
        (["tiny"], "", None),
        (["tiny", "--help"], "", None),
    ],
)
def test_slurm_queues_again_what_can_be_gone_on_with(
    arguments: list[str], member: str, requeued: str | None, tmp_path: Path
) -> None:
    """Slurm itself: test_slurm.py. Here the ranks were told to stop. The job is one of its own, or a member of one."""
    (tmp_path / "mine.yaml").write_text(MINE)
    (tmp_path / "config.yaml").write_text("train: {name: a}\n")  # that of a run
    nodes = 'echo "scontrol $*"; seq -f node%g 0 19999'  # more than a pipe holds
    for name, body in (("srun", "exit 75"), ("scontrol", nodes)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0"}
    if member:
        variables |= {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": member}
    arguments = [argument.format(folder=tmp_path) for argument in arguments]
    result = run("bash", LAUNCH / "slurm.sbatch", *arguments, **variables)
    assert result.returncode == 75, result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("scontrol requeue")] == (
        [f"scontrol requeue {requeued}"] if requeued else []
    )
    assert ("not queued again" in result.stderr) == (requeued is None)


@pytest.mark.parametrize("script", [pytest.param("local.sh", marks=pytest.mark.slow), "torchrun.sh", "ssh.sh"])
def test_an_empty_argument_is_an_argument(script: str) -> None:
    result = run("bash", LAUNCH / script, "")
    assert result.returncode == 2
    assert "usage:" not in result.stdout + result.stderr
    result = run("bash", LAUNCH / script)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: ")


def test_bootstrap_says_what_the_machine_lacks(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    for python, compiler, message in (
        ("false", "g++", "Python >= 3.11 is needed"),
        (sys.executable, "false", "apt-get install g++"),
    ):
        result = run("bash", LAUNCH / "bootstrap.sh", venv, PYTHON=python, CXX=compiler)
        assert result.returncode == 1
        assert message in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert not venv.exists()


def test_bootstrap_offline_sees_the_packages_of_its_interpreter(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    result = run("bash", LAUNCH / "bootstrap.sh", venv, PYTHON=sys.executable, OFFLINE="1")
    assert result.returncode == 0, result.stderr
    seen = run(venv / "bin/python", "-c", "import sys, yaml; print(sys.prefix, yaml.__file__)")
    assert seen.returncode == 0, seen.stderr
    prefix, file = seen.stdout.split()
    assert Path(prefix) == venv
    assert file == yaml.__file__


@pytest.mark.slow
def test_local_runs_two_ranks(synthetic_shards: Path, tmp_path: Path) -> None:
    result = run(
        LAUNCH / "local.sh",
        "--ranks",
        "2",
        "tiny",
        f"data.train={synthetic_shards}",
        f"train.output={tmp_path}",
        "train.batch_size=8",
        "--dry-run",
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.iterdir()) == [], "a dry run left something behind"


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    result = run(LAUNCH / "local.sh", "--ranks", "2", "tiny", f"data.train={tmp_path}/absent", timeout=300)
    assert result.returncode == 2
    assert result.stderr.count(f"ddetr: {tmp_path}/absent") == 1
    assert "Traceback" not in result.stderr


def test_continuous_integration_runs_make_test() -> None:
    assert (REPOSITORY / ".ci/run").read_text().rstrip().endswith("make test")
    for target in ("demo", "unit", "test", "test-all", "coverage", "test-gpu", "bench", "bench-gpu", "lint", "wheel"):
        result = run("make", "-n", target)
        assert result.returncode == 0, f"make {target}: {result.stderr}"
    (line,) = [line for line in run("make", "-n", "test").stdout.splitlines() if " -m pytest " in line]
    assert line.endswith(" -m 'not slow and not gpu' tests")
