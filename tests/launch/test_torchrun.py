"""How a launcher's part of a run ends: told to stop by a signal, or with ranks that failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ddetr.core.training.heartbeat import TRY_AGAIN
from ddetr.data.shared_memory import REMEDY

from tests.core.runs import SMALL, kill, start, wait_for

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"  # as the scripts have it

# In the place of `ddetr`: says that it runs, and ends as its last argument says; by a signal it "saves", and ends well.
RANK = """
import os, signal, sys, time
with open("/proc/self/cmdline", "rb") as file:
    line = file.read().split(b"\\0")[:-1]
if b"ddetr.launch.cli" in line:
    def save(number, frame):
        print("saved by", signal.Signals(number).name, flush=True)
        os._exit(0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, save)
    with open(os.path.join(os.path.dirname(__file__), "rank-" + os.environ["RANK"]), "w") as begun:
        print("begun", file=begun)
    last = line[-1].decode()
    if last.isdecimal():
        print("ddetr: what rank", os.environ["RANK"], "says", file=sys.stderr, flush=True)
        os._exit(int(last))
    if last.startswith("SIG"):
        os.kill(os.getpid(), signal.Signals[last])
    time.sleep(600)
"""


def launch(folder: Path, last: str) -> subprocess.Popen[str]:
    (folder / "sitecustomize.py").write_text(RANK)
    line = [sys.executable, "-m", "ddetr.launch.torchrun", "--standalone", "--nproc-per-node=1"]
    line += ["--signals-to-handle", SIGNALS, "--", "train", last]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    pipe = subprocess.PIPE
    return subprocess.Popen(line, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_told_to_stop_it_ends_as_by_the_signal(number: signal.Signals, tmp_path: Path) -> None:
    process = launch(tmp_path, "wait")
    try:
        wait_for(tmp_path / "rank-0", process, seconds=300)
        process.send_signal(number)
        output, error = process.communicate(timeout=300)
    finally:
        kill(process)
    assert process.returncode == 128 + number
    assert f"saved by {number.name}" in output
    assert error.splitlines()[-1] == f"torchrun: {number.name}: the ranks of this node were told, and have ended"
    assert "Traceback" not in error
    assert len(error.splitlines()) < 10, error


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [
        ("2", 1, "ended with exit status 2. What they said stands above"),
        (str(TRY_AGAIN), TRY_AGAIN, "ended because other ranks did: started again, it goes on"),
        ("SIGKILL", 1, "was killed by SIGKILL. What they said stands above"),
        ("SIGBUS", 1, f"killed by SIGBUS. What they said stands above. /dev/shm was full, perhaps. {REMEDY}"),
    ],
)
def test_a_rank_that_failed_is_named_and_its_message_kept(last: str, status: int, said: str, tmp_path: Path) -> None:
    process = launch(tmp_path, last)
    _, error = process.communicate(timeout=300)
    assert process.returncode == status, error
    final = error.splitlines()[-1]
    assert final.startswith("torchrun: rank 0 (pid ")
    assert final.endswith(said)
    assert ("ddetr: what rank 0 says" in error) == last.isdecimal()
    assert "Traceback (most" not in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_over_ssh_the_ranks_of_a_single_host_are_told_too(number: signal.Signals, tmp_path: Path) -> None:
    """DeepSpeed starts those without ssh, by which it only looks whether they can be reached, and would leave them."""
    (tmp_path / "sitecustomize.py").write_text(RANK)
    (tmp_path / "ssh").write_text("#!/bin/sh\necho 127.0.0.1\n")  # `hostname -I` is asked for
    (tmp_path / "ssh").chmod(0o755)
    (tmp_path / "hostfile").write_text("localhost slots=1\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    line = [sys.executable, "-m", "ddetr.launch.pdsh", str(tmp_path / "hostfile"), "--", "train", "wait"]
    pipe = subprocess.PIPE
    process = subprocess.Popen(line, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for(tmp_path / "rank-0", process, seconds=300)
        process.send_signal(number)
        output, _ = process.communicate(timeout=300)
    finally:
        kill(process)
    assert process.returncode == 128 + number, output
    assert "saved by SIGTERM" in output
    assert output.splitlines()[-1] == f"ssh.sh: {number.name}: the ranks were told, and have ended"
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("told", ["the launcher", "a rank"])
def test_a_real_run_saves_and_ends_with_a_word(told: str, synthetic_shards: Path, tmp_path: Path) -> None:
    """Without --ranks 1 the other rank would be told by the one that got the signal, and end with TRY_AGAIN."""
    settings = [f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=run", "train.epochs=10000"]
    environment = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    script = REPOSITORY / "launch/local.sh"
    line = ["env", *(f"{key}={value}" for key, value in environment.items()), script, "--ranks", "2", "tiny"]
    process = start([*map(str, line), *SMALL, *settings])
    try:
        wait_for(tmp_path / "run/metrics.jsonl", process, lines=3)
        if told == "a rank":
            time.sleep(0.5)
            found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
            os.kill(int(found.stdout.split()[-1]), signal.SIGTERM)
        else:
            process.terminate()
        output, _ = process.communicate(timeout=200)
    finally:
        kill(process)
    assert process.returncode == (TRY_AGAIN if told == "a rank" else 128 + signal.SIGTERM), output
    assert "stopped after step" in output
    assert "Traceback" not in output
    assert output.splitlines()[-1].startswith("torchrun: ")
    assert list(tmp_path.glob("run/checkpoints/step_*/checkpoint.json"))
