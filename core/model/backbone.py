"""The backbone: a timm model that returns C3, C4 and C5, the feature maps at strides 8, 16 and 32 (section 4.1)."""

import contextlib
import math
from typing import Any, cast

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Format
from timm.models import FeatureInfo
from torch import Tensor, nn
from torch.func import functional_call

from ..config import ModelConfig
from .feature_maps import feature_maps
from .frozen_norm import FrozenNorm, freeze_batch_norms
from .pretrained import fetching

STRIDES = (8, 16, 32)


class Backbone(nn.Module):
    """Images (N, 3, H, W) to feature maps (N, C_l, H / s_l, W / s_l), s_l in `strides`, rounded up.

    With `backbone_norm=frozen_batch` the published fine-tuning applies: batch norms, the stem and the first
    stage (everything before C3) do not train. With `group` all of it trains from scratch.
    Raises ValueError when timm has no such model, or one that does not give these maps for images of any size.
    Raises OSError when its pretrained weights are not in the cache and cannot be fetched.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        body = _build(config)
        info = cast(FeatureInfo, body.feature_info)
        reductions = info.reduction()
        if config.dilation:
            assert reductions[-1] == 16, "a model that takes output_stride ends there"
            self.strides, self._indices = (16,), (len(reductions) - 1,)
        else:
            missing = [stride for stride in STRIDES if stride not in reductions]
            if missing:
                raise ValueError(
                    f"model.backbone={config.backbone!r} has no feature map at stride {missing}: {reductions}"
                )
            self.strides = STRIDES if config.levels > 1 else STRIDES[-1:]
            self._indices = tuple(reductions.index(stride) for stride in self.strides)
        self.channels = tuple(info.channels()[index] for index in self._indices)
        if config.backbone_norm == "group":
            _replace_batch_norms(body)
        else:
            freeze_batch_norms(body)
        try:
            maps = feature_maps(body, self._indices, config.backbone)
        except ValueError as error:
            raise ValueError(f"model.backbone={config.backbone!r} cannot be used: {error}; take another") from error
        frozen = maps.before_c3 if config.backbone_norm == "frozen_batch" else frozenset()
        for name, parameter in body.named_parameters():
            parameter.requires_grad_(name in maps.used - frozen)
        norms = {name for name, module in body.named_modules() if isinstance(module, FrozenNorm)}
        self._rounded = tuple(  # buffers that meet features, such as Swin's masks; norms round on their own
            name
            for name, buffer in body.named_buffers()
            if buffer.is_floating_point() and name.rpartition(".")[0] not in norms
        )
        self._piece = maps.piece
        self._channels_last = getattr(body, "output_fmt", Format.NCHW) == Format.NHWC  # as Swin returns them
        self.body = body

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        if images.device.type == "cuda" or images.dtype != torch.float32:  # on a CPU in float32 it gains nothing
            images = images.contiguous(memory_format=torch.channels_last)
        if self._piece > 1:
            images = F.pad(images, (0, -width % self._piece, 0, -height % self._piece))
        if self._rounded and images.dtype != torch.float32:  # the engine leaves buffers in float32
            buffers = dict(self.body.named_buffers())
            rounded = {name: buffers[name].to(images.dtype) for name in self._rounded}
            features = functional_call(self.body, rounded, (images,))
        else:
            features = self.body(images)
        features = [features[index] for index in self._indices]
        if self._channels_last:
            features = [feature.permute(0, 3, 1, 2) for feature in features]
        if self._piece > 1:
            features = [
                feature[..., : -(-height // stride), : -(-width // stride)]
                for feature, stride in zip(features, self.strides, strict=True)
            ]
        return features


def _build(config: ModelConfig) -> nn.Module:
    arguments: dict[str, Any] = {"features_only": True, "pretrained": config.pretrained_backbone}
    if config.dilation:
        arguments["output_stride"] = 16
    try:
        with fetching(config.backbone, config.pretrained_backbone):
            body = timm.create_model(config.backbone, **arguments)
            if cast(dict[str, Any], body.pretrained_cfg).get("fixed_input_size"):
                with contextlib.suppress(TypeError):  # those whose size is fixed for good
                    body = timm.create_model(config.backbone, **arguments, strict_img_size=False)
    except (RuntimeError, TypeError, AttributeError, AssertionError, KeyError, IndexError, ValueError) as error:
        dilated = " with model.dilation=true" if config.dilation else ""
        reason = str(error) or "it has none"
        raise ValueError(
            f"model.backbone={config.backbone!r}: timm cannot build it as a feature extractor{dilated} ({reason}); "
            f"timm.list_models() names the models"
        ) from error
    return body


def _replace_batch_norms(module: nn.Module) -> None:
    """Replace batch norms by group norms of eight channels a group, which every width of timm's models allows."""
    for name, child in module.named_children():
        if not isinstance(child, nn.BatchNorm2d):
            _replace_batch_norms(child)
            continue
        channels = child.num_features
        norm: nn.Module = nn.GroupNorm(channels // math.gcd(channels, 8), channels)
        if isinstance(child, BatchNormAct2d):  # some models fold their activation into the norm
            norm = nn.Sequential(norm, cast(nn.Module, child.drop), cast(nn.Module, child.act))
        setattr(module, name, norm)
