"""From predictions to detections in pixels: the best scores over all queries and classes, as published.

Shapes: N images, Q queries, K classes, k detections per image.
"""

from dataclasses import dataclass

from torch import Tensor

from ...data.boxes import cxcywh_to_xyxy
from .outputs import Predictions

NOTHING = -1.0  # the score of what is no detection


@dataclass(frozen=True)
class Detections:
    """One image's detections, best first."""

    scores: Tensor  # (k,) float32 in [0, 1]
    labels: Tensor  # (k,) int64 in 0..K-1
    boxes_xyxy: Tensor  # (k, 4) float32, pixels of the image as stored
    num_not_finite: int  # queries left out, because their box or one of their logits is infinite or not a number


def detections(predictions: Predictions, original_sizes: Tensor, top_k: int) -> list[Detections]:
    """The `top_k` best (query, class) pairs of each image; a query may appear under several classes.

    With softmax a query has one class, its best but for "no object". original_sizes (N, 2) as (height, width) in
    pixels. There are fewer detections when there are fewer pairs. A query with a number that is not finite detects
    nothing: its score would be the best of all, and its box a hit on any object.
    """
    images, queries, classes = predictions.logits.shape
    finite = predictions.logits.isfinite().all(-1) & predictions.boxes.isfinite().all(-1)  # (N, Q)
    if predictions.softmax:
        best, of_query = predictions.logits.softmax(-1)[..., :-1].max(-1)
        scores, query = best.masked_fill(~finite, NOTHING).topk(min(top_k, queries), dim=1)
        labels = of_query.gather(1, query)
    else:
        scores = predictions.logits.sigmoid().masked_fill(~finite[..., None], NOTHING)
        scores, index = scores.view(images, -1).topk(min(top_k, queries * classes), dim=1)
        query, labels = index // classes, index % classes
    boxes = cxcywh_to_xyxy(predictions.boxes).gather(1, query[..., None].expand(-1, -1, 4))
    boxes = boxes * original_sizes.to(boxes).flip(1).repeat(1, 2)[:, None]  # (width, height, width, height)
    left_out = (~finite).sum(1).tolist()
    found = zip(scores, labels, boxes, scores != NOTHING, left_out, strict=True)
    return [
        Detections(score[is_one], label[is_one], box[is_one], count) if count else Detections(score, label, box, 0)
        for score, label, box, is_one, count in found
    ]
