"""Ranks in real processes: what they tell each other, where they meet, and a peer that is none of ours."""

import json
import os
import pickle
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from ddetr.core.config import TrainConfig
from ddetr.core.training.network import hosted_store, own_address
from ddetr.core.training.world import join
from ddetr.ops.library import UNAVAILABLE

from tests.core.runs import SMALL, command, free_port
from tests.processes import Command

JOIN = """
import json, os, pickle, sys
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from ddetr.core.config import TrainConfig
from ddetr.core.training.world import World, join

def ours():
    return join(TrainConfig(device="cpu", threads=1))

def stranger():
    "Somebody in the place of a rank, with torch alone."
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, 2, False, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)

class Harmful:
    def __reduce__(self):
        return os.system, ("touch " + sys.argv[1],)

def send(content, length=None):
    "What all ranks gather."
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(lengths, torch.tensor([len(content) if length is None else length]))
    longest = max(int(length) for length in lengths)
    if longest <= 1 << 20:
        mine = torch.zeros(longest, dtype=torch.uint8)
        mine[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        dist.all_gather([torch.zeros(longest, dtype=torch.uint8) for _ in range(2)], mine)
"""


def two(folder: Path, code: str, second: str = "", **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks that run `code`; the second one `second` where it is given."""
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **variables}
    processes = []
    for rank in range(2):
        program = folder / f"rank{rank}.py"
        program.write_text(JOIN + ((rank and second) or code))
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(Command(folder / "executed", environment=own, folder=folder, program=program))
    try:
        statuses = [process.wait(300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [
        subprocess.CompletedProcess(process.args, status, process.stdout, process.stderr)
        for process, status in zip(processes, statuses, strict=True)
    ]


TALK = """
world = ours()
gathered = world.gather([float("nan"), 0.1 + world.rank] * (world.rank + 1), float)
first = world.to_first((Path("/a"), world.rank), tuple[Path, int])
chosen = world.agree(lambda: {"AP": -0.0, "of": float("inf")}, dict[str, float])
nothing = world.agree(lambda: None, Path | None)
errors = []
for mistake in (lambda: Path("absent").open(), lambda: int("x"), lambda: Path("absent").unlink(),
                lambda: "no number"):
    try:
        world.agree(mistake, int)
    except (ValueError, OSError) as error:
        errors.append(f"{type(error).__name__}: {error}")
print(repr((gathered, first, chosen, nothing, errors)))
"""


@pytest.mark.slow
def test_what_two_ranks_tell_each_other(tmp_path: Path) -> None:
    ranks = two(tmp_path, TALK)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr + ranks[1].stderr
    said = [rank.stdout.splitlines()[-1] for rank in ranks]
    gathered = "[nan, 0.1, nan, 1.1, nan, 1.1]"
    assert said[0].startswith(f"({gathered}, [(PosixPath('/a'), 0), (PosixPath('/a'), 1)], {{'AP': -0.0, 'of': inf}}")
    assert said[1].startswith(f"({gathered}, [], {{'AP': -0.0, 'of': inf}}, None, [")
    errors = [line.partition(", None, ")[2] for line in said]
    assert errors[0] == errors[1]
    absent = "FileNotFoundError: [Errno 2] No such file or directory: "
    assert errors[0].count(f"{absent}'absent'") == 2
    assert errors[0].count("ValueError: invalid literal for int() with base 10: 'x'") == 1
    assert "ValueError: not int, which the ranks expect" in errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ("send(pickle.dumps([Harmful()]))", "rank 1 sent b'\\x80\\x04"),
        ("send(b'[\"one\"]')", "which is not list[int]: [0] Input should be a valid integer"),
        ("send(b'', 1 << 40)", "rank 1 announces 1099511627776 bytes"),
        ("send(b'', -1)", "rank 1 announces -1 bytes"),
    ],
    ids=["pickle", "other type", "too much", "less than nothing"],
)
def test_a_stranger_in_the_place_of_a_rank(sent: str, message: str, tmp_path: Path) -> None:
    """Is a clear error, and nothing of what it sends is executed."""
    code = (
        "world = ours()\ntry:\n    print(world.gather([world.rank], int))\nexcept OSError as error:\n    print(error)"
    )
    first, _ = two(tmp_path, code, f"stranger()\n{sent}")
    assert first.returncode == 0, first.stderr
    assert message in first.stdout
    assert not (tmp_path / "executed").exists()
    assert pickle.dumps([1])[:2] == b"\x80\x04", "the default of another Python"


@pytest.mark.slow
def test_ranks_of_one_machine_meet_on_loopback_whatever_the_launcher_says(tmp_path: Path) -> None:
    """DeepSpeed's launcher names an address of the network even for a single host, and calls the number LOCAL_SIZE."""
    code = "world = ours()\nprint(json.dumps({k: os.environ.get(k) for k in ('MASTER_ADDR', 'GLOO_SOCKET_IFNAME',"
    code += " 'NCCL_SOCKET_IFNAME')}))\ndist.barrier()"
    for rank in two(tmp_path, code, MASTER_ADDR="192.0.2.1", LOCAL_SIZE="2"):
        assert rank.returncode == 0, rank.stderr
        assert json.loads(rank.stdout.splitlines()[-1]) == {
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }


UNPICKLED = """
import os, pickle, sys

def record():
    with open(os.environ["DDETR_UNPICKLED"], "a") as file:
        print(sys._getframe(2).f_code.co_filename, file=file)

class Unpickler(pickle.Unpickler):
    def __init__(self, *arguments, **more):
        record()
        super().__init__(*arguments, **more)

def recorded(function):
    def call(*arguments, **more):
        record()
        return function(*arguments, **more)
    return call

if "RANK" in os.environ:
    pickle.Unpickler, pickle.load, pickle.loads = Unpickler, recorded(pickle.load), recorded(pickle.loads)
"""


@pytest.mark.slow
def test_a_rank_unpickles_what_its_own_loader_sends_and_nothing_else(synthetic_shards: Path, tmp_path: Path) -> None:
    """With all that ranks tell each other: ZeRO stage 3, checkpoints, an evaluation; torch and DeepSpeed included."""
    (tmp_path / "sitecustomize.py").write_text(UNPICKLED)
    settings = [f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", f"train.output={tmp_path}"]
    settings += ["train.name=run", "train.zero_stage=3", "train.max_steps=6", "train.evaluate_every_epochs=1"]
    line = command(2, "tiny", *SMALL, *settings, "data.workers=1")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "DDETR_UNPICKLED": str(tmp_path / "unpickled")}
    result = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "evaluated step 6" in result.stdout
    found = {Path(line).parent.name for line in (tmp_path / "unpickled").read_text().splitlines()}
    assert found == {"multiprocessing"}, "pipes between a rank and its own loader"


def test_a_store_listens_where_it_was_told_alone() -> None:
    from datetime import timedelta

    store, port = hosted_store("127.0.0.1", 0, timedelta(seconds=10))
    store.set("key", "value")
    with socket.create_connection(("127.0.0.1", port), timeout=5):
        pass
    for other in ("127.0.0.2", "::1"):
        with pytest.raises(OSError, match=r"refused|Cannot assign|unreachable"):
            socket.create_connection((other, port), timeout=5)
    with pytest.raises(OSError, match=rf"port {port} of 127\.0\.0\.1 is taken by another process"):
        hosted_store("127.0.0.1", port, timedelta(seconds=10))
    with pytest.raises(OSError, match=r"192\.0\.2\.1 port 0, where the ranks meet: Cannot assign requested address"):
        hosted_store("192.0.2.1", 0, timedelta(seconds=10))


def test_addresses_of_this_machine_and_others() -> None:
    assert own_address("127.0.0.1") == "127.0.0.1"
    assert own_address("localhost") in ("127.0.0.1", "::1")
    assert own_address("192.0.2.1") is None
    with pytest.raises(OSError, match=r"no-such-host\.invalid, where the ranks meet, cannot be resolved here"):
        own_address("no-such-host.invalid")


REFUSED = [
    ({"WORLD_SIZE": "2"}, ValueError, "WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT not set: where do the ranks meet"),
    (
        {"WORLD_SIZE": "2", "MASTER_ADDR": "192.0.2.1", "MASTER_PORT": "1"},
        OSError,
        rf"MASTER_ADDR=192.0.2.1 is no address of this machine, {socket.gethostname()}, where rank 0 is",
    ),
]


@pytest.mark.parametrize(("variables", "error", "message"), REFUSED)
def test_ranks_that_cannot_meet_are_told_why(
    variables: dict[str, str], error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
    }
    for name, value in (given | variables).items():
        monkeypatch.setenv(name, value)
    for name in {"MASTER_ADDR", "MASTER_PORT"} - variables.keys():
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(error, match=message):
        join(TrainConfig(device="cpu", threads=torch.get_num_threads()))


def test_a_device_without_the_op_is_refused_before_anything_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setitem(UNAVAILABLE, "cpu", "it was not built")
    with pytest.raises(OSError, match="the attention op cannot run on cpu: it was not built"):
        join(TrainConfig(device="cpu"))
