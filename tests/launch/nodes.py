"""Nodes of our own on one machine: network namespaces joined by a virtual cable, and Ray's on loopback."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest

FIRST, SECOND = (f"ddetr-{letter}-{os.getpid()}" for letter in "ab")  # two runs of the tests do not meet
NODES = {FIRST: "10.117.0.1", SECOND: "10.117.0.2"}
DEVICES = ("ddetr_da", "ddetr_db")


@contextlib.contextmanager
def joined() -> Iterator[dict[str, str]]:
    """Name and address of each namespace. Skips the test without root."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
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


def on(node: str) -> list[str]:
    return ["ip", "netns", "exec", node]


@contextlib.contextmanager
def two_ray_nodes(**head: float) -> Iterator[str]:
    """Address of a Ray cluster on loopback; each node offers one CPU, the first one also `head`."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False, **head})
    try:
        cluster.add_node(num_cpus=1, include_dashboard=False)
        cluster.wait_for_nodes()
        yield str(cluster.address)
    finally:
        cluster.shutdown()
