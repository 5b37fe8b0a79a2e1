"""A Ray cluster to run on: an existing one, or one that lives as long as the command.

Anyone who reaches the ports of a Ray cluster, with its token if it wants one, can run code there. The ports of a
cluster of our own are therefore on loopback alone, its files in a folder that only this user may enter, and its token
is new.
"""

import contextlib
import logging
import os
import secrets
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import psutil

from ..data.addresses import RAY_ADDRESS

REACHABLE_SECONDS = 5.0
OBJECT_STORE_BYTES = 2 << 30  # of a cluster of our own; its largest objects are a detector's weights
START = "Start one with `ray start --head` and join nodes with `ray start --address=HOST:PORT`"
TOKEN = (
    "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=TOKEN, the cluster's own, here and wherever `ray start` runs "
    "(RAY_AUTH_TOKEN_PATH=FILE and ~/.ray/auth_token hold a token as well)"
)
# Asked without credentials, a Ray tells whether it wants any. Servers at ray:// addresses answer other questions.
_QUESTION, _QUESTION_OF_CLIENTS = "/ray.rpc.NodeInfoGcsService/GetClusterId", "/ray.rpc.RayletDriver/ClusterInfo"


class ClusterError(ConnectionError):
    """A Ray cluster cannot be used now, or not from here; it may be later."""


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """Connect to the Ray at `address` (HOST:PORT, ray://HOST:PORT or auto); `local` starts one and stops it again.

    A connection that the caller already holds is used and kept. Raises ClusterError when there is no Ray, or one
    that wants a token which this process does not have.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when ray is imported
    import ray

    if ray.is_initialized():
        yield
    elif address == "local":
        with _own():
            yield
    else:
        with reachable(address) as found:
            if not found.startswith("ray://"):
                _check_is_node(found)
            with _connected(address=found):
                yield


@contextlib.contextmanager
def reachable(address: str) -> Iterator[str]:
    """A context in which Ray's clients have what the cluster at `address`, not `local`, wants of them.

    Yields the address, that of a cluster here for `auto`. Raises as `cluster`.
    """
    given = f"Ray address {address!r}"
    if address == "auto" and (named := os.environ.get("RAY_ADDRESS", "auto")) != "auto":
        given, address = f"RAY_ADDRESS={named}", named
    if not RAY_ADDRESS.fullmatch(address) or (address == "local" and given.startswith("RAY_ADDRESS")):
        raise ValueError(f"{given}: expected HOST:PORT, ray://HOST:PORT, auto or local")
    if address == "auto":
        address = _running_here()
    _check_reachable(address)
    with _environment({"RAY_AUTH_MODE": _authentication(address)}):
        yield address


@contextlib.contextmanager
def _own() -> Iterator[None]:
    from ray._private import ray_constants

    token = {"RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"), "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tempfile.mkdtemp(prefix="ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp"))  # its sockets' paths are short
    inside = os.path.join(folder, "ray")  # which Ray opens to everyone
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    # A Ray that cannot be joined by other machines takes 127.0.0.1 for its address, and then listens on that alone. As
    # an argument of ray.init it would be replaced by the address that other machines know.
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        with _environment(token):
            memory = min(OBJECT_STORE_BYTES, int(0.3 * psutil.virtual_memory().available))  # at most Ray's own share
            with _connected(address="local", include_dashboard=False, object_store_memory=memory, _temp_dir=inside):
                yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        shutil.rmtree(folder, ignore_errors=True)  # one of Ray's processes may still end, and write there


@contextlib.contextmanager
def _connected(address: str, **options: Any) -> Iterator[None]:
    import ray

    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster at {address!r}: {error}. {START}") from error
    except RuntimeError as error:  # other versions of Ray or Python there, as it says
        raise ClusterError(f"the Ray cluster at {address!r} cannot be used: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _authentication(address: str) -> str:
    """RAY_AUTH_MODE for a cluster. Ray's default for an address is `disabled`, whether or not there is a token here.

    The user's own setting stays. A token is sent only to a cluster that wants one: with it the client wants tokens
    itself, and refuses the workers of a cluster without. Raises ClusterError when the cluster refuses what it gets.
    """
    from ray.exceptions import AuthenticationError

    given = os.environ.get("RAY_AUTH_MODE")
    if not _refused(address, "disabled"):
        return given or "disabled"
    wants = f"the Ray cluster at {address} wants a token"
    if given is not None and given.lower() != "token":
        raise ClusterError(f"{wants}, but RAY_AUTH_MODE={given} sends none: {TOKEN}")
    try:
        found = _compiled().AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True)
    except AuthenticationError as error:
        raise ClusterError(f"{wants}, but {error.message}: {TOKEN}") from error
    if not found:
        raise ClusterError(f"{wants}, and there is none here: {TOKEN}")
    if _refused(address, "token"):
        raise ClusterError(f"{wants}, and refuses the one that it gets from here: {TOKEN}")
    return "token"


def _refused(address: str, mode: str) -> bool:
    """Whether the cluster does not answer a client with this RAY_AUTH_MODE for want of the right token."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel

    question = _QUESTION_OF_CLIENTS if address.startswith("ray://") else _QUESTION
    with _environment({"RAY_AUTH_MODE": mode}):
        options = [("grpc.enable_http_proxy", 0)]  # as for all of Ray's connections
        connection: Any = init_grpc_channel(address.removeprefix("ray://"), options)
        with connection as channel:
            try:
                channel.unary_unary(question)(b"", timeout=REACHABLE_SECONDS)
            except grpc.RpcError as error:  # of others Ray tells more when it connects
                return error.code() is grpc.StatusCode.UNAUTHENTICATED
    return False


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """A context with environment variables for Ray, in this process and those that it starts."""
    before = {name: os.environ.get(name) for name in variables}
    try:
        os.environ.update(variables)
        _read_again()
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _read_again()


def _read_again() -> None:
    """Have Ray read variables and token again: by itself it does so once."""
    compiled = _compiled()
    compiled.Config.initialize("")
    compiled.AuthenticationTokenLoader.instance().reset_cache()


def _compiled() -> Any:
    """The part of Ray whose names a type checker does not see."""
    from ray import _raylet

    return _raylet


def _check_is_node(address: str) -> None:
    """Raise ClusterError unless this machine is a node of the cluster: Ray itself ends the process then."""
    from ray.exceptions import RpcError

    try:
        nodes = _compiled().GcsClient(address=address).get_all_node_info(timeout=REACHABLE_SECONDS).values()
    except RpcError as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({error}). {START}") from error
    theirs = {node.node_manager_address for node in nodes if node.state == 0}  # alive
    own = {item.address.partition("%")[0] for items in psutil.net_if_addrs().values() for item in items}
    if not theirs & own:
        host = address.rpartition(":")[0]
        raise ClusterError(
            f"this machine is no node of the Ray cluster at {address}: join it (`ray start --address={address}`), or "
            f"connect through its head with ray://{host}:10001, which is `ray start --ray-client-server-port`"
        )


def _running_here() -> str:
    from ray._private.services import canonicalize_bootstrap_address_or_die

    try:
        return canonicalize_bootstrap_address_or_die("auto")
    except ConnectionError as error:
        raise ClusterError(f"no Ray cluster runs on this machine. {START}") from error


def _check_reachable(address: str) -> None:
    """Ask the port first: Ray itself retries an address without a cluster for minutes, then ends the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster answers at {address} ({error}). {START}") from error
