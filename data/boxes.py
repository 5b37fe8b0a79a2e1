"""Boxes: conversions, the rule for bad ones, overlap.

Three formats, always named: xywh (left, top, width, height: COCO json), xyxy (left, top, right, bottom: geometry),
cxcywh (centre, width, height relative to the image, in [0, 1]: the model). Pixel coordinates are continuous: a pixel
covers [i, i + 1].

The rule for annotated boxes, everywhere in this package: a box that overhangs the image is clipped to it; a box that
then has no width or no height, or holds a number that is not finite, is degenerate and cannot be trained on.

Shapes: N and M boxes, `...` any leading dimensions.
"""

import torch
from torch import Tensor

# Divides where two boxes without area meet, so that neither value nor gradient becomes NaN. Far below any real area:
# one pixel of a 10000 x 10000 image is 1e-8 of it.
_LEAST_AREA = 1e-10


def cxcywh_to_xyxy(boxes_cxcywh: Tensor) -> Tensor:
    """(..., 4) centre and size to corners."""
    cx, cy, w, h = boxes_cxcywh.unbind(-1)
    return torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), dim=-1)


def xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners to centre and size."""
    left, top, right, bottom = boxes_xyxy.unbind(-1)
    return torch.stack(((left + right) / 2, (top + bottom) / 2, right - left, bottom - top), dim=-1)


def xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """(..., 4) corner and size (COCO json) to corners."""
    return torch.cat((boxes_xywh[..., :2], boxes_xywh[..., :2] + boxes_xywh[..., 2:]), dim=-1)


def xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corners to corner and size (COCO json)."""
    return torch.cat((boxes_xyxy[..., :2], boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]), dim=-1)


def clip(boxes_xyxy: Tensor, height: float, width: float) -> Tensor:
    """(..., 4) the part of each box inside [0, width] x [0, height]."""
    limits = boxes_xyxy.new_tensor((width, height, width, height))
    return torch.minimum(boxes_xyxy.clamp(min=0), limits)


def area(boxes_xyxy: Tensor) -> Tensor:
    """(...) area of each box; zero for one that is inside out."""
    return _product(boxes_xyxy[..., 2:] - boxes_xyxy[..., :2])


def is_degenerate(boxes_xyxy: Tensor) -> Tensor:
    """(...) bool: no width, no height, or a coordinate that is not finite. Clip first."""
    has_size = (boxes_xyxy[..., 2:] > boxes_xyxy[..., :2]).all(-1)
    return ~(has_size & boxes_xyxy.isfinite().all(-1))


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union of every a (..., N, 4) with every b (..., M, 4): (..., N, M), at least float32."""
    return _iou_and_union(a_xyxy.unsqueeze(-2), b_xyxy.unsqueeze(-3))[0]


def generalized_box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., 2019) of every a (..., N, 4) with every b (..., M, 4).

    Returns (..., N, M) in [-1, 1], computed in float32 or better; leading dimensions broadcast.
    """
    return paired_generalized_box_iou(a_xyxy.unsqueeze(-2), b_xyxy.unsqueeze(-3))


def paired_generalized_box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Generalised IoU of each a with the b at its own place, both (..., 4): (...), in float32 or better."""
    a_xyxy, b_xyxy = _at_least_float32(a_xyxy), _at_least_float32(b_xyxy)
    iou, union = _iou_and_union(a_xyxy, b_xyxy)
    top_left = torch.minimum(a_xyxy[..., :2], b_xyxy[..., :2])
    bottom_right = torch.maximum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    hull = _product(bottom_right - top_left)
    return iou - (hull - union) / hull.clamp(min=_LEAST_AREA)


def _iou_and_union(a_xyxy: Tensor, b_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    a_xyxy, b_xyxy = _at_least_float32(a_xyxy), _at_least_float32(b_xyxy)
    top_left = torch.maximum(a_xyxy[..., :2], b_xyxy[..., :2])
    bottom_right = torch.minimum(a_xyxy[..., 2:], b_xyxy[..., 2:])
    intersection = _product(bottom_right - top_left)
    union = area(a_xyxy) + area(b_xyxy) - intersection
    return intersection / union.clamp(min=_LEAST_AREA), union


def _product(size: Tensor) -> Tensor:
    """(..., 2) width and height to (...) area, zero when one is negative. The gradient of prod would ask the host."""
    width, height = size.clamp(min=0).unbind(-1)
    return width * height


def _at_least_float32(boxes: Tensor) -> Tensor:
    return boxes if boxes.dtype == torch.float64 else boxes.float()
