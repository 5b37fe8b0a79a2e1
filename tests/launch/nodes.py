"""Nodes of our own on one machine: network namespaces joined by a virtual cable, and Ray's on loopback."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.core.runs import kill

FIRST, SECOND = (f"ddetr-{letter}-{os.getpid()}" for letter in "ab")  # two runs of the tests do not meet
NODES = {FIRST: "10.117.0.1", SECOND: "10.117.0.2"}
DEVICES = ("ddetr_da", "ddetr_db")
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
RAY_TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a token of these tests that is long enough"}
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


def need(*programs: str) -> None:
    """Skip the test, naming those of its programs that are not there; CONTRIBUTING.md has their packages."""
    if missing := [name for name in programs if shutil.which(name) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")


@contextlib.contextmanager
def joined() -> Iterator[dict[str, str]]:
    """Name and address of each namespace. Skips the test without root."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    need("ip")
    try:
        for name in NODES:
            subprocess.run(["ip", "netns", "add", name], check=True)
        cable = f"ip link add {DEVICES[0]} netns {FIRST} type veth peer name {DEVICES[1]} netns {SECOND}"
        subprocess.run(cable.split(), check=True)
        for (name, address), device in zip(NODES.items(), DEVICES, strict=True):
            for command in (f"addr add {address}/24 dev {device}", f"link set {device} up", "link set lo up"):
                subprocess.run(["ip", "-n", name, *command.split()], check=True)
        yield NODES
    finally:
        for name in NODES:
            subprocess.run(["ip", "netns", "delete", name], check=False)


@contextlib.contextmanager
def named(nodes: dict[str, str]) -> Iterator[None]:
    """In each namespace the first node has the name `node0`, and a Ray finds its own address.

    Ray asks the kernel for its way to elsewhere to learn that address. The way that is made here leads no further.
    """
    hosts = [Path("/etc/netns") / name for name in nodes]  # `ip netns exec` mounts the files of these folders
    was_there = hosts[0].parent.is_dir()
    try:
        for host, other in zip(hosts, reversed(list(nodes.values())), strict=True):
            host.mkdir(parents=True)
            (host / "hosts").write_text(f"127.0.0.1 localhost\n{nodes[FIRST]} node0\n")
            (host / "resolv.conf").write_text("nameserver 127.0.0.1\n")  # none; the usual one is out of reach
            subprocess.run(["ip", "-n", host.name, "route", "add", "default", "via", other], check=True)
        yield
    finally:
        for host in hosts:
            shutil.rmtree(host, ignore_errors=True)
        if not was_there:
            hosts[0].parent.rmdir()


def on(node: str) -> list[str]:
    return ["ip", "netns", "exec", node]


@contextlib.contextmanager
def ssh_servers(nodes: dict[str, str], folder: Path) -> Iterator[Path]:
    """An ssh server in each namespace; a folder for the front of PATH, whose ssh gets into them."""
    need("/usr/sbin/sshd", "ssh", "ssh-keygen", "pdsh")
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    client = folder / "bin/ssh"  # found first on the PATH, so that no file of the user's is touched
    client.parent.mkdir()
    options = f"-i {folder}/user_key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
    client.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F none {options} "$@"\n')
    client.chmod(0o755)
    Path("/run/sshd").mkdir(exist_ok=True)  # where sshd gives up its privileges
    servers = []
    try:
        for (name, address), device in zip(nodes.items(), DEVICES, strict=True):
            configuration = folder / f"{name}.sshd"
            configuration.write_text(
                f"ListenAddress {address}\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\n"
                f"StrictModes no\nPermitRootLogin yes\nPidFile none\nSetEnv GLOO_SOCKET_IFNAME={device}\n"
            )
            servers.append(subprocess.Popen([*on(name), "/usr/sbin/sshd", "-D", "-e", "-f", configuration]))
        yield client.parent
    finally:
        for server in servers:
            server.terminate()
            server.wait()


class RayNodes:
    """`ray start` with one CPU in the namespaces; the first one is the head. All end with the context."""

    def __init__(self, nodes: dict[str, str]) -> None:
        self._nodes, self._logs = nodes, 0
        self.address = f"{nodes[FIRST]}:6379"
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "RayNodes":
        self._folder = Path(tempfile.mkdtemp(prefix="ray_"))  # short: paths of Ray's sockets have 107 characters
        return self

    def __exit__(self, *error: object) -> None:
        for name in self.processes:
            self.kill(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, name: str, before: str = "true", **environment: str) -> None:
        """Start a node. before: a shell command in its namespaces of network and mounts."""
        head = ["--head", "--port=6379", "--include-dashboard=false"]
        role = head if name == FIRST else [f"--address={self.address}"]
        self._logs += 1  # each start has its own folder, too: a node that comes back is another one
        role += [f"--temp-dir={self._folder / f'{name}.{self._logs}'}", f"--node-ip-address={self._nodes[name]}"]
        options = [
            "--num-cpus=1",
            "--num-gpus=0",
            "--object-store-memory=100000000",
            "--disable-usage-stats",
            "--block",
        ]
        line = [*on(name), "sh", "-c", f'{before} && exec "$@"', "sh", *RAY, "start", *role, *options]
        printed = self._folder / f"{name}.{self._logs}.log"
        with printed.open("w") as log:
            self.processes[name] = subprocess.Popen(
                line, env=ENVIRONMENT | RAY_TOKEN | environment, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in (text := printed.read_text()):
            assert time.monotonic() < deadline, text
            assert self.processes[name].poll() is None, text
            time.sleep(0.2)

    def kill(self, name: str) -> None:
        """All processes of a node, at once."""
        kill(self.processes[name])


@contextlib.contextmanager
def two_ray_nodes(object_store_memory: int | None = None, **head: float) -> Iterator[str]:
    """Address of a Ray cluster on loopback; each node offers one CPU, the first one also `head`."""
    from ray.cluster_utils import Cluster

    both = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": object_store_memory}
    cluster = Cluster(initialize_head=True, head_node_args=both | head)
    try:
        cluster.add_node(**both)
        cluster.wait_for_nodes()
        yield str(cluster.address)
    finally:
        cluster.shutdown()
