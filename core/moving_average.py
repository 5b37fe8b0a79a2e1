"""A moving average of the weights, kept where ZeRO keeps the float32 weights: each rank averages its own share."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class MovingAverage:
    """Exponential moving average of `masters`, this rank's float32 weights, which the optimizer changes in place."""

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.decay = decay
        self._masters = masters
        self._averages = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, from 1. Early averages forget faster, as they must."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, [master.detach() for master in self._masters], 1 - decay)

    @contextmanager
    @torch.no_grad()
    def in_place_of_weights(self) -> Iterator[None]:
        """Within it, the masters hold the average."""
        weights = [master.detach().clone() for master in self._masters]
        torch._foreach_copy_([master.detach() for master in self._masters], self._averages)
        yield
        torch._foreach_copy_([master.detach() for master in self._masters], weights)

    def save(self, path: Path) -> None:
        save_file({str(number): average for number, average in enumerate(self._averages)}, path)

    def load(self, path: Path) -> None:
        """Raises FileNotFoundError when the checkpoint was written without an average."""
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; the run was trained without train.ema_decay")
        saved = load_file(path)
        torch._foreach_copy_(self._averages, [saved[str(number)] for number in range(len(self._averages))])
