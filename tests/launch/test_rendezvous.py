"""The state of a rendezvous in a real store, between torch's own handlers, and what no node of ours wrote there."""

import base64
import os
import pickle
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
from ddetr.core.training.network import hosted_store
from ddetr.launch import rendezvous, torchrun
from ddetr.launch.torchrun import settled
from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousParameters,
    RendezvousStateError,
    rendezvous_handler_registry,
)
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import _NodeDesc, _RendezvousState, create_handler
from torch.distributed.run import parse_args

from tests.core.runs import SMALL, collect, free_port, start, succeeded, wait_for

TIMEOUT = timedelta(seconds=20)


@pytest.fixture
def store() -> TCPStore:
    return hosted_store("127.0.0.1", 0, TIMEOUT)[0]


def example() -> _RendezvousState:
    first, second, third = (_NodeDesc("10.0.0.1", 7, number) for number in range(3))
    state = _RendezvousState()
    state.round, state.complete, state.closed = 3, True, False
    state.deadline = datetime.now(UTC)
    state.participants, state.wait_list, state.redundancy_list = {second: 0, first: 1}, {third}, {first}
    state.last_heartbeats = {first: datetime.now(UTC), second: datetime.now(UTC)}
    return state


def test_a_state_comes_back_as_it_was(store: TCPStore) -> None:
    ours, theirs = (rendezvous.JsonState(store, "run", "here") for _ in range(2))
    assert ours.get_state() is None
    written = ours.set_state(pickle.dumps(example()))
    assert written is not None
    assert written[2]
    read = theirs.get_state()
    assert read is not None
    assert list(vars(pickle.loads(read[0]))) == list(vars(example()))
    for name, value in vars(pickle.loads(read[0])).items():
        if name not in ("deadline", "last_heartbeats"):
            assert value == getattr(example(), name)
    assert store.get("ddetr/run").startswith(b'{"round":3,')
    late = theirs.set_state(pickle.dumps(_RendezvousState()), None)
    assert late is not None
    assert not late[2], "a state that is there already is not replaced"
    changed = theirs.set_state(pickle.dumps(_RendezvousState()), read[1])
    assert changed is not None
    assert changed[2]
    stale = ours.set_state(pickle.dumps(example()), read[1])
    assert stale is not None
    assert not stale[2]


class Harmful:
    def __init__(self, file: Path) -> None:
        self._file = file

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self._file}",)


@pytest.mark.integration
def test_what_no_node_wrote_is_refused(store: TCPStore, tmp_path: Path) -> None:
    state = rendezvous.JsonState(store, "run", "node0:29500")
    harm = pickle.dumps(Harmful(tmp_path / "executed"))
    node = '{"addr":"a","pid":"1","local_id":0}'
    plain = '{"round":0,"complete":false,"deadline":null,"closed":false,"participants":[],"wait_list":[%s],'
    plain += '"redundancy_list":[],"last_heartbeats":[]%s}'
    wrong = [harm, base64.b64encode(harm), b"", b"[" * 10_000, b"\x1b[2J", b"{}", (plain % (node, "")).encode()]
    wrong += [(plain % ("", ',"more":1')).encode()]
    for content in wrong:
        store.set("ddetr/run", content)
        for act in (state.get_state, lambda: state.set_state(pickle.dumps(example()), b"a token")):
            with pytest.raises(RendezvousStateError, match="the store at node0:29500, where the nodes meet") as error:
                act()
            assert str(error.value).isprintable()
    assert not (tmp_path / "executed").exists()
    pickle.loads(harm)
    assert (tmp_path / "executed").exists(), "that was no attack"


def test_nodes_meet_by_torchs_own_handler() -> None:
    """Two of them, in threads; each gets its number, and what the other writes to their store."""
    rendezvous.register()
    rendezvous.register()
    port, found = free_port(), {}

    def node(number: int) -> None:
        parameters = RendezvousParameters(
            rendezvous.NAME, f"127.0.0.1:{port}", "run", 2, 2, local_addr=f"10.0.0.{number}", join_timeout=60
        )
        if number == 0:
            handler = rendezvous_handler_registry.create_handler(parameters)
        else:  # as on another machine
            store = TCPStore("127.0.0.1", port, is_master=False, timeout=TIMEOUT)
            handler = create_handler(store, rendezvous.JsonState(store, "run", "node0"), parameters)
        info = handler.next_rendezvous()
        kept.append((handler, info))
        info.store.set(str(info.rank), f"node {number}")
        other = info.store.get(str(1 - info.rank)).decode()
        found[number] = (info.rank, info.world_size, other, info.bootstrap_store_info)

    kept: list[object] = []  # one of them is the server of the store: it must not end before the other has read
    threads = [threading.Thread(target=node, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(rank for rank, *_ in found.values()) == [0, 1], found
    assert {size for _, size, *_ in found.values()} == {2}
    assert (found[0][2], found[1][2]) == ("node 1", "node 0")
    assert found[0][3] == found[1][3], "they differ in where the ranks meet"
    first = next(number for number, (rank, *_) in found.items() if rank == 0)
    assert found[0][3].master_addr == f"10.0.0.{first}"


def test_numbered_nodes_meet_at_node_0() -> None:
    port = free_port()
    parameters = RendezvousParameters(rendezvous.NAME, f"127.0.0.1:{port}", "run", 2, 2, timeout=20)
    nodes = [rendezvous.NumberedNodes("127.0.0.1", port, number, parameters) for number in range(2)]
    found = {}

    def meet(number: int) -> None:
        found[number] = nodes[number].next_rendezvous()

    threads = [threading.Thread(target=meet, args=(number,), daemon=True) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    found[0].store.set("word", "of node 0")
    assert found[1].store.get("word") == b"of node 0"
    assert [(info.rank, info.world_size) for _, info in sorted(found.items())] == [(0, 2), (1, 2)]
    for node in nodes:
        node.set_closed()
        assert not node.is_closed(), "a run that has ended closes nothing: its store ends with node 0"


def test_a_store_that_is_gone_and_another_torch_are_named(store: TCPStore, monkeypatch) -> None:
    class Gone:
        def compare_set(self, *arguments: str) -> bytes:
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(RendezvousConnectionError, match="the store at node0:1, where the nodes meet: Connection reset"):
        rendezvous.JsonState(cast(Any, Gone()), "run", "node0:1")
    monkeypatch.setattr(rendezvous, "_RendezvousState", lambda: SimpleNamespace(another=1))
    with pytest.raises(RendezvousStateError, match="this version of torch keeps another rendezvous state"):
        rendezvous.JsonState(store, "run", "node0:1")


def test_options_become_ours() -> None:
    def of(*options: str) -> dict:
        return vars(settled(parse_args([*options, "script"])))

    for one in (["--standalone"], ["--nnodes", "1"], ["--nnodes=1", "--master-addr=10.0.0.1", "--master-port=29500"]):
        options = of(*one)
        assert (options["rdzv_backend"], options["rdzv_endpoint"], options["standalone"]) == (
            "ddetr",
            "127.0.0.1:0",
            False,
        )
        assert (options["rdzv_conf"], options["local_addr"]) == ("rank=0", "127.0.0.1")
    options = of("--nnodes=2", "--node-rank=1", "--master-addr=192.0.2.1", "--rdzv-conf=timeout=5")
    assert (options["rdzv_endpoint"], options["rdzv_conf"]) == ("192.0.2.1:29500", "timeout=5,rank=1")
    options = of("--nnodes=1:2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:1234")
    assert (options["rdzv_backend"], options["rdzv_conf"], options["local_addr"]) == ("ddetr", "", "127.0.0.1")
    with pytest.raises(ValueError, match="--rdzv-backend etcd: nodes meet by static"):
        of("--nnodes=2", "--rdzv-backend=etcd", "--rdzv-endpoint=a:1")


@pytest.mark.integration
def test_wrong_use_is_one_message() -> None:
    with pytest.raises(ValueError, match=r"node rank 2 of 2 node\(s\)"):
        rendezvous.create(RendezvousParameters(rendezvous.NAME, "127.0.0.1:1", "run", 2, 2, rank="2"))
    options = ["--nnodes=2", "--node-rank=0", "--master-addr=192.0.2.1", "--nproc-per-node=1"]
    line = [sys.executable, "-m", "ddetr.launch.torchrun", *options, "--", "train", "tiny"]
    result = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stderr
    assert result.stderr == "torchrun: 192.0.2.1, where the nodes meet, is not this machine, which is node 0\n"


@pytest.mark.slow
def test_ranks_of_one_node_start_again(synthetic_shards: Path, tmp_path: Path) -> None:
    """At a store of their own: what the lost round left in the old one would mislead them."""
    launcher = ["-m", "ddetr.launch.torchrun", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "--", "train"]
    settings = [*SMALL, f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=run"]
    settings += ["train.auto_resume=true", "train.checkpoint_every_steps=2", "train.max_steps=40"]
    process = start([sys.executable, *launcher, "tiny", *settings])
    wait_for(tmp_path / "run/checkpoints/step_00000004", process)
    ranks = [child for child in psutil.Process(process.pid).children() if "train" in child.cmdline()]
    assert len(ranks) == 2
    ranks[1].kill()
    output, _ = process.communicate(timeout=300)
    run = collect(tmp_path / "run", output, process.returncode)
    assert succeeded(run).steps[-1]["step"] == 40
    assert [event["event"] for event in run.events].count("resume") == 1


@pytest.mark.integration
def test_nodes_with_numbers_do_not_start_again() -> None:
    command = [sys.executable, "-m", "ddetr.launch.torchrun", "--nnodes=2", "--node-rank=0", "--master-addr=127.0.0.1"]
    done = subprocess.run([*command, "--max-restarts=1", "--", "train"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "--max-restarts is for nodes that come and go" in done.stderr


def test_a_lost_meeting_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(options: list[str]) -> None:
        raise RendezvousConnectionError("the store at node0:1, where the nodes meet: Connection reset")

    monkeypatch.setattr(torchrun, "launch", lost)
    monkeypatch.setattr(torchrun.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["torchrun", "--standalone", "--", "train", "tiny"])
    with pytest.raises(SystemExit) as ended:
        torchrun.main()
    assert ended.value.code == "torchrun: the store at node0:1, where the nodes meet: Connection reset"
