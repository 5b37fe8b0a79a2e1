"""The five images that annotation tools exported for tests/data/exports, and the boxes that were drawn in them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("traffic light", "no", "car")


@dataclass(frozen=True)
class Picture:
    """One image: its size in pixels, the part it belongs to, and its objects.

    objects: (class, left, top, width, height) each, in pixels of the stored image.
    """

    width: int
    height: int
    part: str
    objects: tuple[tuple[str, int, int, int, int], ...] = ()


# A class has a name that YAML takes for false; "car" is absent from the second part; objects touch each border, one of
# them is a single pixel wide.
PICTURES = {
    "a b.jpg": Picture(
        64,
        48,
        "train",
        (
            ("traffic light", 0, 0, 20, 15),
            ("no", 44, 28, 20, 20),
            ("car", 10, 12, 21, 9),
            ("no", 33, 5, 7, 11),
        ),
    ),
    "img_1.JPG": Picture(48, 64, "train", (("no", 5, 6, 7, 8), ("car", 0, 30, 48, 34))),
    "empty.png": Picture(64, 48, "train"),
    "2.png": Picture(48, 64, "valid", (("no", 12, 20, 13, 31), ("traffic light", 47, 60, 1, 4))),
    "dusk.jpg": Picture(64, 48, "valid", (("traffic light", 17, 11, 30, 25),)),
}

# The one object that was marked as difficult, or as a crowd, with tools that have such a mark.
MARKED = ("img_1.JPG", "no")


def draw(name: str, path: Path) -> None:
    """Write the image of that name: a slope of grey with a bright rectangle for each object; no EXIF."""
    picture = PICTURES[name]
    shade = 20 * (1 + list(PICTURES).index(name))
    pixels = np.full((picture.height, picture.width, 3), shade, np.uint8)
    pixels += np.arange(picture.width, dtype=np.uint8)[:, None]
    for class_name, left, top, width, height in picture.objects:
        pixels[top : top + height, left : left + width, CLASSES.index(class_name)] = 240
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
