"""The training loss: class, L1 and GIoU over every decoder layer and the proposals (section 4 and appendix A.4).

Shapes: D decoder layers, N images, Q queries, K logits of a query, T boxes of all images, R matched pairs of a stack,
layer after layer.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.batch import Batch
from ...data.boxes import cxcywh_to_xyxy, paired_generalized_box_iou
from ..config import OptimConfig
from .heads import Predictions
from .matcher import Matches, Matching, Stack
from .transfer import to_device

PARTS = ("class", "l1", "giou")


@dataclass(frozen=True)
class Losses:
    """Unweighted losses: a row per part (class, l1, giou), a column per layer; `layers` names the columns."""

    values: Tensor  # (3, D) or, with proposals, (3, D + 1), float32
    layers: tuple[str, ...]  # "0" .. "D-1", then "proposals"
    class_error: Tensor  # () percent of the last layer's matched queries whose best class is wrong; not a loss
    cardinality_error: Tensor  # (D,) or (D + 1,) how many objects an image's count is off by; not a loss

    def weighted(self, config: OptimConfig) -> Tensor:
        """The same table times each part's weight; its sum is what is minimised."""
        parts = zip(self.values, (config.class_weight, config.l1_weight, config.giou_weight), strict=True)
        return torch.stack([values * weight for values, weight in parts])


def criterion(
    predictions: Predictions,
    batch: Batch,
    config: OptimConfig,
    num_objects: Tensor | float,
    num_parts: int = 1,
    num_matched: Tensor | float | None = None,
    num_images: Tensor | float | None = None,
) -> Losses:
    """Match each layer's predictions to the batch's objects and take the losses.

    num_objects is the number of objects in the whole step, num_parts the number of equal parts (ranks times
    micro-batches) that it is divided in, of which this batch is one: with them, the mean of the parts' gradients is
    the gradient of the whole. num_matched is how many of the objects find a query: fewer where an image has more
    objects than there are queries; num_images, how many images of the step are real. Both matter to softmax alone.
    Proposals are matched without regard to classes: every object has label 0 there (section 4.2).

    The host waits for the device once, for the matching costs. Until they are there the device has the part of the
    class loss that needs no matching.
    """
    outputs = (*predictions.aux, (predictions.logits, predictions.boxes))
    logits, boxes = (torch.stack(part) for part in zip(*outputs, strict=True))
    stacks = [Stack(logits, boxes, batch.labels)]
    layers = [str(layer) for layer in range(len(outputs))]
    if predictions.proposals is not None:
        logits, boxes = predictions.proposals
        stacks.append(Stack(logits[None], boxes[None], torch.zeros_like(batch.labels)))
        layers.append("proposals")
    counts = batch.num_boxes.tolist()
    matching = Matching(stacks, batch.boxes_cxcywh, counts, config, predictions.softmax)
    class_loss = _cross_entropy if predictions.softmax else _focal
    real = batch.is_real.float()
    unmatched = [class_loss(stack.logits, config).sum(2) @ real for stack in stacks]
    cardinality = torch.cat([_cardinality_error(stack.logits, batch.num_boxes, real) for stack in stacks])
    pairs = [_Pairs(stack, matches, batch.num_boxes) for stack, matches in zip(stacks, matching.solve(), strict=True)]

    columns = []
    for stack, pair, of_none in zip(stacks, pairs, unmatched, strict=True):
        boxes, truth = pair.of(stack.boxes), batch.boxes_cxcywh.index_select(0, pair.targets)
        change = class_loss(pair.of(stack.logits), config, stack.labels.index_select(0, pair.targets))
        l1 = F.l1_loss(boxes, truth, reduction="none").sum(-1)
        giou = 1 - paired_generalized_box_iou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(truth))
        of_class, l1, giou = torch.stack([change, l1, giou]).view(3, len(stack.logits), pair.per_layer).sum(-1)
        columns.append(torch.stack([of_none + of_class, l1, giou]))
    of_class, l1, giou = torch.cat(columns, dim=1)
    objects = torch.as_tensor(num_objects, dtype=torch.float32)
    normaliser = objects.clamp(min=1) / num_parts
    class_normaliser = normaliser
    if predictions.softmax:  # the sum of all queries' weights
        images = real.sum() if num_images is None else num_images / num_parts
        matched = (objects if num_matched is None else num_matched) / num_parts
        queries = images * predictions.boxes.shape[1]
        class_normaliser = config.no_object_weight * queries + (1 - config.no_object_weight) * matched
    values = torch.stack([of_class / class_normaliser, l1 / normaliser, giou / normaliser])
    return Losses(values, tuple(layers), _class_error(stacks[0], pairs[0]), cardinality)


class _Pairs:
    """Matched pairs on the device: rows of the predictions viewed as (D N Q, ...), and rows of the packed boxes."""

    def __init__(self, stack: Stack, matches: Matches, num_boxes: Tensor) -> None:
        queries = stack.boxes.shape[2]
        starts = (num_boxes.cumsum(0) - num_boxes).tolist()
        images = len(starts)
        rows = [
            query + (layer * images + image) * queries
            for layer, of_layer in enumerate(matches)
            for image, (query, _) in enumerate(of_layer)
        ]
        targets = [box + starts[image] for of_layer in matches for image, (_, box) in enumerate(of_layer)]
        both = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(targets)]))
        self.rows, self.targets = to_device(both, stack.logits.device)
        self.per_layer = both.shape[1] // len(matches)

    def of(self, predicted: Tensor) -> Tensor:
        """(R, ...) the matched ones of (D, N, Q, ...)."""
        return predicted.flatten(0, 2).index_select(0, self.rows)


def _focal(logits: Tensor, config: OptimConfig, labels: Tensor | None = None) -> Tensor:
    """Sigmoid focal loss (Lin et al., equation 5), summed over the classes: (...) from logits (..., K).

    Without labels: when no class is true. With labels (R,) for logits (R, K): what their being true changes.
    """
    if labels is not None:
        logits = logits.gather(-1, labels[:, None])
    probability = logits.sigmoid()
    loss = (1 - config.focal_alpha) * probability**config.focal_gamma * F.softplus(logits)
    if labels is not None:
        loss = config.focal_alpha * (1 - probability) ** config.focal_gamma * F.softplus(-logits) - loss
    return loss.sum(-1)


def _cross_entropy(logits: Tensor, config: OptimConfig, labels: Tensor | None = None) -> Tensor:
    """Weighted cross entropy with "no object" as the last class (DETR, section 3.1): (...) from logits (..., K).

    Without labels: when there is no object. With labels (R,) for logits (R, K): what an object of that class changes.
    """
    log_probability = logits.log_softmax(-1)
    loss = -config.no_object_weight * log_probability[..., -1]
    return loss if labels is None else -log_probability.gather(-1, labels[:, None])[:, 0] - loss


@torch.no_grad()
def _class_error(stack: Stack, pairs: _Pairs) -> Tensor:
    """100 where nothing is matched, as published."""
    last = len(pairs.rows) - pairs.per_layer
    best = pairs.of(stack.logits)[last:].argmax(-1)
    right = best == stack.labels.index_select(0, pairs.targets[last:])
    return 100 - 100 * right.float().sum() / max(1, pairs.per_layer)


@torch.no_grad()
def _cardinality_error(logits: Tensor, num_boxes: Tensor, real: Tensor) -> Tensor:
    """(D,) mean over the images of |queries whose best class is not the last one - objects|, as published."""
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return (found - to_device(num_boxes, logits.device)).abs().float() @ real / real.sum().clamp(min=1)
