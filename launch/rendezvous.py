"""The rendezvous of a run's nodes under torchrun, without a pickle and without a port on every interface.

torch's own rendezvous listens on all interfaces, and an elastic one keeps its state as a pickle that anyone who reaches
the port can replace. Those here listen only at the address where the nodes meet, and keep their state as JSON.
"""

import datetime
import os
import pickle
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, NonNegativeInt, ValidationError
from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStateError,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import (
    RendezvousBackend,
    Token,
    _NodeDesc,
    _RendezvousState,
    create_handler,
)
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from ..core.training.network import hosted_store, own_address
from ..data.text import visible

NAME = "ddetr"  # among torchrun's --rdzv-backend
DEFAULT_PORT = 29500
NAME_SECONDS = 120.0  # for the name of a pod that is just starting to become known
_ANSWER = datetime.timedelta(seconds=60)  # of the store, where nodes come and go
_NONE_YET = "none yet"  # a key that is not there would be waited for


def register() -> None:
    """Make this rendezvous known to torchrun in this process."""
    rendezvous_handler_registry.register(NAME, create)


def create(parameters: RendezvousParameters) -> RendezvousHandler:
    """The rendezvous of nodes with fixed numbers if the parameter `rank` is given, otherwise of nodes that come and go.

    Raises ValueError for a `rank` out of range, OSError when the place to meet cannot be used.
    """
    rank = parameters.get_as_int("rank")
    if rank is not None and not 0 <= rank < parameters.max_nodes:
        raise ValueError(f"node rank {rank} of {parameters.max_nodes} node(s): they are numbered from 0")
    host, port = parse_rendezvous_endpoint(parameters.endpoint, DEFAULT_PORT)
    if rank is not None:
        return NumberedNodes(host, port, rank, parameters)
    # A node that comes back asks for the address of this round's store, which an old one tells only when it makes a
    # new one; and the one that they would share listens on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    address = own_address(host, NAME_SECONDS)
    store = TCPStore(host, port, None, False, _ANSWER) if address is None else hosted_store(address, port, _ANSWER)[0]
    return create_handler(store, JsonState(store, parameters.run_id, f"{host}:{port}"), parameters)


class NumberedNodes(RendezvousHandler):
    """Each node has its number from the start, and a lost one ends the run: they share a store on node 0, no state."""

    def __init__(self, host: str, port: int, rank: int, parameters: RendezvousParameters) -> None:
        self._host, self._port, self._rank = host, port, rank
        self._nodes, self._run_id = parameters.max_nodes, parameters.run_id
        self._timeout = datetime.timedelta(seconds=parameters.get_as_int("timeout", 900) or 900)
        self._store: Store | None = None

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._nodes == 1:  # a restart meets at a store without what the last round left
            self._store, self._port = None, 0
        if self._store is None and self._rank == 0:
            address = own_address(self._host, NAME_SECONDS)
            if address is None:
                raise OSError(f"{self._host}, where the nodes meet, is not this machine, which is node 0")
            self._store, self._port = hosted_store(address, self._port, self._timeout, self._nodes)
            self._host = address
        elif self._store is None:
            self._store = TCPStore(self._host, self._port, self._nodes, False, self._timeout)
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, self._rank, self._nodes, RendezvousStoreInfo(self._host, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Node(_Strict):
    addr: str
    pid: int
    local_id: int


class _State(_Strict):
    """What torch's _RendezvousState holds; a list of pairs where that has nodes as keys."""

    round: NonNegativeInt
    complete: bool
    deadline: AwareDatetime | None
    closed: bool
    participants: list[tuple[_Node, NonNegativeInt]]
    wait_list: list[_Node]
    redundancy_list: list[_Node]
    last_heartbeats: list[tuple[_Node, AwareDatetime]]


class JsonState(RendezvousBackend):
    """The state of a rendezvous as JSON under one key of a store.

    torch's handler gives and takes pickles. Those that it gives are its own; those that it takes are made here, of what
    the JSON says. Raises RendezvousStateError for a state that no node of ddetr can have written.
    """

    def __init__(self, store: Store, run_id: str, place: str) -> None:
        if vars(_RendezvousState()).keys() != _State.model_fields.keys():
            raise RendezvousStateError("this version of torch keeps another rendezvous state than ddetr knows")
        self._store, self._key, self._place = store, f"ddetr/{run_id}", place
        self._call(self._store.compare_set, self._key, "", _NONE_YET)

    @property
    def name(self) -> str:
        return NAME

    def get_state(self) -> tuple[bytes, Token] | None:
        return self._read(self._call(self._store.get, self._key))

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        ours = _written(pickle.loads(state))  # of this very process
        theirs = self._call(self._store.compare_set, self._key, (token or _NONE_YET.encode()).decode(), ours)
        read = self._read(theirs)
        return None if read is None else (*read, theirs == ours.encode())

    def _call(self, operation: Any, *arguments: str) -> bytes:
        try:
            return operation(*arguments)
        except (ValueError, RuntimeError) as error:
            raise RendezvousConnectionError(f"the store at {self._place}, where the nodes meet: {error}") from error

    def _read(self, content: bytes) -> tuple[bytes, Token] | None:
        if content == _NONE_YET.encode():
            return None
        try:
            state = _State.model_validate_json(content)
        except ValidationError as error:
            mistake = error.errors(include_url=False, include_input=False)[0]
            raise RendezvousStateError(
                f"the store at {self._place}, where the nodes meet, holds {visible(repr(content[:40]))} where the "
                f"state of the run should be ({visible(mistake['msg'])}): what writes to it is no node of ddetr"
            ) from None
        return pickle.dumps(_restored(state)), content


def _written(state: _RendezvousState) -> str:
    def node(item: _NodeDesc) -> _Node:
        return _Node(addr=item.addr, pid=item.pid, local_id=item.local_id)

    return _State(
        round=state.round,
        complete=state.complete,
        deadline=state.deadline,
        closed=state.closed,
        participants=[(node(item), rank) for item, rank in state.participants.items()],
        wait_list=[node(item) for item in state.wait_list],
        redundancy_list=[node(item) for item in state.redundancy_list],
        last_heartbeats=[(node(item), time) for item, time in state.last_heartbeats.items()],
    ).model_dump_json()


def _restored(written: _State) -> _RendezvousState:
    def node(item: _Node) -> _NodeDesc:
        return _NodeDesc(item.addr, item.pid, item.local_id)

    state = _RendezvousState()
    state.round, state.complete = written.round, written.complete
    state.deadline, state.closed = written.deadline, written.closed
    state.participants = {node(item): rank for item, rank in written.participants}
    state.wait_list = {node(item) for item in written.wait_list}
    state.redundancy_list = {node(item) for item in written.redundancy_list}
    state.last_heartbeats = {node(item): time for item, time in written.last_heartbeats}
    return state
