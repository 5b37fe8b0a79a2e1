"""A program tied to its parent's life: the same as without, until the parent is gone."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.integration

LIFELINE = [sys.executable, "-m", "ddetr.launch.lifeline"]


@pytest.mark.parametrize(
    ("arguments", "exit_status"),
    [
        (["--version"], 0),
        (["train", "--help"], 0),
        (["train", "tiny", "train.bach_size=4"], 2),
        (["--traceback", "train", "tiny", "train.bach_size=4"], 2),
        (["train", "tiny", "--no-such-option"], 2),
    ],
)
def test_ddetr_is_the_same_under_it(arguments: list[str], exit_status: int) -> None:
    alone, tied = (
        subprocess.run([*line, "ddetr.launch.cli", *arguments], capture_output=True, text=True, timeout=120)
        for line in ([sys.executable, "-m"], [*LIFELINE, str(os.getpid())])
    )
    assert alone.returncode == exit_status, alone.stderr
    assert (tied.returncode, tied.stdout, tied.stderr) == (alone.returncode, alone.stdout, alone.stderr)


def test_the_program_ends_with_its_parent(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text("import sys, time\nprint(*sys.argv[1:], flush=True)\ntime.sleep(300)\n")
    parent = (
        f"import os, subprocess; line = [*{LIFELINE!r}, str(os.getpid()), 'sleeper', 'a b', '--c'];"
        "child = subprocess.Popen(line); print(child.pid, flush=True); child.wait()"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", parent], env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        child = psutil.Process(int(process.stdout.readline()))
        assert process.stdout.readline() == "a b --c\n"
        process.kill()
        assert psutil.wait_procs([child], timeout=20)[0], "it outlives its parent"


def test_a_parent_that_is_gone_before_is_noticed() -> None:
    """The kernel tells nothing of a parent that ended before it was asked to."""
    line = [*LIFELINE, str(psutil.Process().ppid()), "ddetr.launch.cli", "--version"]
    late = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (late.returncode, late.stdout) == (1, "")
    assert late.stderr == f"process {psutil.Process().ppid()}, which started ddetr.launch.cli, is gone\n"
