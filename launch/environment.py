"""What the ranks find out about each other before the first step: their hosts, versions, common folder and network."""

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from ..core.config import Config
from ..core.engine import BUCKET_ELEMENTS
from ..core.world import World
from ..data.index import ShardIndex

MUST_AGREE = ("ddetr", "torch", "CUDA", "NCCL", "deepspeed", "shards")  # and the settings
MAY_DIFFER = ("device", "Python", "timm", "kernel")
VISIBLE_SECONDS = 15.0  # a network file system may show a new file that much later
_CODE = Path(__file__).parent.parent
_FOLDERS = ("core", "data", "launch", "monitoring", "ops")
# What each node may have for itself: paths, addresses, and how much it does at once.
_OWN_SETTINGS = {
    "data": {"train", "validation", "cache", "cache_bytes", "workers"},
    "monitor": True,
    "train": {"threads"},
}

Facts = dict[str, str]


def check(config: Config, world: World, indexes: Sequence[ShardIndex]) -> list[str]:
    """What to print about the machines of a run. Collective.

    Raises ValueError on every rank when something differs between them that would make them compute different things,
    or when train.output is not the same folder for all.
    """
    settings = _settings(config)
    everywhere: list[Facts] = world.gather([facts(config, world.device, indexes) | settings], Facts)
    if world.size == 1:
        return [f"1 rank on {everywhere[0]['host']}: {everywhere[0]['device']}"]
    lines = _hosts(everywhere)
    if differing := [f"{name}: {text}" for name in (*MUST_AGREE, *settings) if (text := _difference(everywhere, name))]:
        raise ValueError(f"the ranks differ in {'; '.join(differing)}. Make them the same on every host")
    lines += [f"{name} differs: {text}" for name in MAY_DIFFER if (text := _difference(everywhere, name))]
    _check_common_folder(Path(config.train.output), everywhere, world)
    if config.train.bandwidth_test_seconds:
        lines.append(_bandwidth(config.train.bandwidth_test_seconds, world))
    return lines


def facts(config: Config, device: torch.device, indexes: Sequence[ShardIndex]) -> Facts:
    """This rank's, each short enough for a message."""
    code, shards = hashlib.sha256(), hashlib.sha256()
    for folder in _FOLDERS:
        for file in sorted((_CODE / folder).glob("**/*.py")):
            code.update(file.read_bytes())
    for index in indexes:
        for shard in index.shards:
            shards.update(shard.sha256.encode())
    cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores",
        "ddetr": f"{importlib.metadata.version('ddetr')} ({code.hexdigest()[:8]})",
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda) if cuda else "none in use",
        "NCCL": ".".join(map(str, nccl.version())) if cuda else "none in use",
        "deepspeed": importlib.metadata.version("deepspeed"),
        "shards": shards.hexdigest()[:8],
        "Python": platform.python_version(),
        "timm": importlib.metadata.version("timm"),
        "kernel": platform.release(),
    }


def _settings(config: Config) -> Facts:
    sections = config.model_dump(mode="json", exclude=_OWN_SETTINGS)
    return {f"{section}.{key}": str(value) for section, keys in sections.items() for key, value in keys.items()}


def _hosts(everywhere: Sequence[Facts]) -> list[str]:
    """One line, with hosts of the same kind together."""
    ranks_of_host: dict[str, list[Facts]] = {}
    for one in everywhere:
        ranks_of_host.setdefault(one["host"], []).append(one)
    kinds: dict[str, list[str]] = {}
    for host, ranks in ranks_of_host.items():
        kinds.setdefault(f"{len(ranks)} x {ranks[0]['device']}", []).append(host)
    listed = "; ".join(f"{_shortened(hosts)} with {kind}" for kind, hosts in kinds.items())
    first = everywhere[0]
    versions = f"ddetr {first['ddetr']}, torch {first['torch']}, deepspeed {first['deepspeed']}"
    return [f"{len(everywhere)} ranks: {listed}", versions]


def _difference(everywhere: Sequence[Facts], name: str) -> str:
    """Which hosts have which value; empty when all have the same."""
    hosts: dict[str, dict[str, None]] = {}
    for one in everywhere:
        hosts.setdefault(one[name], {})[one["host"]] = None
    return "" if len(hosts) == 1 else ", ".join(f"{value} on {_shortened(list(on))}" for value, on in hosts.items())


def _shortened(hosts: list[str], most: int = 4) -> str:
    return ", ".join(hosts[:most]) + (f" and {len(hosts) - most} more" if len(hosts) > most else "")


def _check_common_folder(folder: Path, everywhere: Sequence[Facts], world: World) -> None:
    """Checkpoints are written by one rank and read by all."""

    def mark() -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        file = folder.resolve() / f".visible-{uuid.uuid4().hex}"
        file.touch()
        return file

    file: Path = world.agree(mark, Path)
    deadline = time.monotonic() + VISIBLE_SECONDS
    local = folder.resolve() / file.name  # the path may be another one here
    while not (visible := local.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    seen: list[bool] = world.gather([visible], bool)
    world.agree(file.unlink, None)
    if blind := list(dict.fromkeys(one["host"] for one, sees in zip(everywhere, seen, strict=True) if not sees)):
        raise ValueError(
            f"train.output={folder} on {_shortened(blind)} is not the folder that {everywhere[0]['host']} has there; "
            "checkpoints need one that all hosts share"
        )


def _bandwidth(seconds: float, world: World) -> str:
    """How fast gradients are exchanged, a bucket at a time, as training does it."""
    bucket = torch.zeros(BUCKET_ELEMENTS, device=world.device)
    dist.all_reduce(bucket)  # connections are made
    _finished(world)
    rounds, began, spent = 0, time.perf_counter(), 0.0
    while spent < seconds:
        dist.all_reduce(bucket)
        rounds += 1
        _finished(world)
        spent = float(world.sum(torch.tensor(time.perf_counter() - began))) / world.size  # all stop together
    rate = bucket.nbytes * rounds / spent
    return (
        f"all-reduce of {bucket.nbytes / 1e6:.0f} MB among {world.size} ranks: {rate / 1e9:.2f} GB/s "
        f"({2 * (world.size - 1) / world.size * rate / 1e9:.2f} GB/s in and out of each rank)"
    )


def _finished(world: World) -> None:
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
