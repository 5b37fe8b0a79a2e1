"""Multi-scale deformable attention as a module (section 4.1, equation 3).

Shapes: N images, Q queries, C hidden_dim, H heads, L levels, P points, S tokens of all levels, D = C / H.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..ops import fused_deform_attn


class MultiScaleDeformableAttention(nn.Module):
    """Each query attends to P points in each of L feature maps around its reference point.

    `attend` is the op; `ddetr.ops.reference.fused_deform_attn` may take its place, as in the ONNX export.
    """

    def __init__(self, hidden_dim: int, heads: int, levels: int, points: int) -> None:
        super().__init__()
        self.heads, self.levels, self.points = heads, levels, points
        self.attend: Callable[..., Tensor] = fused_deform_attn
        self.sampling_offsets = nn.Linear(hidden_dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(hidden_dim, heads * levels * points)
        self.value_proj = nn.Linear(hidden_dim, hidden_dim)
        self.output_proj = nn.Linear(hidden_dim, hidden_dim)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor,
    ) -> Tensor:
        """query (N, Q, C); reference_points (N, Q, L, 2) or (N, Q, L, 4) float32 in [0, 1] of each padded level;
        tokens (N, S, C); padding_mask (N, S), True on padding; returns (N, Q, C)."""
        n, q, c = query.shape
        value = self.value_proj(tokens).masked_fill(padding_mask[..., None], 0.0)
        value = value.view(n, -1, self.heads, c // self.heads)
        offsets = self.sampling_offsets(query).view(n, q, self.heads, self.levels, self.points, 2)
        logits = self.attention_weights(query).view(n, q, self.heads, self.levels * self.points)
        return self.output_proj(self.attend(value, spatial_shapes, reference_points, offsets, logits))

    def reset_parameters(self) -> None:
        """Zero weights; offset biases send head h along direction 2 pi h / H, point k to distance k (appendix A.4)."""
        angle = torch.arange(self.heads) * (2 * math.pi / self.heads)
        direction = torch.stack([angle.cos(), angle.sin()], dim=-1)
        direction = direction / direction.abs().amax(-1, keepdim=True)
        distance = torch.arange(1, self.points + 1).view(1, 1, -1, 1)
        offsets = direction.view(-1, 1, 1, 2) * distance.expand(-1, self.levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.weight.zero_()
            self.sampling_offsets.bias.copy_(offsets.reshape(-1))
            self.attention_weights.weight.zero_()
            self.attention_weights.bias.zero_()
            for projection in (self.value_proj, self.output_proj):
                nn.init.xavier_uniform_(projection.weight)
                projection.bias.zero_()
