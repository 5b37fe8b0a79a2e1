"""The training loss: focal, L1 and GIoU over every decoder layer and the proposals (section 4 and appendix A.4).

Shapes: D decoder layers, N images, Q queries, K classes, T boxes of all images together.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.batch import Batch
from ..data.boxes import cxcywh_to_xyxy, paired_generalized_box_iou
from .config import OptimConfig
from .detector import Predictions
from .matcher import Matches, match

PARTS = ("class", "l1", "giou")


@dataclass(frozen=True)
class Losses:
    """Unweighted losses: a row per part (class, l1, giou), a column per layer; `layers` names the columns."""

    values: Tensor  # (3, D) or, with proposals, (3, D + 1), float32
    layers: tuple[str, ...]  # "0" .. "D-1", then "proposals"

    def weighted(self, config: OptimConfig) -> Tensor:
        """The same table times each part's weight; its sum is what is minimised."""
        weights = (config.class_weight, config.l1_weight, config.giou_weight)
        return self.values * self.values.new_tensor(weights)[:, None]


def criterion(predictions: Predictions, batch: Batch, config: OptimConfig, normaliser: float) -> Losses:
    """Match each layer's predictions to the batch's objects and take the losses.

    normaliser is the mean number of objects per rank over the whole step, at least 1: with it, the mean of the
    ranks' gradients is the gradient of the global batch. Proposals are matched without regard to classes: every
    object has label 0 there (section 4.2).
    """
    logits = torch.stack([logits for logits, _ in (*predictions.aux, (predictions.logits, None))])
    boxes = torch.stack([boxes for _, boxes in (*predictions.aux, (None, predictions.boxes))])
    tables = [_losses(logits, boxes, batch.labels, batch, config, normaliser)]
    layers = [str(layer) for layer in range(len(logits))]
    if predictions.proposals is not None:
        logits, boxes = predictions.proposals
        tables.append(_losses(logits[None], boxes[None], torch.zeros_like(batch.labels), batch, config, normaliser))
        layers.append("proposals")
    return Losses(torch.cat(tables, dim=1), tuple(layers))


def _losses(
    logits: Tensor, boxes: Tensor, labels: Tensor, batch: Batch, config: OptimConfig, normaliser: float
) -> Tensor:
    """(3, D) from logits (D, N, Q, K) and boxes (D, N, Q, 4)."""
    matches = match(logits, boxes, labels, batch.boxes_cxcywh, batch.num_boxes.tolist(), config)
    rows, targets = (index.to(logits.device) for index in _flat(matches, logits.shape[2], batch.num_boxes))
    layers = len(logits)
    wanted = torch.zeros_like(logits).view(-1, logits.shape[-1])
    wanted[rows, labels[targets]] = 1
    focal = _focal(logits, wanted.view_as(logits), config).sum((1, 2, 3))
    chosen, truth = boxes.reshape(-1, 4)[rows], batch.boxes_cxcywh[targets]
    l1 = F.l1_loss(chosen, truth, reduction="none").view(layers, -1).sum(1)
    giou = 1 - paired_generalized_box_iou(cxcywh_to_xyxy(chosen), cxcywh_to_xyxy(truth))
    return torch.stack([focal, l1, giou.view(layers, -1).sum(1)]) / normaliser


def _flat(matches: Matches, queries: int, num_boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the predictions viewed as (D N Q, ...) and rows of the packed boxes, layer after layer."""
    starts = (num_boxes.cumsum(0) - num_boxes).tolist()
    images = len(starts)
    rows = [
        torch.from_numpy(query) + (layer * images + image) * queries
        for layer, of_layer in enumerate(matches)
        for image, (query, _) in enumerate(of_layer)
    ]
    targets = [torch.from_numpy(box) + starts[image] for of_layer in matches for image, (_, box) in enumerate(of_layer)]
    return torch.cat(rows), torch.cat(targets)


def _focal(logits: Tensor, wanted: Tensor, config: OptimConfig) -> Tensor:
    """Element-wise sigmoid focal loss (Lin et al., equation 5)."""
    probability = logits.sigmoid()
    agreement = probability * wanted + (1 - probability) * (1 - wanted)
    alpha = config.focal_alpha * wanted + (1 - config.focal_alpha) * (1 - wanted)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return alpha * (1 - agreement) ** config.focal_gamma * cross_entropy
