"""The backbone: a timm model that returns C3, C4 and C5, the feature maps at strides 8, 16 and 32 (section 4.1)."""

import math
from typing import Any, cast

import timm
import torch
from timm.layers import BatchNormAct2d, Format, freeze_batch_norm_2d
from timm.models import FeatureInfo
from torch import Tensor, nn

from .config import ModelConfig
from .frozen_norm import fold_frozen_norms
from .pretrained import fetching

STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """Images (N, 3, H, W) to feature maps (N, C_l, H / s_l, W / s_l), s_l in `strides`, rounded up.

    With `backbone_norm=frozen_batch` the published fine-tuning applies: batch norms, the stem and the first
    stage (everything before C3) do not train. With `group` all of it trains from scratch.
    Raises ValueError when timm has no such model or the model lacks one of the strides, OSError when its pretrained
    weights are neither in their cache nor can be fetched.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        try:
            stride: dict[str, Any] = {"output_stride": 16} if config.dilation else {}
            with fetching(config.backbone, config.pretrained_backbone):
                body = timm.create_model(
                    config.backbone, features_only=True, pretrained=config.pretrained_backbone, **stride
                )
        except (RuntimeError, TypeError, AttributeError, AssertionError) as error:
            dilated = " with model.dilation=true" if config.dilation else ""
            raise ValueError(
                f"model.backbone={config.backbone!r}: timm cannot build it as a feature extractor{dilated} ({error}); "
                f"timm.list_models() names the models"
            ) from error
        feature_info = cast(FeatureInfo, body.feature_info)
        reductions = feature_info.reduction()
        if config.dilation:
            if reductions[-1] != 16:
                raise ValueError(f"model.dilation=true: {config.backbone!r} ends at stride {reductions[-1]}, not 16")
            self.strides, self._indices = (16,), (len(reductions) - 1,)
        else:
            missing = [stride for stride in STRIDES if stride not in reductions]
            if missing:
                raise ValueError(
                    f"model.backbone={config.backbone!r} has no feature map at stride {missing}: {reductions}"
                )
            self.strides = STRIDES if config.levels > 1 else STRIDES[-1:]
            self._indices = tuple(reductions.index(stride) for stride in self.strides)
        self.channels = tuple(feature_info.channels()[index] for index in self._indices)
        if config.backbone_norm == "group":
            _replace_batch_norms(body)
        else:
            body = freeze_batch_norm_2d(body)
            _freeze_before_c3(body, feature_info)
            fold_frozen_norms(body)
        self._channels_last = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC  # as Swin returns them
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        if images.device.type == "cuda" or images.dtype != torch.float32:  # on a CPU in float32 it gains nothing
            images = images.contiguous(memory_format=torch.channels_last)
        features = self.body(images)
        features = [features[index] for index in self._indices]
        return [feature.permute(0, 3, 1, 2) for feature in features] if self._channels_last else features


def _replace_batch_norms(module: nn.Module) -> None:
    """Group norms of eight channels a group, which every width of timm's models allows."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _replace_batch_norms(child)
            continue
        channels = child.num_features
        norm: nn.Module = nn.GroupNorm(channels // math.gcd(channels, 8), channels)
        if isinstance(child, BatchNormAct2d):  # some models fold their activation into the norm
            norm = nn.Sequential(norm, cast(nn.Module, child.drop), cast(nn.Module, child.act))
        setattr(module, name, norm)


def _freeze_before_c3(body: nn.Module, feature_info: FeatureInfo) -> None:
    """Stop the training of every parameter up to the end of the last feature map that is finer than C3."""
    finer = [info["module"] for info in feature_info.info if info["reduction"] < STRIDES[0]]
    if not finer:
        return
    modules = dict(body.named_modules())
    stage = modules.get(finer[-1]) or modules[finer[-1].replace(".", "_")]  # timm flattens some names
    last = {id(parameter) for parameter in stage.parameters()}
    remaining = len(last)
    for parameter in body.parameters():
        if not remaining:
            break
        parameter.requires_grad_(False)
        remaining -= id(parameter) in last
