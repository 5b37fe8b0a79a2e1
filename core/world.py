"""The ranks of a run: how this process becomes one of them, and what it says to all.

A rank is one process with one device. The environment that torchrun and the DeepSpeed launcher set (RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) says which; without it a run is one rank.
"""

import datetime
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ops.library import UNAVAILABLE
from .config import TrainConfig
from .transfer import to_device

COLLECTED_ELEMENTS = 25_000_000  # that rank 0 gets at once


@dataclass(frozen=True)
class World:
    """This rank's place among all ranks, and its device."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """`values` added up over all ranks, on this rank's device; in place when they are there already."""
        values = values if values.device == self.device else to_device(values, self.device)
        dist.all_reduce(values)
        return values

    def gather(self, mine: list[Any]) -> list[Any]:
        """The lists of all ranks as one, rank after rank."""
        everywhere: list[Any] = [None] * self.size
        dist.all_gather_object(everywhere, mine)
        return [item for items in everywhere for item in items]

    def to_first(self, mine: Any) -> list[Any]:
        """Every rank's object on rank 0; nothing on the others."""
        everyones: list[Any] = [None] * self.size if self.rank == 0 else []
        dist.gather_object(mine, everyones or None)
        return everyones

    def collect(self, mine: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Every rank's tensor of one dimension in rank 0's memory on the host; nothing on the others.

        lengths: of those tensors; rank 0 needs it.
        """
        longest = self.agree(lambda: max(lengths))
        everyones = [torch.empty(length, dtype=mine.dtype) for length in lengths] if self.rank == 0 else []
        step = max(1, COLLECTED_ELEMENTS // self.size)
        for start in range(0, longest, step):
            size = min(step, longest - start)
            # All the same size, and where they belong if that is the host.
            rooms = [whole[start : start + size] for whole in everyones]
            parts = [room if room.numel() == size and mine.is_cpu else mine.new_empty(size) for room in rooms]
            sent = mine[start : start + size]
            dist.gather(torch.cat([sent, mine.new_zeros(size - sent.numel())]), parts or None)
            for room, part in zip(rooms, parts, strict=True):
                if room is not part:
                    room.copy_(part[: room.numel()])
        return everyones

    def agree(self, choose: Callable[[], Any]) -> Any:
        """Rank 0's choice on every rank; its ValueError or OSError on every rank as well."""
        choice: list[Any] = [None]
        if self.rank == 0:
            try:
                choice = [choose()]
            except (ValueError, OSError) as error:
                choice = [error]
        dist.broadcast_object_list(choice, src=0)
        if isinstance(choice[0], Exception):
            raise choice[0]
        return choice[0]


def device_for(config: TrainConfig, local_rank: int) -> torch.device:
    """Raises ValueError when a GPU is asked for and there is none for this rank."""
    count = torch.cuda.device_count()
    if config.device == "cpu" or (config.device == "auto" and count == 0):
        return torch.device("cpu")
    if local_rank >= count:
        raise ValueError(
            f"train.device={config.device} needs a GPU for local rank {local_rank}, but torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}) sees {count} on {socket.gethostname()}; start at most one rank per GPU, "
            f"set train.device=cpu, or run `ddetr doctor`"
        )
    return torch.device("cuda", local_rank)


def join(config: TrainConfig) -> World:
    """Join the process group that the launcher describes, or make one of a single rank.

    Raises ValueError for a GPU that is not there or half precision that the device cannot compute in, OSError when
    the attention op is not built for the device.
    """
    environment = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if "RANK" not in os.environ:
        environment["MASTER_PORT"] = str(_free_port())
        os.environ.update(environment)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = device_for(config, local_rank)
    if device.type in UNAVAILABLE:
        raise OSError(f"the attention op cannot run on {device.type}: {UNAVAILABLE[device.type]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_size))

    if device.type == "cpu":  # a CUDA toolkit without a GPU is nothing to warn of
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    os.environ["DS_ACCELERATOR"] = device.type  # before the import: DeepSpeed chooses once
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    accelerator = get_accelerator()
    assert accelerator is not None
    if config.precision == "fp16" and not accelerator.is_fp16_supported():
        raise ValueError(f"train.precision=fp16 needs a GPU; on this {device.type} use bf16 or fp32")
    if device.type == "cpu":
        # All that DeepSpeed would compile on a machine's first run, for minutes, is a sum of tensors for inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Later than core/heartbeat.py, which also says who is missing.
    patience = datetime.timedelta(seconds=config.collective_timeout_seconds + 2 * config.rank_timeout_seconds)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo", timeout=patience, verbose=False
    )
    return World(rank, size, local_rank, device)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
