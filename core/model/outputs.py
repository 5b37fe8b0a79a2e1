"""The predictions of a detector: named outputs, each with losses of its own.

Shapes: N images, Q queries, S tokens of all levels, K logits of a query. Boxes are (cx, cy, w, h) in [0, 1] of the
unpadded image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

ImageMatches = tuple[np.ndarray, np.ndarray]  # queries, and the boxes of the image that they are matched to


@dataclass(frozen=True)
class Output:
    """One prediction per query, of a decoder layer or of the first stage.

    labels: what the classes distinguish: the categories, or objects from nothing (every object has label 0 then).
    matches: image by image, where they are known beforehand, each object `repeats` times; otherwise queries are matched
    by their costs.
    """

    name: str
    logits: Tensor  # (N, Q, K), float32
    boxes: Tensor  # (N, Q, 4), float32
    labels: Literal["categories", "objects"] = "categories"
    matches: Sequence[ImageMatches] | None = None
    repeats: int = 1


@dataclass(frozen=True)
class Predictions:
    """What one forward pass predicts.

    decoder: the outputs of its layers, first to last; the last one's are the detections. others: further outputs with
    losses, such as the proposals. softmax: whether a query has one class by softmax, "no object" the last (DETR), or
    each class by a sigmoid of its own.
    """

    decoder: tuple[Output, ...]
    others: tuple[Output, ...] = ()
    softmax: bool = False

    @staticmethod
    def of(
        layers: Sequence[tuple[Tensor, Tensor]], proposals: tuple[Tensor, Tensor] | None = None, softmax: bool = False
    ) -> "Predictions":
        """From (logits, boxes) of the decoder's layers, which are named "0", "1", ..., and of the first stage."""
        decoder = tuple(Output(str(layer), logits, boxes) for layer, (logits, boxes) in enumerate(layers))
        others = () if proposals is None else (Output(PROPOSALS, *proposals, labels="objects"),)
        return Predictions(decoder, others, softmax)

    @property
    def outputs(self) -> tuple[Output, ...]:
        return self.decoder + self.others

    @property
    def logits(self) -> Tensor:
        """(N, Q, K) of the last decoder layer; K classes, or with softmax one more."""
        return self.decoder[-1].logits

    @property
    def boxes(self) -> Tensor:
        """(N, Q, 4) of the last decoder layer."""
        return self.decoder[-1].boxes

    @property
    def aux(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """(logits, boxes) of the earlier decoder layers, first to last."""
        return tuple((output.logits, output.boxes) for output in self.decoder[:-1])

    @property
    def proposals(self) -> tuple[Tensor, Tensor] | None:
        """(N, S, K) and (N, S, 4) of the first stage, where there is one."""
        return next(((output.logits, output.boxes) for output in self.others if output.name == PROPOSALS), None)


PROPOSALS = "proposals"
