"""From predictions to detections in pixels: the best scores over all queries and classes, as published.

Shapes: N images, Q queries, K classes, k detections per image.
"""

from dataclasses import dataclass

from torch import Tensor

from ..data.boxes import cxcywh_to_xyxy
from .heads import Predictions


@dataclass(frozen=True)
class Detections:
    """One image's detections, best first."""

    scores: Tensor  # (k,) float32 in [0, 1]
    labels: Tensor  # (k,) int64 in 0..K-1
    boxes_xyxy: Tensor  # (k, 4) float32, pixels of the image as stored


def detections(predictions: Predictions, original_sizes: Tensor, top_k: int) -> list[Detections]:
    """The `top_k` best (query, class) pairs of each image; a query may appear under several classes.

    With softmax a query has one class, its best but for "no object". original_sizes (N, 2) as (height, width) in
    pixels. There are fewer detections when there are fewer pairs.
    """
    images, queries, classes = predictions.logits.shape
    if predictions.softmax:
        best, of_query = predictions.logits.softmax(-1)[..., :-1].max(-1)
        scores, query = best.topk(min(top_k, queries), dim=1)
        labels = of_query.gather(1, query)
    else:
        scores, index = predictions.logits.sigmoid().view(images, -1).topk(min(top_k, queries * classes), dim=1)
        query, labels = index // classes, index % classes
    boxes = cxcywh_to_xyxy(predictions.boxes).gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * original_sizes.to(boxes).flip(1).repeat(1, 2)[:, None]  # (width, height, width, height)
    return [Detections(s, label, box) for s, label, box in zip(scores, labels, boxes, strict=True)]
