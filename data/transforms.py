"""From a decoded image to a training or evaluation sample: resample once to a view, carry the boxes along.

An image is turned by the orientation that its sample notes, not by what EXIF says: boxes refer to the pixels that
packing found them to refer to.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from . import boxes
from .batch import Sample
from .categories import Categories
from .config import MOST_PIXELS, DataConfig
from .images import load_image
from .views import View, evaluation_view

REDUCED = 2.0  # a JPEG is decoded smaller while it stays so many times as large as it is seen (docs/data.md)


def load_for(
    data: bytes, height: int, width: int, view: View, most_pixels: int = MOST_PIXELS, orientation: int = 1
) -> np.ndarray:
    """The picture of this size, as small as the view allows without visible loss. Raises as `load_image`."""
    left, top, right, bottom = view.window_xyxy
    seen_height, seen_width = view.size
    smallest = REDUCED * seen_height * height / (bottom - top), REDUCED * seen_width * width / (right - left)
    return load_image(data, smallest, most_pixels=most_pixels, stated=(height, width), orientation=orientation)


def view_pixels(image: np.ndarray, view: View, stored_size: tuple[int, int]) -> Tensor:
    """(3, h, w) uint8: the view's rectangle of the image at the view's size; bilinear, antialiased.

    image: (height, width, 3), of the stored size or a smaller one. The result's memory is in the order (h, w, 3).
    """
    y_scale, x_scale = (side / stored for side, stored in zip(image.shape[:2], stored_size, strict=True))
    left, top, right, bottom = view.window_xyxy
    seen = image[round(top * y_scale) : round(bottom * y_scale), round(left * x_scale) : round(right * x_scale)]
    pixels = torch.from_numpy(seen).permute(2, 0, 1)[None]
    if pixels.shape[-2:] != view.size:
        pixels = F.interpolate(pixels, view.size, mode="bilinear", antialias=True)
    return (pixels.flip(-1) if view.flipped else pixels)[0]


def view_boxes(boxes_xyxy: Tensor, height: int, width: int, view: View) -> tuple[Tensor, Tensor]:
    """Boxes (t, 4) in pixels of the stored image -> cxcywh relative to the view (k, 4), and which are kept (t,) bool.

    Boxes are clipped to the image, then to the view; those that are degenerate afterwards are dropped.
    """
    left, top, right, bottom = view.window_xyxy
    inside = boxes.clip(boxes_xyxy, height, width) - boxes_xyxy.new_tensor((left, top, left, top))
    inside = boxes.clip(inside, bottom - top, right - left)
    kept = ~boxes.is_degenerate(inside)
    relative = inside[kept] / inside.new_tensor((right - left, bottom - top, right - left, bottom - top))
    boxes_cxcywh = boxes.xyxy_to_cxcywh(relative.clamp(max=1))
    if view.flipped:
        boxes_cxcywh[:, 0] = 1 - boxes_cxcywh[:, 0]
    return boxes_cxcywh.float(), kept


def annotated_sample(image: np.ndarray, view: View, entry: Mapping[str, Any], categories: Categories) -> Sample:
    """The sample seen through `view`; entry as stored in a shard. Crowds are left out, as published."""
    height, width = entry["height"], entry["width"]
    single = [annotation for annotation in entry["annotations"] if not annotation["iscrowd"]]
    boxes_xywh = torch.tensor([a["bbox"] for a in single], dtype=torch.float64).reshape(-1, 4)
    labels = torch.tensor([categories.label(a["category_id"]) for a in single], dtype=torch.int64)
    boxes_cxcywh, kept = view_boxes(boxes.xywh_to_xyxy(boxes_xywh), height, width, view)
    return Sample(
        image=view_pixels(image, view, (height, width)),
        boxes_cxcywh=boxes_cxcywh,
        labels=labels[kept],
        image_id=entry["image_id"],
        original_size=(height, width),
    )


def evaluation_sample(image: np.ndarray, config: DataConfig) -> Sample:
    """An image (height, width, 3) uint8 without annotations, exactly as evaluation sees it: for prediction."""
    height, width = image.shape[:2]
    entry = {"image_id": 0, "height": height, "width": width, "annotations": ()}
    return annotated_sample(image, evaluation_view(height, width, config), entry, Categories((), ()))
