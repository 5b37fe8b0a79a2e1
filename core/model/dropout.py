"""Dropout that draws few random bits on a CPU and keeps little memory for the backward pass."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """nn.Dropout with 16 random bits for each element on a CPU, where torch draws 64 and keeps a float for each.

    The probability is rounded to a multiple of 2^-16. Elsewhere, and when compiled, it is torch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        return _Dropout.apply(input, self.p) if self.draws_for(input) else super().forward(input)

    def after_relu(self, input: Tensor) -> Tensor:
        """ReLU, then dropout, in place. On a CPU only the result is kept for the backward pass: it shows both masks."""
        if self.draws_for(input):
            return _DropoutOfReLU.apply(input, self.p)
        return super().forward(input.relu_())

    def draws_for(self, input: Tensor) -> bool:
        """Whether this class draws the random bits itself: in training on a CPU, unless compiled."""
        return self.training and self.p > 0 and input.device.type == "cpu" and not torch.compiler.is_compiling()


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        dropped = _dropped(x, p)
        ctx.save_for_backward(dropped)
        ctx.p = p
        return torch.where(dropped, 0.0, x).mul_(1 / (1 - p))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (dropped,) = ctx.saved_tensors
        return torch.where(dropped, 0.0, gradient).mul_(1 / (1 - ctx.p)), None


class _DropoutOfReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        ctx.mark_dirty(x)
        x.masked_fill_(_dropped(x, p), 0.0).relu_().mul_(1 / (1 - p))
        ctx.save_for_backward(x)
        ctx.p = p
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(gradient, y, 0).mul_(1 / (1 - ctx.p)), None


def _dropped(x: Tensor, p: float) -> Tensor:
    """True with probability p, in x's shape."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    return words.view(torch.int16)[: x.numel()].view(x.shape) < round(p * 2**16) - 2**15
