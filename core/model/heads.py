"""What a detector ends in: class and box heads, and the predictions that every architecture returns.

Shapes: N images, Q queries, S tokens of all levels, K logits of a query, C hidden_dim.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from ..config import ModelConfig

PRIOR_PROBABILITY = 0.01  # of a class at initialisation (focal loss paper, section 3.3)


@dataclass(frozen=True)
class Predictions:
    """What one forward pass predicts, in float32. Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image."""

    logits: Tensor  # (N, Q, K) of the last decoder layer; K classes, or with softmax one more, "no object", the last
    boxes: Tensor  # (N, Q, 4)
    aux: tuple[tuple[Tensor, Tensor], ...]  # (logits, boxes) of the earlier decoder layers, first to last
    proposals: tuple[Tensor, Tensor] | None  # (N, S, K) and (N, S, 4) of the first stage
    softmax: bool = False  # whether a query's logits are alternatives (DETR) or each its own question


class MLP(nn.Module):
    """Three linear layers with ReLU between: the box head."""

    def __init__(self, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        sizes = [hidden_dim, hidden_dim, hidden_dim, output_dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    @property
    def output_layer(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


def class_head(config: ModelConfig) -> nn.Linear:
    """Logits of a query; sigmoid heads find nothing yet (published initialisations)."""
    if config.classification == "softmax":
        return nn.Linear(config.hidden_dim, config.num_classes + 1)
    head = nn.Linear(config.hidden_dim, config.num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return head
