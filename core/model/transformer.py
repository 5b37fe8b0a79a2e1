"""The deformable transformer's encoder and decoder (section 4, figure 1).

Shapes: N images, S tokens of all levels, Q queries, C hidden_dim, L levels.
Reference points are float32 whatever the precision of the features: a coordinate in bfloat16 is off by pixels.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config import ModelConfig
from .attention import Attention, MultiScaleDeformableAttention
from .dropout import Dropout

SpatialShapes = Sequence[tuple[int, int]]


class TransformerLayer(nn.Module):
    """The base of every layer: the feed-forward network that it ends in.

    Subclasses make its modules, each in its own order of parameters.
    """

    keeps_activations = True  # False: activation checkpointing, they are computed again for the backward pass
    linear1: nn.Linear
    linear2: nn.Linear
    dropout: Dropout

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout.after_relu(self.linear1(x))))


def run_layer(layer: nn.Module, *inputs: object) -> Tensor:
    """The forward pass of a TransformerLayer, with activation checkpointing unless it `keeps_activations`."""
    if cast(TransformerLayer, layer).keeps_activations or not torch.is_grad_enabled():
        return layer(*inputs)
    return checkpoint(layer, *inputs, use_reentrant=False)


class EncoderLayer(TransformerLayer):
    """Self-attention over all levels, then the feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        levels = config.levels if config.multi_scale_attention else 1
        self.self_attn = MultiScaleDeformableAttention(c, config.heads, levels, config.points)
        self.norm1 = nn.LayerNorm(c)
        self.linear1 = nn.Linear(c, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, c)
        self.norm2 = nn.LayerNorm(c)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, tokens: Tensor, position: Tensor, reference_points: Tensor, shapes: SpatialShapes, padding_mask: Tensor
    ) -> Tensor:
        attended = self._attend(tokens + position, reference_points, tokens, shapes, padding_mask)
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.norm2(tokens + self.feed_forward(tokens))

    def _attend(
        self, query: Tensor, reference_points: Tensor, tokens: Tensor, shapes: SpatialShapes, padding_mask: Tensor
    ) -> Tensor:
        if self.self_attn.levels == len(shapes):
            return self.self_attn(query, reference_points, tokens, shapes, padding_mask)
        # The paper's table 2 without multi-scale attention: a token sees its own level only.
        sizes = [height * width for height, width in shapes]
        whole = (query, reference_points, tokens, padding_mask)
        of_levels = zip(*(tensor.split(sizes, dim=1) for tensor in whole), strict=True)
        attended = [
            self.self_attn(own_query, own_points[:, :, level : level + 1], own_tokens, [shapes[level]], own_mask)
            for level, (own_query, own_points, own_tokens, own_mask) in enumerate(of_levels)
        ]
        return torch.cat(attended, dim=1)


class Encoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))

    def forward(
        self, tokens: Tensor, position: Tensor, valid_ratios: Tensor, shapes: SpatialShapes, padding_mask: Tensor
    ) -> Tensor:
        """tokens and position (N, S, C), valid_ratios (N, L, 2) as (x, y), padding_mask (N, S); returns (N, S, C)."""
        reference_points = encoder_reference_points(shapes, valid_ratios)
        for layer in self.layers:
            tokens = run_layer(layer, tokens, position, reference_points, shapes, padding_mask)
        return tokens


class DecoderLayer(TransformerLayer):
    """Self-attention among queries, deformable attention from queries to tokens, then the feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        self.self_attn = Attention(c, config.heads, config.dropout)
        self.norm2 = nn.LayerNorm(c)
        self.cross_attn = MultiScaleDeformableAttention(c, config.heads, config.levels, config.points)
        self.norm1 = nn.LayerNorm(c)
        self.linear1 = nn.Linear(c, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, c)
        self.norm3 = nn.LayerNorm(c)
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        reference_points: Tensor,
        tokens: Tensor,
        shapes: SpatialShapes,
        padding_mask: Tensor,
    ) -> Tensor:
        placed = queries + position
        queries = self.norm2(queries + self.dropout(self.self_attn(placed, placed, queries)))
        attended = self.cross_attn(queries + position, reference_points, tokens, shapes, padding_mask)
        queries = self.norm1(queries + self.dropout(attended))
        return self.norm3(queries + self.feed_forward(queries))


def encoder_reference_points(shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
    """Every token's own pixel centre, in the coordinates of every padded level: (N, S, L, 2) float32.

    A centre is first relative to its level's unpadded part, then scaled by each level's valid ratio.
    """
    centres = []
    for level, (height, width) in enumerate(shapes):
        y = (torch.arange(height, device=valid_ratios.device) + 0.5) / height
        x = (torch.arange(width, device=valid_ratios.device) + 0.5) / width
        y, x = torch.meshgrid(y, x, indexing="ij")
        grid = torch.stack([x.reshape(-1), y.reshape(-1)], dim=-1)
        centres.append(grid[None] / valid_ratios[:, None, level])
    return torch.cat(centres, dim=1)[:, :, None] * valid_ratios[:, None]


def decoder_reference_points(reference: Tensor, valid_ratios: Tensor) -> Tensor:
    """Reference points (N, Q, 2) or boxes (N, Q, 4) of the unpadded image, in every padded level: (N, Q, L, 2 or 4)."""
    scale = valid_ratios if reference.shape[-1] == 2 else torch.cat([valid_ratios, valid_ratios], dim=-1)
    return reference[:, :, None] * scale[:, None]
