"""Detections drawn on an image, readable whether it is 100 or 4000 pixels wide."""

import colorsys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

from .console import brief

SMALLEST_SIDE = 800  # of the longer side of a drawn image; smaller images are enlarged to it
LONGEST_TEXT = 120  # characters; measured in pixels after that


@dataclass(frozen=True)
class DrawnBox:
    """One box to draw: xyxy in pixels of the image, its text, and the label that gives it its colour."""

    box_xyxy: tuple[float, float, float, float]
    text: str
    label: int


def draw_boxes(image: Image.Image, boxes: list[DrawnBox]) -> Image.Image:
    """A copy of the image, enlarged when small, with the boxes; the last ones lie on top."""
    scale = max(1.0, SMALLEST_SIDE / max(image.size))
    if scale > 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    else:
        image = image.copy()
    draw = ImageDraw.Draw(image)
    line = max(3, round(max(image.size) / 270))
    font = font_of(max(16, round(max(image.size) / 48)))
    corners = [_inside(box.box_xyxy, scale, image.size) for box in boxes]
    for (x0, y0, x1, y1), box in zip(corners, boxes, strict=True):
        edge = max(1, line // 3)  # dark, so that the colour shows on every background
        draw.rectangle((x0 - edge, y0 - edge, x1 + edge, y1 + edge), outline="black", width=line + 2 * edge)
        draw.rectangle((x0, y0, x1, y1), outline=colour(box.label), width=line)
    for (x0, y0, _, _), box in zip(corners, boxes, strict=True):  # after all lines, so that none crosses a text
        _draw_text(draw, image.size, (x0, y0), box.text, colour(box.label), font, padding=line)
    return image


def _inside(
    box_xyxy: tuple[float, float, float, float], scale: float, size: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The box in pixels of the drawn image, its lines not beyond the border."""
    x0, y0, x1, y1 = (value * scale for value in box_xyxy)
    right, bottom = size[0] - 1, size[1] - 1
    x0, y0 = min(max(x0, 0), right), min(max(y0, 0), bottom)
    return x0, y0, min(max(x0, x1), right), min(max(y0, y1), bottom)


def colour(label: int) -> tuple[int, int, int]:
    """A bright colour; neighbouring labels are far apart on the colour circle."""
    hue = (0.02 + label * 0.618034) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if label // 12 % 2 == 0 else 0.55, 1.0)
    return round(red * 255), round(green * 255), round(blue * 255)


def font_of(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans: Pillow's own font has no letter beyond English. What this one lacks too is drawn as a box."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")), size)


def fitted_text(text: str, width: float, font: ImageFont.FreeTypeFont) -> str:
    """One line of text that is drawn on at most `width` pixels: the end of a longer one is an ellipsis."""
    text = shown = brief(text, LONGEST_TEXT)
    while text and font.getlength(shown) > width:
        text = text[:-1]
        shown = text + "…"
    return shown


def _draw_text(
    draw: ImageDraw.ImageDraw,
    size: tuple[int, int],
    corner: tuple[float, float],
    text: str,
    background: tuple[int, int, int],
    font: ImageFont.FreeTypeFont,
    padding: int,
) -> None:
    """Text on a filled rectangle above the box's upper left corner, moved inside the image where it would leave it."""
    text = fitted_text(text, size[0] - 2 * padding, font)
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + 2 * padding, bottom - top + 2 * padding
    x = min(max(corner[0], 0), max(size[0] - width, 0))
    y = corner[1] - height if corner[1] >= height else min(max(corner[1], 0), max(size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=background)
    red, green, blue = background
    dark = 0.299 * red + 0.587 * green + 0.114 * blue > 140
    draw.text((x + padding - left, y + padding - top), text, fill="black" if dark else "white", font=font)
