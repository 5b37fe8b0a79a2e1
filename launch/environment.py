"""Checks across ranks before the first step: hosts, versions, settings, shared folder, shared memory, bandwidth."""

import hashlib
import importlib.metadata
import os
import platform
import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.cuda import nccl

from ..core.config import Config
from ..core.training.engine import BUCKET_ELEMENTS
from ..core.training.world import World, local_size
from ..data.folders import obstacle
from ..data.index import ShardIndex
from ..data.shared_memory import FOLDER, REMEDY, free_bytes, mebibytes, place
from ..data.stream import TrainStream
from .versions import programs

MUST_AGREE = ("ddetr", "torch", "CUDA", "NCCL", "deepspeed", "shards")  # and the settings
MAY_DIFFER = ("device", "Python", "timm", "kernel")
VISIBLE_SECONDS = 15.0  # a network file system may show a new file that much later
# What each node may have for itself: paths, addresses, and how much it does at once.
_OWN_SETTINGS = {
    "data": {"train", "validation", "cache", "cache_bytes", "workers"},
    "monitor": True,
    "train": {"threads"},
}

Facts = dict[str, str]


def check(config: Config, world: World, indexes: Sequence[ShardIndex], *, writes: bool = True) -> list[str]:
    """Compare the ranks of a run; returns the lines to print about its machines. Collective.

    writes: whether train.output may be made, to check that all ranks share it. Raises ValueError on every rank when
    ranks differ in what changes their computation, or when train.output is not the same folder for all.
    """
    settings = _settings(config)
    everywhere: list[Facts] = world.gather([facts(config, world.device, indexes) | settings], Facts)
    if world.size == 1:
        return [f"1 rank on {everywhere[0]['host']}: {everywhere[0]['device']}"]
    lines = _hosts(everywhere)
    if differing := [f"{name}: {text}" for name in (*MUST_AGREE, *settings) if (text := _difference(everywhere, name))]:
        raise ValueError(f"the ranks differ in {'; '.join(differing)}. Make them the same on every host")
    lines += [f"{name} differs: {text}" for name in MAY_DIFFER if (text := _difference(everywhere, name))]
    if writes:
        _check_common_folder(Path(config.train.output), everywhere, world)
    if config.train.bandwidth_test_seconds:
        lines.append(_bandwidth(config.train.bandwidth_test_seconds, world))
    return lines


@dataclass(frozen=True)
class SharedMemory:
    """Bytes of shared memory that the data loader of one rank needs, and bytes that are free before any rank starts."""

    place: str
    host: str
    needed: int
    free: int | None

    @classmethod
    def of(cls, stream: TrainStream, config: Config, device: torch.device) -> "SharedMemory":
        """What the batches of this rank's data loader need at most during the run."""
        free = free_bytes()
        steps = config.train.epochs * stream.steps_per_epoch
        steps = min(steps, config.train.max_steps or steps)
        needed = 0 if free is None else stream.shared_bytes(steps, free // local_size(), device.type == "cuda")
        return cls(place(), socket.gethostname(), needed, free)


def check_shared_memory(ranks: Sequence[SharedMemory]) -> None:
    """Raise OSError, with both sizes and a remedy, when the batches of all ranks of a machine do not fit."""
    for where in dict.fromkeys(rank.place for rank in ranks):
        here = [rank for rank in ranks if rank.place == where]
        needed, frees = sum(rank.needed for rank in here), [rank.free for rank in here if rank.free is not None]
        if frees and needed > min(frees):
            of = f"the {len(here)} ranks" if len(here) > 1 else "the rank"
            raise OSError(
                f"{FOLDER} of {here[0].host} has {mebibytes(min(frees))} free, the batches that loader processes keep "
                f"ready for {of} there need {mebibytes(needed)}. {REMEDY}"
            )


def check_compiler_cache() -> None:
    """Raise OSError when torch.compile cannot write to its cache."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    caches = {"TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR") or default_cache_dir()}
    if given := os.environ.get("TRITON_CACHE_DIR"):
        caches["TRITON_CACHE_DIR"] = given
    for variable, folder in caches.items():
        if reason := obstacle(Path(folder)):
            raise OSError(f"train.compile=true: {reason}, where its cache should be; set {variable} to another folder")


def facts(config: Config, device: torch.device, indexes: Sequence[ShardIndex]) -> Facts:
    """Machine and versions of this rank, each short enough for a message."""
    shards = hashlib.sha256()
    for index in indexes:
        for shard in index.shards:
            shards.update(shard.sha256.encode())
    cuda = device.type == "cuda"
    return {
        "host": socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores",
        "ddetr": programs()["ddetr"],
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
    """Raise ValueError unless all ranks share the folder: rank 0 writes checkpoints, all ranks read them."""

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
    """Measure the bandwidth of an all-reduce of one bucket of gradients, as training has it."""
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
