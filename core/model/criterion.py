"""The training loss: class, L1 and GIoU of every output of the detector (section 4 and appendix A.4).

Shapes: D outputs of a stack, N images, Q queries, K logits of a query, T boxes of all images, R matched pairs of a
stack, output after output; P parts and L layers of the table of losses.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...data.batch import Batch
from ...data.boxes import cxcywh_to_xyxy, paired_generalized_box_iou
from ..config import OptimConfig
from .matcher import Matches, Matching, Stack
from .outputs import Output, Predictions
from .transfer import to_device


@dataclass(frozen=True)
class Matched:
    """Predictions and the objects that they are matched to, pair by pair. Boxes are cxcywh."""

    logits: Tensor  # (R, K)
    boxes: Tensor  # (R, 4)
    labels: Tensor  # (R,) of the objects
    targets: Tensor  # (R, 4) the objects' boxes

    def __getitem__(self, rows: slice) -> "Matched":
        return Matched(self.logits[rows], self.boxes[rows], self.labels[rows], self.targets[rows])


@dataclass(frozen=True)
class BoxLoss:
    """A part of the loss over matched queries only. of: the loss (R,) of R pairs. weight: its factor in the total."""

    of: Callable[[Matched], Tensor]
    weight: Callable[[OptimConfig], float]


def _l1(pairs: Matched) -> Tensor:
    return F.l1_loss(pairs.boxes, pairs.targets, reduction="none").sum(-1)


def _giou(pairs: Matched) -> Tensor:
    return 1 - paired_generalized_box_iou(cxcywh_to_xyxy(pairs.boxes), cxcywh_to_xyxy(pairs.targets))


# Parts in addition to "class", by name; code that reports losses takes the names from the run.
BOX_LOSSES: dict[str, BoxLoss] = {
    "l1": BoxLoss(_l1, lambda config: config.l1_weight),
    "giou": BoxLoss(_giou, lambda config: config.giou_weight),
}


@dataclass(frozen=True)
class Losses:
    """Unweighted losses: a row for each of `parts`, a column for each of `layers`, the outputs of the detector."""

    values: Tensor  # (P, L), float32
    parts: tuple[str, ...]  # "class", then the names of BOX_LOSSES
    layers: tuple[str, ...]  # "0" .. of the decoder, then what else the detector predicts, such as "proposals"
    class_error: Tensor  # () percent of the last decoder layer's matched queries whose best class is wrong; not a loss
    cardinality_error: Tensor  # (L,) how many objects an image's count is off by; not a loss

    def weighted(self, config: OptimConfig) -> Tensor:
        """The table (P, L) times each part's weight; its sum is the loss that is minimised."""
        weights = {"class": config.class_weight} | {name: part.weight(config) for name, part in BOX_LOSSES.items()}
        return torch.stack([values * weights[part] for part, values in zip(self.parts, self.values, strict=True)])


def criterion(
    predictions: Predictions,
    batch: Batch,
    config: OptimConfig,
    num_objects: Tensor | float,
    num_shares: int = 1,
    num_matched: Tensor | float | None = None,
    num_images: Tensor | float | None = None,
) -> Losses:
    """Match each output to the batch's objects, unless its matches are known, and compute the losses.

    num_objects: objects in the whole step. num_shares: equal shares (world size times micro-batches) of the step, of
    which this batch is one. With both, the mean of the shares' gradients is the gradient of the global batch.
    num_matched: how many of the objects find a query: fewer when an image has more objects than queries. num_images:
    real images in the whole step. These two matter with softmax only.
    Losses of an output that has each object `repeats` times are means over those.
    Outputs whose labels are "objects" have label 0 for every object: proposals are matched without regard to classes
    (section 4.2).

    The host waits for the device once, for the matching costs. In that time the device computes the part of the class
    loss that needs no matching.
    """
    stacks = [_Stacked(outputs, batch.labels) for outputs in _of_one_shape(predictions)]
    unknown = [stacked.stack for stacked in stacks if stacked.matches is None]
    matching = Matching(unknown, batch.boxes_cxcywh, batch.num_boxes.tolist(), config, predictions.softmax)
    class_loss = _cross_entropy if predictions.softmax else _focal
    real = batch.is_real.float()
    unmatched = [class_loss(stacked.stack.logits, config).sum(2) @ real for stacked in stacks]
    cardinality = torch.cat([_cardinality_error(stacked.stack.logits, batch.num_boxes, real) for stacked in stacks])
    solved = iter(matching.solve())
    matches = [next(solved) if stacked.matches is None else stacked.matches for stacked in stacks]

    objects = torch.as_tensor(num_objects, dtype=torch.float32)
    columns, pairs = [], {}
    for stacked, of_stack, of_none in zip(stacks, matches, unmatched, strict=True):
        stack, names = stacked.stack, stacked.names
        matched = _matched(stack, of_stack, batch)
        of_class = class_loss(matched.logits, config, matched.labels)
        parts = torch.stack([of_class, *(part.of(matched) for part in BOX_LOSSES.values())])
        each = parts.shape[1] // len(names)
        of_class, *of_boxes = parts.view(len(parts), len(names), each).sum(-1)
        normaliser = class_normaliser = objects.clamp(min=1) * stacked.repeats / num_shares
        if predictions.softmax:  # the sum of all queries' weights
            images = real.sum() if num_images is None else num_images / num_shares
            with_object = (objects if num_matched is None else num_matched) * stacked.repeats / num_shares
            queries = images * stack.boxes.shape[2]
            class_normaliser = config.no_object_weight * queries + (1 - config.no_object_weight) * with_object
        of_class = (of_none + of_class) / class_normaliser
        columns.append(torch.stack([of_class, *(values / normaliser for values in of_boxes)]))
        pairs |= {name: matched[layer * each : (layer + 1) * each] for layer, name in enumerate(names)}

    return Losses(
        torch.cat(columns, dim=1),
        ("class", *BOX_LOSSES),
        tuple(pairs),
        _class_error(pairs[predictions.decoder[-1].name]),
        cardinality,
    )


def _of_one_shape(predictions: Predictions) -> list[list[Output]]:
    """The outputs in their order, in groups that can be stacked."""
    together: dict[tuple, list[Output]] = {}
    for output in predictions.outputs:
        known = None if output.matches is None else sum(len(queries) for queries, _ in output.matches)
        kind = (output.logits.shape, output.boxes.shape, output.labels, output.repeats, known)
        together.setdefault(kind, []).append(output)
    return list(together.values())


class _Stacked:
    """Outputs of one shape as one stack."""

    def __init__(self, outputs: list[Output], labels: Tensor) -> None:
        first = outputs[0]
        self.names, self.repeats = [output.name for output in outputs], first.repeats
        self.matches: Matches | None = None
        if first.matches is not None:
            self.matches = [list(output.matches or ()) for output in outputs]
        logits, boxes = first.logits[None], first.boxes[None]
        if len(outputs) > 1:
            logits, boxes = (torch.stack([getattr(output, part) for output in outputs]) for part in ("logits", "boxes"))
        self.stack = Stack(logits, boxes, labels if first.labels == "categories" else torch.zeros_like(labels))


def _matched(stack: Stack, matches: Matches, batch: Batch) -> Matched:
    """The matched pairs: rows of the predictions viewed as (D N Q, ...), and rows of the packed boxes."""
    queries = stack.boxes.shape[2]
    starts = (batch.num_boxes.cumsum(0) - batch.num_boxes).tolist()
    images = len(starts)
    rows = [
        query + (layer * images + image) * queries
        for layer, of_layer in enumerate(matches)
        for image, (query, _) in enumerate(of_layer)
    ]
    targets = [box + starts[image] for of_layer in matches for image, (_, box) in enumerate(of_layer)]
    both = torch.from_numpy(np.stack([np.concatenate(rows), np.concatenate(targets)]))
    predicted, truth = to_device(both, stack.logits.device)
    logits, boxes = (part.flatten(0, 2).index_select(0, predicted) for part in (stack.logits, stack.boxes))
    return Matched(logits, boxes, stack.labels.index_select(0, truth), batch.boxes_cxcywh.index_select(0, truth))


def _focal(logits: Tensor, config: OptimConfig, labels: Tensor | None = None) -> Tensor:
    """Sigmoid focal loss (Lin et al., equation 5), summed over the classes: (...) from logits (..., K).

    Without labels: the loss if no class is true. With labels (R,) for logits (R, K): the change if these are true.
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

    Without labels: the loss without an object. With labels (R,) for logits (R, K): the change by these objects.
    """
    log_probability = logits.log_softmax(-1)
    loss = -config.no_object_weight * log_probability[..., -1]
    return loss if labels is None else -log_probability.gather(-1, labels[:, None])[:, 0] - loss


@torch.no_grad()
def _class_error(matched: Matched) -> Tensor:
    """Percent of the matched queries whose best class is wrong; 100 if nothing is matched, as published."""
    right = matched.logits.argmax(-1) == matched.labels
    return 100 - 100 * right.float().sum() / max(1, len(right))


@torch.no_grad()
def _cardinality_error(logits: Tensor, num_boxes: Tensor, real: Tensor) -> Tensor:
    """(D,) mean over the images of |queries whose best class is not the last one - objects|, as published."""
    found = (logits.argmax(-1) != logits.shape[-1] - 1).sum(-1)
    return (found - to_device(num_boxes, logits.device)).abs().float() @ real / real.sum().clamp(min=1)
