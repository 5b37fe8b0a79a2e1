"""Shared memory, through which workers of the data loader hand over their batches: on Linux, /dev/shm.

By default it is half of a machine's memory, but 64 MiB in a container. A process that writes beyond its end is killed
by SIGBUS. Therefore the needed size is checked before the first step and reserved before a batch is written.
"""

import errno
import os
from pathlib import Path

import torch

FOLDER = Path("/dev/shm")
PAGE_BYTES = 4096
REMEDY = (
    f"Give the container more: docker run --ipc=host or --shm-size=SIZE, in Kubernetes an emptyDir of medium Memory at "
    f"{FOLDER} (as launch/kubernetes/train.yaml has it). Or take fewer data.workers; 0 need none"
)


class SharedMemoryError(OSError):
    """Too little shared memory; the message says how much there is, and what to do."""


def free_bytes() -> int | None:
    """Free bytes of /dev/shm; None without a limit, 0 if it does not exist or cannot be written to."""
    if not os.access(FOLDER, os.W_OK | os.X_OK, effective_ids=True):
        return 0
    status = os.statvfs(FOLDER)
    return status.f_bavail * status.f_frsize if status.f_blocks else None


def place() -> str:
    """An id that is equal for two processes if they share their /dev/shm, whatever their host names."""
    device = FOLDER.stat().st_dev if FOLDER.exists() else "none"
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {device}"


def mebibytes(number: int) -> str:
    return f"{number / 2**20:.1f} MiB"


def shared(number: int) -> torch.UntypedStorage:
    """Allocate and reserve so many bytes of shared memory. Raises SharedMemoryError when there are too few."""
    try:
        storage = torch.UntypedStorage._new_shared(number)
        descriptor, _ = storage._share_fd_cpu_()  # the storage's own
        os.posix_fallocate(descriptor, 0, number)
    except (RuntimeError, OSError) as error:  # RuntimeError: torch's, of a file that cannot even be made
        free = free_bytes() or 0
        if free >= number and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        raise SharedMemoryError(
            f"{FOLDER} is full: a batch of {mebibytes(number)} has no room in the {mebibytes(free)} that are free. "
            f"{REMEDY}"
        ) from error
    return storage
