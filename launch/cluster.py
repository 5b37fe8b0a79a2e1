"""A Ray cluster to run on: one that is there, or one that lives as long as the command."""

import contextlib
import os
import socket
import warnings
from collections.abc import Iterator

REACHABLE_SECONDS = 5.0
START = "Start one with `ray start --head` and join nodes with `ray start --address=HOST:PORT`"
TOKEN = "A cluster with token authentication, Ray's default, wants its token in RAY_AUTH_TOKEN here and on every node"


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connect to the Ray at `address` (HOST:PORT, ray://HOST:PORT or auto); `local` starts one and stops it again.

    A connection that the caller already holds is used and kept. Raises ConnectionError when there is no Ray.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    import ray

    if ray.is_initialized():
        yield
        return
    _check_reachable(address)
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            if address == "local":
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise ConnectionError(f"no Ray cluster at {address!r}: {error}. {START}. {TOKEN}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ask the port first: Ray itself retries an address without a cluster for minutes, then ends the process."""
    if address in ("local", "auto"):
        return
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        raise ValueError(f"Ray address {address!r}: expected HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(f"no Ray cluster answers at {address} ({error}). {START}") from error
