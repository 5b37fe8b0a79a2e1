"""Rendezvous: where the ranks of a run meet, and on which of a machine's addresses the store, gloo and NCCL listen."""

import datetime
import errno
import ipaddress
import os
import socket
import time

import torch.distributed as dist

LOOPBACK = "127.0.0.1"
_BACKLOG = 2048  # ranks that connect at the same time


def hosted_store(
    address: str, port: int, timeout: datetime.timedelta, clients: int | None = None
) -> tuple[dist.TCPStore, int]:
    """A TCPStore that listens at this numeric address of this machine alone, and its port; port 0 takes a free one.

    torch's own listens on every interface, whatever host it is given. clients: how many to wait for.
    Raises OSError when it cannot listen there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        listener = socket.create_server((address, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"port {port} of {address} is taken by another process; let the ranks meet at another"
            ) from error
        raise OSError(f"{address} port {port}, where the ranks meet: {error.strerror}") from error
    port = listener.getsockname()[1]
    descriptor = listener.detach()  # the store closes it
    return dist.TCPStore(address, port, clients, True, timeout, master_listen_fd=descriptor), port


def own_address(host: str, patience: float = 0) -> str | None:
    """The numeric address of `host` if this machine has it, otherwise None.

    patience: seconds to wait until the name resolves, as that of a new pod does.
    Raises OSError when it does not, or when the name of this machine resolves here to loopback alone, where no other
    machine reaches it.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
            break
        except socket.gaierror as error:
            if time.monotonic() >= deadline:
                raise OSError(f"{host}, where the ranks meet, cannot be resolved here: {error.strerror}") from error
        time.sleep(1)
    own = [str(address[0]) for family, _, _, _, address in found if _is_own(family, address)]
    if not own:
        return None
    for address in own:
        if not ipaddress.ip_address(address.partition("%")[0]).is_loopback:
            return address
    if host not in (*own, "localhost"):
        raise OSError(
            f"{host}, where the ranks meet, is {own[0]} on this machine itself (/etc/hosts), where no other "
            "reaches it: instead of the name give the address by which the others reach this machine"
        )
    return own[0]


def address_towards(host: str) -> str:
    """This machine's numeric address on the route to `host`. Raises OSError when there is none."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise OSError(f"no way from here to {host}, where the ranks meet: {error.strerror}") from error


def keep_to(host: str, alone: bool) -> None:
    """Set the network interface of gloo and NCCL to loopback when all ranks are on this machine.

    Otherwise set that of gloo to the one on the route to `host`: by default gloo takes the interface of this machine's
    name. NCCL finds its own. What the user has set stays. Raises OSError when no interface has the address.
    """
    if alone:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    elif "GLOO_SOCKET_IFNAME" not in os.environ:
        os.environ["GLOO_SOCKET_IFNAME"] = _interface(own_address(host) or address_towards(host))


def _is_own(family: int, address: tuple) -> bool:
    """Whether this machine has the address: the kernel refuses to bind to that of another machine."""
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address[0], 0, *address[2:]))
        except OSError:
            return False
    return True


def _interface(address: str) -> str:
    """The network interface of this machine that has the address."""
    import psutil

    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address.partition("%")[0] == address.partition("%")[0] for item in addresses):
            return name
    if ipaddress.ip_address(address).is_loopback:  # all of 127.0.0.0/8 is
        return "lo"
    raise OSError(f"no network interface of this machine has {address}: set GLOO_SOCKET_IFNAME to the one to use")
