"""Hungarian matching of predictions to objects (DETR, equation 1, with the focal class cost of Deformable DETR).

Shapes: D decoder layers, N images, Q queries, K logits of a query, T boxes of all images together, M most boxes of
one image, C candidates of a box.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ...data.boxes import cxcywh_to_xyxy, generalized_box_iou
from ..config import OptimConfig
from .transfer import HostCopy, to_device

# With this many times more queries than boxes, only each box's best queries go to the host: the proposals' case.
_MANY = 64


class Stack(NamedTuple):
    """Predictions of D layers that have as many queries each, and what they are matched to."""

    logits: Tensor  # (D, N, Q, K)
    boxes: Tensor  # (D, N, Q, 4), cxcywh
    labels: Tensor  # (T,)


Matches = list[list[tuple[np.ndarray, np.ndarray]]]  # [layer][image] -> (queries, boxes of that image), by query


class Matching:
    """The assignments of several stacks of predictions, made in two halves.

    Making it computes all costs on the device in float32 and starts their one copy to the host. `solve` waits for
    the copy and assigns; what is queued on the device in between runs in that time.
    """

    @torch.no_grad()
    def __init__(
        self, stacks: Sequence[Stack], targets: Tensor, num_boxes: Sequence[int], config: OptimConfig, softmax: bool
    ) -> None:
        """targets: boxes (T, 4) as cxcywh, those of an image one after another; num_boxes: how many each image has."""
        self._num_boxes, self._shapes = num_boxes, [stack.boxes.shape[:3] for stack in stacks]
        self._most = max(num_boxes, default=0)
        if self._most == 0:
            return
        slots = to_device(_slots(num_boxes, self._most), targets.device)
        parts = []
        for stack in stacks:
            cost = _cost(stack, targets.float()[slots], slots, config, softmax)
            # A cost that is not a number makes its loss not a number too, which the trainer reports; here it must
            # not hide that behind an error of the assignment.
            cost = cost.nan_to_num(nan=1e6, posinf=1e6, neginf=-1e6)
            if _is_sparse(cost.shape[-1], self._most):
                cost, candidates = cost.topk(self._most, largest=False)
                parts.append(candidates.flatten().float())  # exact: there are fewer than 2^24 queries
            parts.append(cost.flatten())
        self._copy = HostCopy(torch.cat(parts))

    def solve(self) -> list[Matches]:
        """For each stack, layer and image the pairs of least total cost, with no box and no query twice."""
        if self._most == 0:
            nothing = np.empty(0, dtype=np.int64)
            return [[[(nothing, nothing)] * images for _ in range(layers)] for layers, images, _ in self._shapes]
        values, start = self._copy.wait().numpy(), 0

        def take(*shape: int) -> np.ndarray:
            nonlocal start
            start += (size := int(np.prod(shape)))
            return values[start - size : start].reshape(shape)

        solved: list[Matches] = []
        for layers, images, queries in self._shapes:
            sparse = _is_sparse(queries, self._most)
            shape = (layers, images, self._most, self._most if sparse else queries)
            candidates = take(*shape).astype(np.int64) if sparse else None
            costs = take(*shape)
            solved.append(
                [
                    [
                        _assign(costs[d, n, :count], None if candidates is None else candidates[d, n, :count])
                        for n, count in enumerate(self._num_boxes)
                    ]
                    for d in range(layers)
                ]
            )
        return solved


def _is_sparse(queries: int, most: int) -> bool:
    return queries >= _MANY * most


def _assign(costs: np.ndarray, candidates: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Queries, rising, and the boxes assigned to them; costs (M, Q), or (M, C) of the named candidates.

    A box's M best queries are enough, because the M - 1 other boxes take at most M - 1 of them. If the box had a query
    beyond them, one of them would be free, and cost no more.
    """
    if candidates is not None:
        names, columns = np.unique(candidates, return_inverse=True)
        whole = np.full((len(costs), len(names)), np.inf)
        np.put_along_axis(whole, columns.reshape(candidates.shape), costs, axis=1)
        boxes, found = linear_sum_assignment(whole)
        queries = names[found]
    else:
        boxes, queries = linear_sum_assignment(costs)
    order = queries.argsort()
    return queries[order], boxes[order]


def _slots(num_boxes: Sequence[int], most: int) -> Tensor:
    """(N, M) rows of the packed boxes for each image; slots past an image's last box repeat some row."""
    counts = torch.as_tensor(num_boxes)
    starts = counts.cumsum(0) - counts
    rows = starts[:, None] + torch.arange(most).clamp(max=(counts[:, None] - 1).clamp(min=0))
    return rows.clamp(max=sum(num_boxes) - 1)


def _cost(stack: Stack, targets: Tensor, slots: Tensor, config: OptimConfig, softmax: bool) -> Tensor:
    """Matching costs (D, N, M, Q) of class, L1 and GIoU; targets (N, M, 4)."""
    logits, boxes = stack.logits.float(), stack.boxes.float()
    layers, images, queries = boxes.shape[:3]
    index = stack.labels[slots][None, :, None, :].expand(layers, images, queries, -1)
    if softmax:
        of_class = -logits.softmax(-1).gather(-1, index)
    else:
        alpha, gamma = config.focal_alpha, config.focal_gamma
        probability = logits.gather(-1, index).sigmoid()
        found = -alpha * (1 - probability) ** gamma * (probability + 1e-8).log()
        missed = -(1 - alpha) * probability**gamma * (1 - probability + 1e-8).log()
        of_class = found - missed
    targets = targets.expand(layers, -1, -1, -1)
    l1 = torch.cdist(targets, boxes, p=1)
    giou = generalized_box_iou(cxcywh_to_xyxy(targets), cxcywh_to_xyxy(boxes))
    return config.class_weight * of_class.transpose(-1, -2) + config.l1_weight * l1 - config.giou_weight * giou
