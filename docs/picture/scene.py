"""Two small scenes with objects, drawn twice from one description: as pixels for the model, as SVG for the reader.

Coordinates are pixels of the unpadded image, (x, y) from the top left. Labels are COCO's 0..79.
"""

from dataclasses import dataclass

import numpy as np
import torch
from ddetr.data.batch import Batch, Sample, collate
from ddetr.data.boxes import xyxy_to_cxcywh
from PIL import Image, ImageDraw
from torch import Tensor

OVERSAMPLING = 4  # then averaged: antialiased edges
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Form:
    """An ellipse (x0, y0, x1, y1) or a polygon (x, y, x, y, ...) of one colour."""

    kind: str
    numbers: Numbers
    colour: str

    def bounds(self) -> Numbers:
        x, y = self.numbers[0::2], self.numbers[1::2]
        return min(x), min(y), max(x), max(y)


@dataclass(frozen=True)
class Thing:
    label: int
    name: str
    forms: tuple[Form, ...]

    def box_xyxy(self) -> Numbers:
        bounds = [form.bounds() for form in self.forms]
        low, high = np.min(bounds, axis=0), np.max(bounds, axis=0)
        return (*low[:2].tolist(), *high[2:].tolist())


@dataclass(frozen=True)
class Scene:
    width: int
    height: int
    background: tuple[Form, ...]
    things: tuple[Thing, ...]

    @property
    def forms(self) -> list[Form]:
        return [*self.background, *(form for thing in self.things for form in thing.forms)]

    def pixels(self) -> Tensor:
        """(3, h, w) uint8."""
        image = Image.new("RGB", (self.width * OVERSAMPLING, self.height * OVERSAMPLING))
        draw = ImageDraw.Draw(image)
        for form in self.forms:
            numbers = [number * OVERSAMPLING for number in form.numbers]
            (draw.ellipse if form.kind == "ellipse" else draw.polygon)(numbers, fill=form.colour)
        image = image.resize((self.width, self.height), Image.Resampling.BOX)
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)

    def sample(self, image_id: int) -> Sample:
        boxes = torch.tensor([thing.box_xyxy() for thing in self.things])
        boxes = xyxy_to_cxcywh(boxes) / torch.tensor([self.width, self.height] * 2)
        labels = torch.tensor([thing.label for thing in self.things])
        return Sample(self.pixels(), boxes, labels, image_id, (self.height, self.width))


def _ellipse(x0: float, y0: float, x1: float, y1: float, colour: str) -> Form:
    return Form("ellipse", (x0, y0, x1, y1), colour)


def _polygon(colour: str, *numbers: float) -> Form:
    return Form("polygon", numbers, colour)


def _rectangle(x0: float, y0: float, x1: float, y1: float, colour: str) -> Form:
    return Form("polygon", (x0, y0, x1, y0, x1, y1, x0, y1), colour)


def _person(x: float, y: float, size: float, shirt: str, trousers: str) -> Thing:
    """Standing with its head's top at (x, y), `size` tall."""
    s = size / 100
    legs = [_rectangle(x + a * s, y + 58 * s, x + b * s, y + 100 * s, trousers) for a, b in ((-11, -2), (2, 11))]
    body = _polygon(
        shirt, x - 18 * s, y + 22 * s, x + 18 * s, y + 22 * s, x + 12 * s, y + 60 * s, x - 12 * s, y + 60 * s
    )
    return Thing(0, "person", (*legs, body, _ellipse(x - 10 * s, y, x + 10 * s, y + 22 * s, "#e8b48a")))


BEACH = Scene(
    640,
    448,
    (
        _rectangle(0, 0, 640, 190, "#bfe0f5"),
        _ellipse(70, 34, 190, 74, "#e9f5fc"),
        _rectangle(0, 186, 640, 262, "#5fa8d3"),
        _rectangle(0, 258, 640, 448, "#f0dfb4"),
    ),
    (
        Thing(
            33,
            "kite",
            (
                _polygon("#d1495b", 380, 30, 424, 66, 390, 128, 350, 74),
                _polygon("#edae49", 380, 30, 390, 128, 350, 74),
            ),
        ),
        Thing(
            8,
            "boat",
            (
                _polygon("#7a4a2b", 452, 204, 604, 204, 574, 238, 478, 238),
                _polygon("#fdfdfd", 524, 96, 524, 196, 590, 196),
            ),
        ),
        Thing(
            25,
            "umbrella",
            (
                _rectangle(146, 250, 152, 392, "#6d6875"),
                _polygon("#e07a5f", 44, 262, 72, 214, 112, 190, 150, 182, 188, 190, 228, 214, 254, 262),
            ),
        ),
        _person(330, 206, 190, "#2a6f97", "#1b3a4b"),
        Thing(32, "sports ball", (_ellipse(434, 366, 482, 414, "#6a994e"),)),
    ),
)

STREET = Scene(
    384,
    512,
    (
        _rectangle(0, 0, 384, 330, "#cfd8dc"),
        _rectangle(28, 60, 150, 330, "#b08968"),
        _rectangle(172, 120, 300, 330, "#9aa5b1"),
        _rectangle(0, 326, 384, 512, "#8d99ae"),
    ),
    (
        Thing(
            9,
            "traffic light",
            (
                _rectangle(318, 40, 358, 146, "#22223b"),
                _ellipse(326, 48, 350, 72, "#e63946"),
                _ellipse(326, 80, 350, 104, "#f4d35e"),
                _ellipse(326, 112, 350, 136, "#52b788"),
            ),
        ),
        Thing(
            2,
            "car",
            (
                _polygon("#c1121f", 130, 396, 160, 396, 190, 358, 286, 358, 318, 396, 350, 402, 350, 440, 130, 440),
                _polygon("#dbe9ee", 178, 396, 198, 366, 278, 366, 300, 396),
                _ellipse(156, 420, 200, 464, "#1d1d1f"),
                _ellipse(280, 420, 324, 464, "#1d1d1f"),
            ),
        ),
        _person(76, 268, 200, "#f2cc8f", "#3d405b"),
    ),
)

SCENES = (BEACH, STREET)


def batch() -> Batch:
    return collate([scene.sample(number) for number, scene in enumerate(SCENES)]).batch()


def cells(image: Tensor, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: the mean colour of each cell of a grid over an image (3, H, W) uint8."""
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy())
    return np.asarray(pixels.resize((width, height), Image.Resampling.BOX))
