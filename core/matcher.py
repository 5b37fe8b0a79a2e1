"""Bipartite matching of predictions to objects (DETR, equation 1, with the focal class cost of Deformable DETR).

Shapes: D decoder layers, N images, Q queries, K classes, T boxes of all images together, M most boxes of one image.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ..data.boxes import cxcywh_to_xyxy, generalized_box_iou
from .config import OptimConfig

Matches = list[list[tuple[np.ndarray, np.ndarray]]]  # [layer][image] -> (queries, boxes of that image), by query


@torch.no_grad()
def match(
    logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, num_boxes: Sequence[int], config: OptimConfig
) -> Matches:
    """Assign each object of each image to one query, in every layer, at the least total cost.

    logits (D, N, Q, K), boxes (D, N, Q, 4) and targets (T, 4) as cxcywh, labels (T,), num_boxes per image.
    All costs are computed in one pass in float32 and copied to the host once.
    """
    layers, images = logits.shape[:2]
    most = max(num_boxes, default=0)
    if most == 0:
        nothing = np.empty(0, dtype=np.int64)
        return [[(nothing, nothing)] * images for _ in range(layers)]
    slots = _slots(num_boxes, most).to(targets.device)
    cost = _cost(logits.float(), boxes.float(), labels[slots], targets.float()[slots], config)
    # A cost that is not a number makes its loss not a number as well, which the trainer reports; here it must not
    # hide that behind an error of the assignment.
    costs = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    return [
        [linear_sum_assignment(costs[layer, image, :, :count]) for image, count in enumerate(num_boxes)]
        for layer in range(layers)
    ]


def _slots(num_boxes: Sequence[int], most: int) -> Tensor:
    """(N, M) rows of the packed boxes for each image; slots past an image's last box repeat some row."""
    counts = torch.as_tensor(num_boxes)
    starts = counts.cumsum(0) - counts
    rows = starts[:, None] + torch.arange(most).clamp(max=(counts[:, None] - 1).clamp(min=0))
    return rows.clamp(max=int(counts.sum()) - 1)


def _cost(logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, config: OptimConfig) -> Tensor:
    """(D, N, Q, M) from logits (D, N, Q, K), boxes (D, N, Q, 4), labels (N, M), targets (N, M, 4)."""
    layers, images, queries = logits.shape[:3]
    index = labels[None, :, None, :].expand(layers, images, queries, -1)
    probability = logits.sigmoid().gather(-1, index)
    alpha, gamma = config.focal_alpha, config.focal_gamma
    found = -alpha * (1 - probability) ** gamma * (probability + 1e-8).log()
    missed = -(1 - alpha) * probability**gamma * (1 - probability + 1e-8).log()
    l1 = torch.cdist(boxes, targets.expand(layers, -1, -1, -1), p=1)
    giou = generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(targets).expand(layers, -1, -1, -1))
    return config.class_weight * (found - missed) + config.l1_weight * l1 - config.giou_weight * giou
