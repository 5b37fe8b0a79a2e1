"""What a run listens on while it trains, by each way to start it: loopback on one machine, given addresses on several.

And what becomes of a run into whose store a stranger writes.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.core.runs import SMALL, free_port, kill
from tests.launch.listening import beyond_loopback, listening_on, listening_until
from tests.launch.nodes import FIRST, NODES, SECOND, need, on, ssh_servers
from tests.processes import Command

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("GLOO_", "NCCL_"))}
ENVIRONMENT |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def endless(shards: Path, folder: Path) -> list[str]:
    settings = [f"data.train={shards}", f"train.output={folder}", "train.name=run", "train.epochs=10000"]
    return ["tiny", *SMALL, *settings, "train.keep_checkpoints=1"]


@contextlib.contextmanager
def started(*lines: list, folder: Path, **variables: str) -> Iterator[list[subprocess.Popen]]:
    processes = []
    try:
        for number, line in enumerate(lines):
            with (folder / f"{number}.log").open("w") as log:
                environment = ENVIRONMENT | variables
                processes.append(subprocess.Popen(line, cwd=folder, env=environment, stdout=log, stderr=log))
        yield processes
    finally:
        for process in processes:
            kill(process)


def logs(folder: Path) -> str:
    return "\n".join(log.read_text()[-3000:] for log in sorted(folder.glob("*.log")))


def steps_taken(folder: Path, processes: Sequence[subprocess.Popen | Command]) -> Callable[[], bool]:
    def taken() -> bool:
        assert all(process.poll() is None for process in processes), logs(folder)
        file = folder / "run/metrics.jsonl"
        return file.is_file() and len(file.read_text().splitlines()) >= 3

    return taken


def wait(until: Callable[[], object], folder: Path, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, logs(folder)
        time.sleep(0.2)


SLOW_WAYS = ("local.sh with 1 rank", "torchrun.sh on one node")


@pytest.mark.parametrize(
    "way",
    ["local.sh with 2 ranks", *(pytest.param(way, marks=pytest.mark.slow) for way in SLOW_WAYS)],
)
def test_on_one_machine(way: str, synthetic_shards: Path, tmp_path: Path) -> None:
    """All of it on loopback: launcher's store, gloo, exporter; from the start on."""
    arguments = endless(synthetic_shards, tmp_path)
    if way.startswith("local.sh"):
        line = [REPOSITORY / "launch/local.sh", "--ranks", re.findall(r"\d", way)[0], *arguments]
    else:
        line = [REPOSITORY / "launch/torchrun.sh", "--nodes", "1", "--node-rank", "0", "--ranks", "2"]
        line += ["--master", f"{next(iter(NODES.values()))}:{free_port()}", *arguments]
    with started(line, folder=tmp_path) as processes:
        found = listening_until(processes[0].pid, steps_taken(tmp_path, processes))
        assert found, "the metrics at least are served"
        assert beyond_loopback(found) == set()


def test_alone(synthetic_shards: Path, tmp_path: Path) -> None:
    command = Command("train", *endless(synthetic_shards, tmp_path))
    try:
        found = listening_until(command.pid, steps_taken(tmp_path, [command]))
    finally:
        command.kill()
    assert found, "the metrics at least are served"
    assert beyond_loopback(found) == set()


@pytest.mark.slow
def test_where_the_host_name_is_unknown_and_ipv6_is_off(synthetic_shards: Path, tmp_path: Path) -> None:
    """A machine without a network, as many laptops and containers are."""
    if os.geteuid() != 0:
        pytest.skip("a host name of its own needs root")
    need("unshare", "hostname", "ip")
    prepare = "hostname no-such-host && ip link set lo up && echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6"
    line = ["unshare", "--uts", "--net", "sh", "-c", f'{prepare} && exec "$@"', "sh"]
    line += [REPOSITORY / "launch/local.sh", "--ranks", "2", *endless(synthetic_shards, tmp_path)]
    with started(line, folder=tmp_path) as processes:
        assert beyond_loopback(listening_until(processes[0].pid, steps_taken(tmp_path, processes))) == set()
        processes[0].terminate()
        processes[0].wait(timeout=120)
    events = [json.loads(line)["event"] for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert events[-1] == "stop"


def torchrun(shards: Path, folder: Path, port: int, numbered: bool) -> list[list]:
    lines = []
    for number, name in enumerate(NODES):
        line = [*on(name), REPOSITORY / "launch/torchrun.sh", "--nodes", "2", "--ranks", "1"]
        line += ["--node-rank", str(number)] if numbered else ["--restarts", "0"]
        lines.append([*line, "--master", f"{NODES[FIRST]}:{port}", *endless(shards, folder)])
    return lines


def assert_given_addresses_alone(port: int | None, servers: str = "-") -> None:
    """Each node's own, of the network between them: the store, where the nodes and the ranks meet, and gloo, whose
    connections every rank takes from the others."""
    for name, address in NODES.items():
        found = {item for item in beyond_loopback(listening_on(name)) if item[2] != servers}
        assert {where for where, _, _ in found} == {address}, found
        if port is not None:
            assert (port in {number for _, number, _ in found}) == (name == FIRST), found


@pytest.mark.slow
@pytest.mark.parametrize("numbered", [True, False], ids=["fixed nodes", "nodes numbered as they come"])
def test_on_two_nodes(numbered: bool, nodes: dict[str, str], synthetic_shards: Path, tmp_path: Path) -> None:
    """And a stranger on the second node replaces what the first one's store holds, by pickles."""
    lines = torchrun(synthetic_shards, tmp_path, 29513, numbered)
    with started(*lines, folder=tmp_path) as processes:
        wait(steps_taken(tmp_path, processes), tmp_path)
        assert_given_addresses_alone(29513)
        attack = [*on(SECOND), sys.executable, "-c", ATTACK, NODES[FIRST], "29513", str(tmp_path / "executed")]
        subprocess.run(attack, check=True, timeout=300, stdout=subprocess.DEVNULL)
        if numbered:  # there is no state to replace
            before = len((tmp_path / "run/metrics.jsonl").read_text().splitlines())
            wait(lambda: len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) > before + 5, tmp_path)
        else:
            assert all(process.wait(timeout=300) == 1 for process in processes), logs(tmp_path)
            assert f"the store at {NODES[FIRST]}:29513, where the nodes meet, holds b'" in logs(tmp_path)
            assert "what writes to it is no node of ddetr" in logs(tmp_path)
            assert "Traceback" not in logs(tmp_path)
    assert not (tmp_path / "executed").exists()


HARMFUL = """
import base64, os, pickle, sys

class Harmful:
    def __reduce__(self):
        return os.system, ("touch " + sys.argv[-1],)

harm = pickle.dumps(Harmful())
"""
# Under every name that torch's rendezvous, or ours, has for its state, in both of their writings.
ATTACK = f"""{HARMFUL}
from torch.distributed import TCPStore
store = TCPStore(sys.argv[1], int(sys.argv[2]), is_master=False)
for key in ("torch.rendezvous.ddetr", "ddetr/ddetr", "torch.rendezvous.none", "ddetr/none"):
    store.set(key, base64.b64encode(harm))
store.set("ddetr/ddetr", harm)
"""


def test_the_attack_would_be_one(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", f"{HARMFUL}pickle.loads(harm)", tmp_path / "executed"], check=True)
    assert (tmp_path / "executed").exists()


@pytest.mark.slow
def test_over_ssh(nodes: dict[str, str], synthetic_shards: Path, tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{address} slots=1\n" for address in nodes.values()))
    line = [*on(FIRST), REPOSITORY / "launch/ssh.sh", hostfile, *endless(synthetic_shards, tmp_path)]
    with (
        ssh_servers(nodes, tmp_path) as client,
        started(line, folder=tmp_path, PATH=f"{client}:{ENVIRONMENT['PATH']}") as processes,
    ):
        wait(steps_taken(tmp_path, processes), tmp_path)
        assert_given_addresses_alone(29500, servers="sshd")
        for name in nodes:  # the ranks are no descendants of the launcher
            listed = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True).stdout
            for pid in listed.split():
                with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                    if b"ddetr.launch.cli" in Path(f"/proc/{pid}/cmdline").read_bytes():
                        os.kill(int(pid), 9)
