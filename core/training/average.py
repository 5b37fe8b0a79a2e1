"""A moving average of the weights, kept where ZeRO keeps the float32 weights: each rank averages its own share."""

import torch
from torch import Tensor


class MovingAverage:
    """Exponential moving average of `masters`, this rank's float32 weights, which the optimizer changes in place."""

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.decay = decay
        self._masters = masters
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step`, from 1. Early averages forget faster, as they must."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [master.detach() for master in self._masters], 1 - decay)
