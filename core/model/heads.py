"""The class and box heads of a detector."""

import math
from itertools import pairwise
from typing import cast

from torch import Tensor, nn

from ..config import ModelConfig

PRIOR_PROBABILITY = 0.01  # of a class at initialisation (focal loss paper, section 3.3)


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
    """The layer from queries (..., C) to class logits (..., K), or with softmax K + 1, "no object" the last.

    With sigmoid each class begins at PRIOR_PROBABILITY, as published.
    """
    if config.classification == "softmax":
        return nn.Linear(config.hidden_dim, config.num_classes + 1)
    head = nn.Linear(config.hidden_dim, config.num_classes)
    nn.init.constant_(head.bias, -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY))
    return head
