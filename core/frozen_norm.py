"""A ResNet's frozen batch norms, folded into the convolutions before them.

A frozen norm is a scale and a shift of each channel. Taken into the convolution's weights and bias, it costs a pass
over the weights instead of two over the features. Parameters and buffers keep their names. In float32 on a CPU the
convolution and its norm stay apart: the published arithmetic, rounding included.
"""

from typing import cast

import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d


class FoldedNorm(FrozenBatchNorm2d):
    """Holds the norm's buffers in its place; its work is done by the convolution before it."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @classmethod
    def of(cls, norm: FrozenBatchNorm2d) -> "FoldedNorm":
        folded = cls(len(cast(Tensor, norm.weight)), norm.eps)
        folded.load_state_dict(norm.state_dict())
        return folded

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        scale = self.weight.float() * (self.running_var.float() + self.eps).rsqrt()
        return scale, self.bias.float() - self.running_mean.float() * scale

    def forward(self, x: Tensor) -> Tensor:
        return x


class FoldedConv2d(nn.Conv2d):
    """A convolution and the frozen norm after it."""

    norm: FoldedNorm

    @classmethod
    def of(cls, conv: nn.Conv2d, norm: FoldedNorm) -> "FoldedConv2d":
        folded = cls.__new__(cls)
        folded.__dict__.update(conv.__dict__)
        folded.__dict__["norm"] = norm  # past nn.Module, which would register it here a second time
        return folded

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.norm.scale_and_shift()
        if x.dtype == torch.float32 and x.device.type == "cpu":
            return super().forward(x) * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)
        weight = (self.weight * scale.view(-1, 1, 1, 1)).to(x.dtype)
        return F.conv2d(x, weight, shift.to(x.dtype), self.stride, self.padding, self.dilation, self.groups)


def fold_frozen_norms(body: nn.Module) -> None:
    """Fold the norms of a timm ResNet in place; other models have none that is known to follow a convolution."""
    _fold(body, "conv1", "bn1")
    for block in body.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            for number in range(1, 4):
                _fold(block, f"conv{number}", f"bn{number}")
            if isinstance(block.downsample, nn.Sequential):
                last = len(block.downsample) - 1
                _fold(block.downsample, str(last - 1), str(last))


def _fold(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = (cast(object, getattr(parent, name, None)) for name in (conv_name, norm_name))
    if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenBatchNorm2d:
        folded = FoldedNorm.of(norm)
        setattr(parent, norm_name, folded)
        setattr(parent, conv_name, FoldedConv2d.of(conv, folded))
