"""Frozen batch norms; in a ResNet folded into the convolutions before them.

A frozen norm is a scale and a shift of each channel. Both are computed in float32, from buffers that stay float32 under
any precision, and applied in the features' type. Folded into the convolution's weights and bias, they cost a pass
over the weights instead of two over the features. Parameters and buffers keep their names. In float32 on a CPU the
convolution and its norm stay apart: the published arithmetic, rounding included.
"""

from typing import Self, cast

import torch
import torch.nn.functional as F
from timm.layers import FrozenBatchNormAct2d, freeze_batch_norm_2d
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d


class FrozenNorm(FrozenBatchNorm2d):
    """A scale and a shift of each channel of features (N, C, H, W), for features of any type."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    @classmethod
    def of(cls, norm: FrozenBatchNorm2d | FrozenBatchNormAct2d) -> Self:
        frozen = cls(len(cast(Tensor, norm.weight)), cast(float, norm.eps))
        for name, buffer in norm.named_buffers(recurse=False):
            setattr(frozen, name, buffer)
        return frozen

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,) each, float32."""
        scale = self.weight.float() * (self.running_var.float() + self.eps).rsqrt()
        return scale, self.bias.float() - self.running_mean.float() * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = (values.to(x.dtype).view(-1, 1, 1) for values in self.scale_and_shift())
        return x * scale + shift


class FrozenNormAct(FrozenNorm):
    """A frozen norm with the dropout and the activation that some timm models have in it."""

    drop: nn.Module
    act: nn.Module

    @classmethod
    def of(cls, norm: FrozenBatchNorm2d | FrozenBatchNormAct2d) -> Self:
        frozen = super().of(norm)
        frozen.drop, frozen.act = cast(nn.Module, norm.drop), cast(nn.Module, norm.act)
        return frozen

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FoldedNorm(FrozenNorm):
    """Holds the norm's buffers in its place; its work is done by the convolution before it."""

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


def freeze_batch_norms(body: nn.Module) -> None:
    """Freeze a timm model's batch norms in place, and fold those of a ResNet.

    In other models no batch norm is known to follow a convolution and nothing else.
    """
    freeze_batch_norm_2d(body)
    for module in list(body.modules()):
        for name, child in module.named_children():
            if type(child) is FrozenBatchNorm2d:
                setattr(module, name, FrozenNorm.of(child))
            elif type(child) is FrozenBatchNormAct2d:
                setattr(module, name, FrozenNormAct.of(child))
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
    if type(conv) is nn.Conv2d and conv.bias is None and type(norm) is FrozenNorm:
        folded = FoldedNorm.of(norm)
        setattr(parent, norm_name, folded)
        setattr(parent, conv_name, FoldedConv2d.of(conv, folded))
