"""Multi-scale deformable attention as a module (section 4.1, equation 3), and multi-head attention (equation 1).

Shapes: N images, Q queries, C hidden_dim, H heads, L levels, P points, S tokens of all levels, D = C / H.
"""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import fused_deform_attn
from .dropout import Dropout


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


class Attention(nn.Module):
    """Multi-head attention with the parameters of nn.MultiheadAttention, their names and initial values (equation 1).

    With dropout on a CPU it is written out: torch has no fused attention for that, and what it does instead keeps
    three copies of the attention weights.
    """

    def __init__(self, hidden_dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim))
        self.out_proj = nn.Linear(hidden_dim, hidden_dim)
        self.dropout = Dropout(dropout)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """query (N, Q, C); key and value (N, S, C); padding_mask (N, S), True on padding; returns (N, Q, C)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        padding = None if padding_mask is None else padding_mask[:, None, None]
        if self.dropout.draws_for(q):
            logits = q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)
            if padding is not None:
                logits = logits.masked_fill(padding, -math.inf)
            attended = self.dropout(logits.softmax(-1)) @ v
        else:
            mask = None if padding is None else ~padding
            dropout = self.dropout.p if self.training else 0.0
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return self.out_proj(attended.transpose(1, 2).flatten(-2))
