"""What a run listens on: the TCP sockets of its processes, whatever network namespace each is in."""

import ipaddress
import os
import re
import subprocess
import time
from collections.abc import Callable

import psutil

from tests.launch.nodes import need

Socket = tuple[str, int, str]  # address ("0.0.0.0" and "::" for all), port, the process's name


def listening(pid: int) -> set[Socket]:
    """What the process and its descendants listen on, by iproute2's ss. Skips the test where that is missing."""
    need("ss", "nsenter")
    names: dict[int, str] = {}
    networks: dict[str, int] = {}
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return set()
    for process in family:
        try:
            networks.setdefault(os.readlink(f"/proc/{process.pid}/ns/net"), process.pid)
            names[process.pid] = process.name()
        except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    found = set()
    for member in networks.values():
        line = ["nsenter", f"--net=/proc/{member}/ns/net", "ss", "--no-header", "-ltnp"]
        result = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
        if result.returncode and _has_ended(member):
            continue
        assert result.returncode == 0, result.stderr
        for row in result.stdout.splitlines():
            address, _, port = row.split()[3].rpartition(":")
            address = address.strip("[]").partition("%")[0].replace("*", "::")
            owners = [int(number) for number in re.findall(r"pid=(\d+)", row)]
            found |= {(address, int(port), names[owner]) for owner in owners if owner in names}
    return found


def _has_ended(pid: int) -> bool:
    """A process that nobody has waited for yet is still listed, but has no network any more."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def listening_on(node: str) -> set[Socket]:
    """What all processes of a node of tests/launch/nodes.py listen on."""
    listed = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True, check=True).stdout
    return set().union(*(listening(int(pid)) for pid in listed.split()))


def listening_until(pid: int, done: Callable[[], object], seconds: float = 300) -> set[Socket]:
    """All that it listened on at any of many looks, until `done()` or its end."""
    found, deadline = set(), time.monotonic() + seconds
    while True:
        found |= listening(pid)
        if done() or _has_ended(pid):
            return found
        assert time.monotonic() < deadline, f"not done after {seconds} s; it listens on {found}"
        time.sleep(0.1)


def beyond_loopback(sockets: set[Socket]) -> set[Socket]:
    return {item for item in sockets if not _plain(item[0]).is_loopback}


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """An IPv4 address also where a socket of both kinds has it as ::ffff:A.B.C.D."""
    found = ipaddress.ip_address(address)
    return getattr(found, "ipv4_mapped", None) or found
