"""Asynchronous copies between host and device."""

import torch
from torch import Tensor


class HostCopy:
    """An asynchronous copy from a GPU to the host, which waits for it only in `wait`. A CPU tensor is not copied."""

    def __init__(self, source: Tensor) -> None:
        self._host = source.detach()
        self._done = None
        if source.device.type == "cuda":
            self._host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
            self._host.copy_(source.detach(), non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """Copy `host` to `device`; to a GPU from pinned memory, without making the host wait."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
