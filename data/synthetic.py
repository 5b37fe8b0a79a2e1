"""A procedural detection set in COCO format: coloured shapes on textured backgrounds.

For demonstrations and tests, where no photograph can be had: enough variety that a detector has to learn (clutter,
overlap, small objects, any colour), little enough that it learns in minutes. A few images are empty, a few hold a
crowd. Each image is drawn from its own random numbers, so the set does not depend on the number of processes.

Coordinates of a shape: p = (x, y) in its own frame, where the shape lies within the unit circle. Its outline is where
a signed distance (negative inside) is zero; so edges are antialiased without oversampling.
"""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from rich.progress import Progress

from .documents import parse_json
from .files import unfinished, write_whole
from .parallel import ordered_map

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _polygon(corners: int) -> Distance:
    angles = 2 * np.pi * (np.arange(corners) + 0.5) / corners
    inner_radius = np.cos(np.pi / corners)
    return lambda x, y: np.max([np.cos(a) * x + np.sin(a) * y for a in angles], axis=0) - inner_radius


def _disc(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.hypot(x, y) - 1


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.hypot(x, y) - 0.78) - 0.22


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.92, np.minimum(x, y) - 0.3)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Five mirrored wedges, each bounded by one straight edge from a tip (radius 1) to a notch (radius 0.45).
    angle = np.abs((np.arctan2(y, x) + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5)
    radius = np.hypot(x, y)
    tip, notch = np.array([1.0, 0.0]), 0.45 * np.array([np.cos(np.pi / 5), np.sin(np.pi / 5)])
    normal = np.array([tip[1] - notch[1], notch[0] - tip[0]]) / -np.hypot(*(tip - notch))
    return (radius * np.cos(angle) - tip[0]) * normal[0] + radius * np.sin(angle) * normal[1]


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y))


def _bar(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) - 0.96, np.abs(y) - 0.26)


def _frame(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.56) - 0.14


@dataclass(frozen=True)
class Shape:
    """A class of objects: category id (sparse on purpose, as COCO's), name, outline and surface."""

    category_id: int
    name: str
    distance: Distance
    surface: str


SHAPES = (
    Shape(1, "disc", _disc, "shaded"),
    Shape(23, "triangle", _polygon(3), "striped"),
    Shape(56, "cross", _cross, "plain"),
    Shape(57, "ring", _ring, "plain"),
    Shape(71, "star", _star, "shaded"),
    Shape(80, "square", _polygon(4), "checked"),
    Shape(92, "crescent", _crescent, "plain"),
    Shape(118, "hexagon", _polygon(6), "striped"),
    Shape(120, "frame", _frame, "shaded"),
    Shape(133, "bar", _bar, "checked"),
)

EMPTY_SHARE, CROWD_SHARE, SMALL_SHARE = 0.04, 0.05, 0.12
LEAST_VISIBLE = 0.7  # no object is hidden further than this share of its area


def draw_set(
    output: Path, *, images: int, size: int, classes: int, seed: int, workers: int = 0, progress: Progress | None = None
) -> Path:
    """Draw `images` square images of `size` pixels into output/images and write output/annotations.json.

    Returns the path of the json, which is written last; a set of the same description is left as it is. Equal
    arguments give equal bytes. Raises ValueError for arguments out of range, FileExistsError for another set there
    and for images of others, which are not overwritten.
    """
    for name, value, least in (("images", images, 1), ("size", size, 32), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not 1 <= classes <= len(SHAPES):
        raise ValueError(f"classes must be in 1..{len(SHAPES)}, got {classes}")
    path = output / "annotations.json"
    info = {"description": "ddetr data synth", "images": images, "size": size, "classes": classes, "seed": seed}
    if path.exists():
        if _info(path) != info:
            raise FileExistsError(f"{output}: already holds another set; choose another folder")
        return path
    (output / "images").mkdir(parents=True, exist_ok=True)
    task = progress.add_task("drawing", total=images) if progress else None
    coco: dict[str, Any] = {
        "info": info,
        "images": [],
        "annotations": [],
        "categories": [{"id": shape.category_id, "name": shape.name} for shape in SHAPES[:classes]],
    }
    write = partial(_write_image, output / "images", size, classes, seed)
    for number, annotations in enumerate(ordered_map(write, range(images), workers=workers, chunk=32)):
        image_id = number + 1
        coco["images"].append({"id": image_id, "file_name": _file_name(number), "height": size, "width": size})
        for annotation in annotations:
            coco["annotations"].append({"id": len(coco["annotations"]) + 1, "image_id": image_id, **annotation})
        if progress and task is not None:
            progress.advance(task)
    write_whole(path, json.dumps(coco).encode())
    return path


def draw_image(size: int, classes: int, seed: int, number: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One image (size, size, 3) uint8 and its annotations (bbox of the visible part, area, category, crowd flag)."""
    random = np.random.Generator(np.random.Philox(key=[seed, number]))
    canvas = _background(size, random)
    if random.random() < EMPTY_SHARE:
        return _finished(canvas, random), []
    crowd = SHAPES[random.integers(classes)] if random.random() < CROWD_SHARE else None
    swarm = _draw_crowd(canvas, crowd, random) if crowd else np.zeros((size, size), dtype=bool)
    # Which object is on top at each pixel; -1: none.
    owner = np.full((size, size), -1)
    drawn: list[tuple[Shape, float]] = []  # with the whole area in pixels
    for _ in range(random.integers(1, 6)):
        shape = SHAPES[random.integers(classes)]
        for _attempt in range(12):
            small = random.random() < SMALL_SHARE
            low, high = (0.06, 0.09) if small else (0.1, 0.28)
            radius = size * low * (high / low) ** random.random()
            centre = random.uniform(0.6 * radius, size - 0.6 * radius, 2)
            coverage = _coverage(shape, size, centre, radius, random.random() * 2 * np.pi)
            inside = coverage.mask > 0.5
            whole_area = np.pi * radius**2 * _filled_share(shape)
            if _stays_visible(owner, coverage.rows, coverage.columns, inside, drawn) and (
                inside.sum() >= LEAST_VISIBLE * whole_area
            ):
                owner[coverage.rows, coverage.columns][inside] = len(drawn)
                drawn.append((shape, float(inside.sum())))
                _paint(canvas, coverage, shape, random)
                break
    annotations = [_annotation(owner == i, shape, iscrowd=0) for i, (shape, _) in enumerate(drawn)]
    swarm &= owner < 0
    if crowd and swarm.any():
        annotations.append(_annotation(swarm, crowd, iscrowd=1))
    return _finished(canvas, random), annotations


@dataclass(frozen=True)
class _Coverage:
    """A shape on the pixel grid: the patch it touches, how much of each pixel it covers, and its own coordinates."""

    rows: slice
    columns: slice
    mask: np.ndarray
    x: np.ndarray
    y: np.ndarray


def _coverage(shape: Shape, size: int, centre: np.ndarray, radius: float, angle: float) -> _Coverage:
    low = np.clip(np.floor(centre - radius - 1).astype(int), 0, size)
    high = np.clip(np.ceil(centre + radius + 1).astype(int), 0, size)
    down, right = np.mgrid[low[1] : high[1], low[0] : high[0]] + 0.5
    dx, dy = (right - centre[0]) / radius, (down - centre[1]) / radius
    x, y = np.cos(angle) * dx + np.sin(angle) * dy, np.cos(angle) * dy - np.sin(angle) * dx
    mask = np.clip(0.5 - radius * shape.distance(x, y), 0, 1)
    return _Coverage(slice(low[1], high[1]), slice(low[0], high[0]), mask, x, y)


@cache
def _filled_share(shape: Shape) -> float:
    """Area of the shape as a share of its unit circle's."""
    grid = np.linspace(-1, 1, 41)
    x, y = np.meshgrid(grid, grid)
    return float((shape.distance(x, y) < 0).sum() / (np.hypot(x, y) < 1).sum())


def _stays_visible(
    owner: np.ndarray, rows: slice, columns: slice, inside: np.ndarray, drawn: list[tuple[Shape, float]]
) -> bool:
    """Whether every object drawn so far is still seen well with `inside` on top of it."""
    for number in np.unique(owner[rows, columns][inside]):
        if number >= 0:
            hidden = (owner[rows, columns][inside] == number).sum()
            if (owner == number).sum() - hidden < LEAST_VISIBLE * drawn[number][1]:
                return False
    return True


def _paint(canvas: np.ndarray, coverage: _Coverage, shape: Shape, random: np.random.Generator) -> None:
    patch = canvas[coverage.rows, coverage.columns]
    colour = _contrasting_colour(patch.mean((0, 1)), random)
    x, y = coverage.x, coverage.y
    shade = {
        "plain": lambda: np.ones_like(x),
        "shaded": lambda: 1.1 - 0.45 * np.clip(np.hypot(x - 0.3, y + 0.3), 0, 1.4) / 1.4,
        "striped": lambda: np.where(np.sin(9 * x) > 0, 1.0, 0.6),
        "checked": lambda: np.where(np.sin(6 * x) * np.sin(6 * y) > 0, 1.0, 0.6),
    }[shape.surface]()
    weight = coverage.mask[..., None]
    patch[:] = (1 - weight) * patch + weight * np.clip(colour * shade[..., None], 0, 255)


def _draw_crowd(canvas: np.ndarray, shape: Shape, random: np.random.Generator) -> np.ndarray:
    """Draw a swarm of tiny objects of one class; returns its pixels, to be annotated as one crowd, as COCO does."""
    size = len(canvas)
    middle = random.uniform(0.25 * size, 0.75 * size, 2)
    swarm = np.zeros((size, size), dtype=bool)
    for _ in range(random.integers(10, 18)):
        radius = random.uniform(0.025, 0.035) * size
        centre = np.clip(middle + random.normal(0, 0.09 * size, 2), radius, size - radius)
        coverage = _coverage(shape, size, centre, radius, random.random() * 2 * np.pi)
        _paint(canvas, coverage, shape, random)
        swarm[coverage.rows, coverage.columns] |= coverage.mask > 0.5
    return swarm


def _annotation(mask: np.ndarray, shape: Shape, iscrowd: int) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    left, top, right, bottom = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    bbox = [float(left), float(top), float(right - left), float(bottom - top)]
    return {"bbox": bbox, "area": float(mask.sum()), "category_id": shape.category_id, "iscrowd": iscrowd}


def _background(size: int, random: np.random.Generator) -> np.ndarray:
    """(size, size, 3) float: two colours mixed by a gradient, waves or clouds, with strokes and soft blobs on it."""
    down, right = np.mgrid[0:size, 0:size].astype(np.float32) / size
    angle = random.random() * 2 * np.pi
    along = float(np.cos(angle)) * right + float(np.sin(angle)) * down
    kind = random.integers(3)
    if kind == 0:
        mix = along
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * along * float(random.uniform(3, 14)))
    else:
        coarse = Image.fromarray(random.integers(0, 256, (random.integers(4, 12),) * 2, dtype=np.uint8))
        mix = np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    one = random.uniform(40, 215, 3).astype(np.float32)
    other = np.clip(one + random.normal(0, 35, 3).astype(np.float32), 0, 255)
    canvas = one + (other - one) * mix[..., None]
    return canvas + _clutter(size, random)[..., None]


def _clutter(size: int, random: np.random.Generator) -> np.ndarray:
    """(size, size) grey levels to add: blurred blobs and thin strokes, neither of which is an object."""
    soft, sharp = Image.new("L", (size, size), 128), Image.new("L", (size, size), 128)
    for _ in range(random.integers(0, 4)):
        left, top, w, h = random.uniform(0, size, 4)
        ImageDraw.Draw(soft).ellipse((left, top, left + w, top + h), fill=int(random.uniform(90, 166)))
    for _ in range(random.integers(0, 5)):
        ends = [float(value) for value in random.uniform(0, size, 4)]
        ImageDraw.Draw(sharp).line(ends, fill=int(random.uniform(70, 186)), width=max(1, size // 100))
    blurred = soft.filter(ImageFilter.GaussianBlur(size / 16))
    return np.asarray(blurred, dtype=np.float32) + np.asarray(sharp, dtype=np.float32) - 256


def _contrasting_colour(background: np.ndarray, random: np.random.Generator) -> np.ndarray:
    while True:  # whatever the background, most colours are that far away
        colour = random.uniform(0, 255, 3)
        if np.linalg.norm(colour - background) > 110:
            return colour


def _finished(canvas: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Sensor noise, and eight bits."""
    strength = np.float32(random.uniform(2, 8))
    noisy = canvas + strength * random.standard_normal(canvas.shape[:2], dtype=np.float32)[..., None]
    return np.clip(noisy, 0, 255).astype(np.uint8)


def _file_name(number: int) -> str:
    return f"{number:06d}.jpg"


def _write_image(folder: Path, size: int, classes: int, seed: int, number: int) -> list[dict[str, Any]]:
    pixels, annotations = draw_image(size, classes, seed, number)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=90)
    path, data = folder / _file_name(number), buffer.getvalue()
    if not path.exists():
        with unfinished(path, synced=False) as image:  # of very many, each can be drawn again
            image.write_bytes(data)
    elif path.read_bytes() != data:
        raise FileExistsError(f"{path}: an image that would be overwritten; choose another folder")
    return annotations


def _info(path: Path) -> Any:
    """What a json says of itself; None where it is none of ours."""
    try:
        values = parse_json(path.read_bytes())
    except ValueError:
        return None
    return values.get("info") if isinstance(values, dict) else None
