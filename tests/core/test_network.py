"""Where ranks meet: a name is this machine, another one, or a mistake that is told with the way out."""

import os
import socket
from collections import namedtuple

import pytest
from ddetr.core.training import network
from ddetr.core.training.network import address_towards, keep_to, own_address

Interface = namedtuple("Interface", "address")
OTHER = "192.0.2.1"  # of no machine (RFC 5737)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Host -> its addresses, as this machine resolves them; and all but OTHER are its own."""
    known: dict[str, list[str]] = {}

    def resolved(host: str, port: int | None, type: int) -> list[tuple]:
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, type, 0, "", (address, port or 0)) for address in known[host]]

    monkeypatch.setattr(socket, "getaddrinfo", resolved)
    monkeypatch.setattr(network, "_is_own", lambda family, address: address[0] != OTHER)
    return known


def test_an_address_of_this_machine_comes_before_its_loopback(names: dict[str, list[str]]) -> None:
    names["node0"] = ["127.0.1.1", "10.0.0.5"]
    assert own_address("node0") == "10.0.0.5"
    names["node1"] = [OTHER]
    assert own_address("node1") is None


def test_a_name_that_leads_to_loopback_alone_is_refused(names: dict[str, list[str]]) -> None:
    names["node0"] = ["127.0.1.1"]
    with pytest.raises(
        OSError, match=r"node0, where the ranks meet, is 127.0.1.1 on this machine itself \(/etc/hosts\)"
    ):
        own_address("node0")


def test_a_name_that_is_not_known_yet_is_waited_for(names: dict[str, list[str]], monkeypatch) -> None:
    monkeypatch.setattr(network.time, "sleep", lambda seconds: names.update(pod=["10.0.0.5"]))
    with pytest.raises(OSError, match="pod, where the ranks meet, cannot be resolved here: Name or service not known"):
        own_address("pod")
    assert own_address("pod", patience=60) == "10.0.0.5"


def test_the_address_towards_another_machine() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(OSError, match=r"no way from here to 255.255.255.255, where the ranks meet: (Permis|Network)"):
        address_towards("255.255.255.255")


@pytest.mark.parametrize(
    ("address", "interface"), [("10.0.0.5", "eth1"), ("127.0.0.1", "lo"), ("127.0.1.1", "lo"), ("fe80::1%eth1", "eth1")]
)
def test_gloo_keeps_to_the_interface_of_the_address(address: str, interface: str, monkeypatch) -> None:
    there = {"lo": [Interface("127.0.0.1")], "eth1": [Interface("10.0.0.5"), Interface("fe80::1%eth1")]}
    monkeypatch.setattr("psutil.net_if_addrs", lambda: there)
    monkeypatch.setattr(network, "own_address", lambda host: address)
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # so that it is as it was after the test
        monkeypatch.delenv(name)
    keep_to("node0", alone=False)
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface
    assert "NCCL_SOCKET_IFNAME" not in os.environ, "it finds its own"
    keep_to("node1", alone=True)
    assert os.environ["GLOO_SOCKET_IFNAME"] == interface, "what is set stays"


def test_an_address_of_no_interface_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "own_address", lambda host: OTHER)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with pytest.raises(OSError, match=rf"no network interface of this machine has {OTHER}: set GLOO_SOCKET_IFNAME"):
        keep_to("node0", alone=False)
