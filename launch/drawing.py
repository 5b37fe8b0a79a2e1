"""Boxes and their names drawn on an image, readable whether it is 100 or 4000 pixels wide."""

import colorsys
from dataclasses import dataclass, replace
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
    boxes = [replace(box, box_xyxy=tuple(value * scale for value in box.box_xyxy)) for box in boxes]
    side = max(image.size)
    mark_boxes(image, boxes, line=max(3, round(side / 270)), text_size=max(16, round(side / 48)))
    return image


def mark_boxes(image: Image.Image, boxes: list[DrawnBox], *, line: int, text_size: int) -> None:
    """Draw boxes into an image, with lines of `line` and texts of `text_size` pixels; the last ones lie on top."""
    draw, font = ImageDraw.Draw(image), font_of(text_size)
    placed = [(_inside(box.box_xyxy, image.size), box) for box in boxes]
    small = [(corners, box) for corners, box in placed if _longer_side(corners) <= 2 * text_size]
    for corners, box in placed:
        if _longer_side(corners) > 2 * text_size:
            _draw_outline(draw, corners, colour(box.label), line)
    for (x0, y0, _, _), box in placed:  # after the lines, so that none crosses a text
        _draw_text(draw, image.size, (x0, y0), box.text, colour(box.label), font, padding=line)
    for corners, box in small:  # after the texts, each of which could hide it
        _draw_outline(draw, corners, colour(box.label), max(1, line // 2))


def _draw_outline(
    draw: ImageDraw.ImageDraw, corners: tuple[float, float, float, float], colour: tuple[int, int, int], line: int
) -> None:
    x0, y0, x1, y1 = corners
    edge = max(1, line // 3)  # dark, so that the colour shows on every background
    draw.rectangle((x0 - edge, y0 - edge, x1 + edge, y1 + edge), outline="black", width=line + 2 * edge)
    draw.rectangle(corners, outline=colour, width=line)


def _inside(box_xyxy: tuple[float, float, float, float], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The box, its lines not beyond the border."""
    x0, y0, x1, y1 = box_xyxy
    right, bottom = size[0] - 1, size[1] - 1
    x0, y0 = min(max(x0, 0), right), min(max(y0, 0), bottom)
    return x0, y0, min(max(x0, x1), right), min(max(y0, y1), bottom)


def _longer_side(box_xyxy: tuple[float, float, float, float]) -> float:
    return max(box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1])


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
