"""The data parallel ranks of a run: how a process joins their process group, and the collectives among them.

A rank is one process with one device. The environment variables of torchrun and the DeepSpeed launcher (RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) say which; without them the world size is 1.
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

from ...ops.library import UNAVAILABLE
from ..config import TrainConfig
from ..model.transfer import to_device
from .messages import MOST_BYTES, Failure, decoded, encoded
from .network import LOOPBACK, hosted_store, keep_to, own_address

COLLECTED_ELEMENTS = 25_000_000  # that rank 0 receives at once, from all ranks together


@dataclass(frozen=True)
class World:
    """This rank, the world size, the device, and collectives, in which every rank must take part.

    kind: the type of a message, as in an annotation. Raises OSError for a message of another type or more than
    MOST_BYTES.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce: the sum of `values` over ranks, on this rank's device; in place when they are there already."""
        values = values if values.device == self.device else to_device(values, self.device)
        dist.all_reduce(values)
        return values

    def gather(self, mine: Sequence[Any], kind: Any) -> list[Any]:
        """All-gather: the lists of all ranks as one, in the order of ranks. kind: the type of an item."""
        parts = self._everyones(encoded(list(mine), list[kind]), on_all=True)
        return [item for rank, part in enumerate(parts) for item in decoded(part, list[kind], f"rank {rank}")]

    def to_first(self, mine: Any, kind: Any) -> list[Any]:
        """Gather: every rank's object on rank 0; an empty list on the others."""
        parts = self._everyones(encoded(mine, kind), on_all=False)
        return [decoded(part, kind, f"rank {rank}") for rank, part in enumerate(parts)]

    def bytes_to_first(self, mine: bytes) -> list[bytes]:
        """Gather: every rank's bytes in rank 0's host memory; an empty list on the others."""
        lengths = self.to_first(len(mine), int)
        # A tensor cannot be made of no bytes.
        parts = self.collect(self._tensor(mine + b"\n"), [length + 1 for length in lengths])
        return [_bytes(part)[:-1] for part in parts]

    def collect(self, mine: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """Gather every rank's tensor of one dimension in rank 0's host memory; an empty list on the others.

        lengths: of those tensors; only rank 0 needs it.
        """
        longest = self.agree(lambda: max(lengths), int)
        everyones = [torch.empty(length, dtype=mine.dtype) for length in lengths] if self.rank == 0 else []
        step = max(1, COLLECTED_ELEMENTS // self.size)
        for start in range(0, longest, step):
            size = min(step, longest - start)
            # All pieces have the same size; on a CPU they are received where they belong.
            rooms = [whole[start : start + size] for whole in everyones]
            parts = [room if room.numel() == size and mine.is_cpu else mine.new_empty(size) for room in rooms]
            sent = mine[start : start + size]
            dist.gather(torch.cat([sent, mine.new_zeros(size - sent.numel())]), parts or None)
            for room, part in zip(rooms, parts, strict=True):
                if room is not part:
                    room.copy_(part[: room.numel()])
        return everyones

    def agree(self, choose: Callable[[], Any], kind: Any) -> Any:
        """Broadcast: what `choose` returns on rank 0; its ValueError or OSError is raised on every rank as well."""
        error, content = None, b""
        if self.rank == 0:
            try:
                content = b"+" + encoded(choose(), kind)
            except (ValueError, OSError) as mistake:
                error, content = mistake, b"-" + encoded(Failure.of(mistake), Failure)
        length = torch.tensor([len(content)], device=self.device)
        dist.broadcast(length, src=0)
        message = self._tensor(content) if self.rank == 0 else self._room(self._checked([length])[0])
        dist.broadcast(message, src=0)
        if error is not None:
            raise error
        content = _bytes(message)
        if content.startswith(b"-"):
            raise decoded(content[1:], Failure, "rank 0").error()
        return decoded(content[1:], kind, "rank 0")

    # Messages travel as tensors of bytes, padded to the longest: the backends carry nothing else.

    def _everyones(self, content: bytes, *, on_all: bool) -> list[bytes]:
        """Every rank's `content`, on rank 0 or on all. Raises OSError for more than MOST_BYTES."""
        lengths = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(content)], device=self.device))
        numbers = self._checked(lengths)
        mine = self._room(max(numbers)).zero_()
        mine[: len(content)] = self._tensor(content)
        parts = [torch.empty_like(mine) for _ in numbers] if on_all or self.rank == 0 else []
        if on_all:
            dist.all_gather(parts, mine)
        else:
            dist.gather(mine, parts or None)
        return [_bytes(part[:length]) for part, length in zip(parts, numbers, strict=bool(parts))]

    def _tensor(self, content: bytes) -> Tensor:
        return torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device)

    def _room(self, length: int) -> Tensor:
        return torch.empty(length, dtype=torch.uint8, device=self.device)

    @staticmethod
    def _checked(lengths: Sequence[Tensor]) -> list[int]:
        numbers = [int(length) for length in lengths]
        for rank, number in enumerate(numbers):
            if not 0 < number <= MOST_BYTES:
                raise OSError(f"rank {rank} announces {number} bytes, of at most {MOST_BYTES}: it is no rank of ddetr")
        return numbers


def _bytes(message: Tensor) -> bytes:
    return message.cpu().numpy().tobytes()


def device_for(config: TrainConfig, local_rank: int) -> torch.device:
    """The device of a rank by train.device. Raises ValueError when it should be a GPU and this rank has none."""
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


def local_size() -> int:
    """The number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)  # torchrun, DeepSpeed


def join(config: TrainConfig) -> World:
    """Join the process group that the launcher describes, or make one of a single rank.

    Raises ValueError for a missing GPU, fp16 on a device without it, or a launcher that does not say where the ranks
    meet. Raises OSError when the attention op is not built for the device, or rank 0 cannot listen where they meet.
    """
    if "RANK" not in os.environ:
        os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = device_for(config, local_rank)
    if device.type in UNAVAILABLE:
        raise OSError(f"the attention op cannot run on {device.type}: {UNAVAILABLE[device.type]}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(config.threads or max(1, len(os.sched_getaffinity(0)) // local_size()))

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
        # All that DeepSpeed would compile on a machine's first run, for minutes, is an all-reduce for inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # Later than core/training/heartbeat.py, which also says who is missing.
    patience = datetime.timedelta(seconds=config.collective_timeout_seconds + 2 * config.rank_timeout_seconds)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=_store(rank, size, size == local_size(), patience),
        rank=rank,
        world_size=size,
        timeout=patience,
        device_id=device if device.type == "cuda" and size > 1 else None,
    )
    deepspeed.init_distributed(dist_backend=backend, timeout=patience, verbose=False)  # takes the same group
    return World(rank, size, local_rank, device)


def _store(rank: int, size: int, alone: bool, timeout: datetime.timedelta) -> dist.Store:
    """The rendezvous store; torch's own, by env://, listens on every interface.

    alone: whether all ranks are on this machine. The launcher's store is used if there is one.
    """
    if size == 1:
        keep_to(LOOPBACK, alone=True)
        return dist.HashStore()
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE={size}, but {' and '.join(missing)} not set: where do the ranks meet?")
    of_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if alone and not of_launcher:
        os.environ["MASTER_ADDR"] = LOOPBACK
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    keep_to(host, alone)
    if rank > 0 or of_launcher:
        return dist.TCPStore(host, port, size, False, timeout)
    address = own_address(host)
    if address is None:
        raise OSError(f"MASTER_ADDR={host} is no address of this machine, {socket.gethostname()}, where rank 0 is")
    return hosted_store(address, port, timeout, size)[0]
