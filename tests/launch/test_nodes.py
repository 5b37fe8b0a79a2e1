"""Training over two nodes: network namespaces joined by a virtual cable, one rank in each, two real steps."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
NODES = {"ddetr_a": "10.117.0.1", "ddetr_b": "10.117.0.2"}
DEVICES = ("ddetr_da", "ddetr_db")
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.slow


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    """Name and address of each namespace."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    try:
        for name in NODES:
            subprocess.run(["ip", "netns", "add", name], check=True)
        cable = f"ip link add {DEVICES[0]} netns ddetr_a type veth peer name {DEVICES[1]} netns ddetr_b"
        subprocess.run(cable.split(), check=True)
        for (name, address), device in zip(NODES.items(), DEVICES, strict=True):
            for command in (f"addr add {address}/24 dev {device}", f"link set {device} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield NODES
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def on(node: str) -> list[str]:
    return ["ip", "netns", "exec", node]


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
        command += ["--master", nodes["ddetr_a"] + ":29511"]
        command += ["--node-rank", str(rank)] if numbered else ["--restarts", "0"]
        command += two_steps(synthetic_shards, tmp_path / "runs")
        environment = ENVIRONMENT | {"GLOO_SOCKET_IFNAME": device, "TP_SOCKET_IFNAME": device}
        with (tmp_path / f"{name}.log").open("w") as log:
            processes.append(subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log))
    statuses = [process.wait(timeout=900) for process in processes]
    assert statuses == [0, 0], "".join(log.read_text()[-3000:] for log in tmp_path.glob("*.log"))
    assert_two_steps_on_two_ranks(tmp_path / "runs")


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
        command = [*on("ddetr_a"), REPOSITORY / "launch/ssh.sh", hostfile]
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
