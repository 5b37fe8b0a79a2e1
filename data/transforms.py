"""From a file's bytes to a training or evaluation sample: decode, resample once to a view, carry the boxes along.

Images are read as stored: COCO's boxes refer to the stored pixels, so an EXIF rotation is not applied.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from . import boxes
from .batch import Sample
from .categories import Categories
from .config import DataConfig
from .views import View, evaluation_view


def decode_image(data: bytes) -> Image.Image:
    """Any file PIL reads (grayscale, palette, CMYK, 16-bit, ...) as 8-bit RGB.

    Raises ValueError for data that is no image or is cut short.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            if image.mode.startswith("I"):  # 16-bit grayscale, which PIL would saturate at 255
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"not an image in a known format ({len(data)} bytes)") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image cannot be decoded: {error}") from error


def load_image(data: bytes) -> np.ndarray:
    """The bytes of an image file as (height, width, 3) uint8 RGB. Raises ValueError as `decode_image`."""
    return np.asarray(decode_image(data))


def view_pixels(image: Image.Image, view: View) -> Tensor:
    """(3, h, w) uint8: the view's rectangle of the image at the view's size; bilinear, antialiased."""
    height, width = view.size
    if view.window_xyxy != (0, 0, image.width, image.height) or (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BILINEAR, box=view.window_xyxy)
    pixels = np.asarray(image)
    if view.flipped:
        pixels = pixels[:, ::-1]
    return torch.from_numpy(np.array(pixels.transpose(2, 0, 1), order="C"))


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


def annotated_sample(
    image: Image.Image, view: View, annotations: Sequence[Mapping[str, Any]], categories: Categories, image_id: int
) -> Sample:
    """The sample seen through `view`; annotations as stored in a shard. Crowds are left out, as published."""
    single = [annotation for annotation in annotations if not annotation["iscrowd"]]
    boxes_xywh = torch.tensor([a["bbox"] for a in single], dtype=torch.float64).reshape(-1, 4)
    labels = torch.tensor([categories.label(a["category_id"]) for a in single], dtype=torch.int64)
    boxes_cxcywh, kept = view_boxes(boxes.xywh_to_xyxy(boxes_xywh), image.height, image.width, view)
    return Sample(
        image=view_pixels(image, view),
        boxes_cxcywh=boxes_cxcywh,
        labels=labels[kept],
        image_id=image_id,
        original_size=(image.height, image.width),
    )


def evaluation_sample(image: np.ndarray, config: DataConfig, *, image_id: int = 0) -> Sample:
    """An image (height, width, 3) uint8 without annotations, exactly as evaluation sees it: for prediction."""
    height, width = image.shape[:2]
    return Sample(
        image=view_pixels(Image.fromarray(image), evaluation_view(height, width, config)),
        boxes_cxcywh=torch.zeros(0, 4),
        labels=torch.zeros(0, dtype=torch.int64),
        image_id=image_id,
        original_size=(height, width),
    )
