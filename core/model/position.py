"""Sine position embeddings (DETR, appendix A.4; Deformable DETR, section 4.1).

Shapes: N images, H x W a feature map, C hidden_dim.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TEMPERATURE = 10000.0


def padding_of(feature: Tensor, padding_mask: Tensor) -> Tensor:
    """The padding mask (N, h, w) of a feature map (N, C, h, w) of images whose mask is (N, H, W); nearest pixels."""
    return F.interpolate(padding_mask[:, None].float(), size=feature.shape[-2:])[:, 0].bool()


def sine_position(padding_mask: Tensor, hidden_dim: int, *, centred: bool = True) -> Tensor:
    """Position embedding (N, C, H, W) float32 of a feature map from its padding mask (N, H, W).

    Pixels are counted over the unpadded part only, at their centres or (DETR) at their far edges, and scaled to
    [0, 2 pi]; half of the channels hold y, half x.
    """
    valid = (~padding_mask).float()
    y, x = valid.cumsum(1), valid.cumsum(2)
    shift = 0.5 if centred else 0.0
    y = (y - shift) / (y[:, -1:, :] + 1e-6)
    x = (x - shift) / (x[:, :, -1:] + 1e-6)
    return torch.cat([_waves(y, hidden_dim // 2), _waves(x, hidden_dim // 2)], dim=-1).permute(0, 3, 1, 2)


def proposal_position(boxes_cxcywh: Tensor, hidden_dim: int) -> Tensor:
    """Position embedding (N, Q, 2 C) float32 of the proposals' boxes (N, Q, 4) in [0, 1] (appendix A.4, two-stage)."""
    return _waves(boxes_cxcywh.float(), hidden_dim // 2).flatten(2)


def _waves(position: Tensor, channels: int) -> Tensor:
    """(...) in [0, 1] to (..., channels): sine on even channels, cosine on odd ones, at falling frequencies."""
    exponent = torch.arange(channels, device=position.device, dtype=torch.float32).div(2, rounding_mode="floor")
    angle = position[..., None] * (2 * math.pi) / TEMPERATURE ** (2 * exponent / channels)
    return torch.stack([angle[..., 0::2].sin(), angle[..., 1::2].cos()], dim=-1).flatten(-2)
