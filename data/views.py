"""Which rectangle of an image is seen, and at what size: arithmetic on the sizes of many images at once.

The augmentation is the published one (appendix A.4, inherited from DETR): flip with probability one half; then, half
of the time each, resize to a random short side, or resize to 400-600, crop 384-600 pixels and resize. All of its steps
but the last pixel size are arithmetic on a rectangle. A rectangle of the stored image, in whole pixels, and a final
size are drawn; `transforms.py` resamples the pixels once from the one to the other.

Shapes: n images.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .config import DataConfig

DRAWS = 8  # random numbers of a training view


@dataclass(frozen=True)
class View:
    """The rectangle of the stored image that is seen, the size it is seen at, and whether mirrored.

    window_xyxy: whole pixels of the stored image. size: (height, width) of the result.
    """

    window_xyxy: tuple[int, int, int, int]
    size: tuple[int, int]
    flipped: bool = False


def resized_sizes(
    heights: np.ndarray, widths: np.ndarray, short_sides: np.ndarray | int, long_side: int | None = None
) -> np.ndarray:
    """(n, 2) int64 (height, width) after resizing to short sides, the long side at most `long_side`; all (n,).

    Rounded as published, where a rounded short side can make the long one longer than `long_side`; here it never is.
    """
    shorter, longer = np.minimum(heights, widths), np.maximum(heights, widths)
    if long_side is not None:
        fitting = np.maximum(1, np.rint(long_side * shorter / longer))
        short_sides = np.where(longer / shorter * short_sides > long_side, fitting, short_sides)
    upright = widths < heights
    new_heights = np.where(upright, np.trunc(short_sides * heights / widths), short_sides)
    new_widths = np.where(upright, short_sides, np.trunc(short_sides * widths / heights))
    as_is = shorter == short_sides
    sizes = np.stack((np.where(as_is, heights, new_heights), np.where(as_is, widths, new_widths)), axis=-1)
    return (sizes if long_side is None else np.minimum(sizes, long_side)).astype(np.int64)


def training_views(heights: np.ndarray, widths: np.ndarray, config: DataConfig, random: np.ndarray) -> list[View]:
    """The published augmentation for images of these sizes, (n,) each; random: (n, DRAWS) numbers in [0, 1)."""
    windows, sizes, flipped = _drawn(heights, widths, config, random)
    return [
        View((left, top, right, bottom), (height, width), mirrored)
        for (left, top, right, bottom), (height, width), mirrored in zip(
            windows.tolist(), sizes.tolist(), flipped.tolist(), strict=True
        )
    ]


def training_sizes(heights: np.ndarray, widths: np.ndarray, config: DataConfig, random: np.ndarray) -> np.ndarray:
    """(n, 2) the (height, width) of `training_views`."""
    return _drawn(heights, widths, config, random)[1]


def _drawn(
    heights: np.ndarray, widths: np.ndarray, config: DataConfig, random: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows (n, 4), sizes (n, 2), flipped (n,)."""
    flip, crop, first_side, crop_width, left, crop_height, top, short_side = random.T
    heights, widths = heights.astype(float), widths.astype(float)
    cropped = (crop < 0.5) & config.crop
    first = resized_sizes(heights, widths, _one_of(config.crop_resize_short_sides, first_side))
    seen_width, left = _crop(first[:, 1], config.crop_sizes, crop_width, left)
    seen_height, top = _crop(first[:, 0], config.crop_sizes, crop_height, top)
    x_scale, y_scale = widths / first[:, 1], heights / first[:, 0]
    right = np.minimum(widths, np.ceil((left + seen_width) * x_scale))
    bottom = np.minimum(heights, np.ceil((top + seen_height) * y_scale))
    part = (np.floor(left * x_scale), np.floor(top * y_scale), right, bottom)
    whole = (np.zeros_like(widths), np.zeros_like(heights), widths, heights)
    windows = np.where(cropped[:, None], np.stack(part, axis=-1), np.stack(whole, axis=-1)).astype(np.int64)
    seen_height, seen_width = np.where(cropped, seen_height, heights), np.where(cropped, seen_width, widths)
    sizes = resized_sizes(seen_height, seen_width, _one_of(config.short_sides, short_side), config.long_side)
    return windows, sizes, flip < config.flip_probability


def evaluation_sizes(heights: np.ndarray, widths: np.ndarray, config: DataConfig) -> np.ndarray:
    """(n, 2) the (height, width) at which evaluation sees images of these sizes, (n,) each."""
    return resized_sizes(heights, widths, config.validation_short_side, config.long_side)


def evaluation_view(height: int, width: int, config: DataConfig) -> View:
    """The whole image at the validation size."""
    ((seen_height, seen_width),) = evaluation_sizes(np.array([height]), np.array([width]), config).tolist()
    return View((0, 0, width, height), (seen_height, seen_width))


def _one_of(sizes: Sequence[int], random: np.ndarray) -> np.ndarray:
    return np.array(sizes)[_whole(0, len(sizes) - 1, random)]


def _whole(low: np.ndarray | int, high: np.ndarray | int, random: np.ndarray) -> np.ndarray:
    """A whole number in [low, high] from each random one in [0, 1)."""
    return low + np.trunc(random * (high - low + 1)).astype(np.int64)


def _crop(
    sides: np.ndarray, crop_sizes: tuple[int, int], length: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(lengths, starts) of random crops along sides; a side shorter than the smallest crop is kept whole."""
    smallest, largest = crop_sizes
    lengths = _whole(np.minimum(sides, smallest), np.minimum(sides, largest), length)
    return lengths, _whole(0, sides - lengths, start)
