"""The exponential moving average (EMA) of the weights: each rank keeps that of its share of ZeRO's float32 weights."""

import torch
from torch import Tensor


class MovingAverage:
    """EMA of `masters`, this rank's float32 weights, which the optimizer changes in place."""

    def __init__(self, masters: list[Tensor], decay: float) -> None:
        self.decay = decay
        self._masters = masters
        self.values = [master.detach().clone() for master in masters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the EMA with the weights after optimizer step `step`, from 1.

        The decay is at most (1 + step) / (10 + step), so that the initial weights are forgotten soon.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.values, [master.detach() for master in self._masters], 1 - decay)
