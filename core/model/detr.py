"""DETR (Carion et al., arXiv 2005.12872), the baseline of the paper: ordinary attention over one feature map.

Shapes: N images, H x W pixels, S tokens of the one map, Q queries, C hidden_dim, K logits of a query.
"""

import torch
from torch import Tensor, nn

from ..config import ModelConfig
from .attention import Attention
from .backbone import Backbone
from .dropout import Dropout
from .heads import MLP, class_head
from .outputs import Predictions
from .position import padding_of, sine_position
from .transformer import TransformerLayer, run_layer


class DetrEncoderLayer(TransformerLayer):
    """Every token attends to every other, then the feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        self.self_attn = Attention(c, config.heads, config.dropout)
        self.linear1 = nn.Linear(c, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, c)
        self.norm1 = nn.LayerNorm(c)
        self.norm2 = nn.LayerNorm(c)
        self.dropout = Dropout(config.dropout)

    def forward(self, tokens: Tensor, position: Tensor, padding_mask: Tensor) -> Tensor:
        placed = tokens + position
        attended = self.self_attn(placed, placed, tokens, padding_mask)
        tokens = self.norm1(tokens + self.dropout(attended))
        return self.norm2(tokens + self.feed_forward(tokens))


class DetrDecoderLayer(TransformerLayer):
    """Attention among queries, then from queries to all tokens, then the feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        c = config.hidden_dim
        self.self_attn = Attention(c, config.heads, config.dropout)
        self.multihead_attn = Attention(c, config.heads, config.dropout)
        self.linear1 = nn.Linear(c, config.feedforward_dim)
        self.linear2 = nn.Linear(config.feedforward_dim, c)
        self.norm1 = nn.LayerNorm(c)
        self.norm2 = nn.LayerNorm(c)
        self.norm3 = nn.LayerNorm(c)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, queries: Tensor, query_position: Tensor, tokens: Tensor, position: Tensor, padding_mask: Tensor
    ) -> Tensor:
        placed = queries + query_position
        attended = self.self_attn(placed, placed, queries)
        queries = self.norm1(queries + self.dropout(attended))
        attended = self.multihead_attn(queries + query_position, tokens + position, tokens, padding_mask)
        queries = self.norm2(queries + self.dropout(attended))
        return self.norm3(queries + self.feed_forward(queries))


class DetrEncoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DetrEncoderLayer(config) for _ in range(config.encoder_layers))


class DetrDecoder(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DetrDecoderLayer(config) for _ in range(config.decoder_layers))
        self.norm = nn.LayerNorm(config.hidden_dim)


class DetrTransformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = DetrEncoder(config)
        self.decoder = DetrDecoder(config)


class Detr(nn.Module):
    """DETR, and DETR-DC5 with `dilation`.

    Raises ValueError when the backbone cannot be used, OSError when its pretrained weights cannot be fetched.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.input_proj = nn.Conv2d(self.backbone.channels[-1], config.hidden_dim, kernel_size=1)
        self.transformer = DetrTransformer(config)
        self.query_embed = nn.Embedding(config.queries, config.hidden_dim)
        self.class_embed = class_head(config)
        self.bbox_embed = MLP(config.hidden_dim, 4)
        for parameter in self.transformer.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, images: Tensor, padding_mask: Tensor) -> Predictions:
        """images (N, 3, H, W) normalised, zero on padding; padding_mask (N, H, W) bool, True on padding.

        Returns logits (N, Q, K) and boxes (N, Q, 4) of every decoder layer.
        """
        features = self.input_proj(self.backbone(images)[-1])
        mask = padding_of(features, padding_mask)
        position = sine_position(mask, self.config.hidden_dim, centred=False).to(features.dtype)
        tokens, position = (x.flatten(2).transpose(1, 2) for x in (features, position))
        mask = mask.flatten(1)
        for layer in self.transformer.encoder.layers:
            tokens = run_layer(layer, tokens, position, mask)

        indices = torch.arange(self.config.queries, device=images.device)
        query_position = self.query_embed(indices).expand(len(images), -1, -1)
        queries = torch.zeros_like(query_position)
        layers = []
        for layer in self.transformer.decoder.layers:
            queries = run_layer(layer, queries, query_position, tokens, position, mask)
            seen = self.transformer.decoder.norm(queries)
            layers.append((self.class_embed(seen).float(), self.bbox_embed(seen).float().sigmoid()))
        return Predictions.of(layers, softmax=self.config.classification == "softmax")
