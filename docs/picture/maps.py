"""Insets: the batch's images as they are and as coarse as each level's map, with boxes and sampling points on them.

An image is drawn padded, in a box of the batch's proportions; coordinates within are those of the padded image, [0, 1].
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from . import scene
from .canvas import Box, Canvas
from .record import Record, Sampling

LEVELS = ("#0b5394", "#2a9d8f", "#b7791f", "#b83280")  # finest first
HEADS = ("#d62728", "#ff7f0e", "#bcbd22", "#2ca02c", "#17becf", "#1f77b4", "#9467bd", "#e377c2")
WHOLE = Box(0, 0, 1, 1)  # of the padded image
TRUTH, PREDICTED = "#1a7f37", "#bc4c00"


def level_name(level: int) -> str:
    return f"C{level + 3}"


class Maps:
    def __init__(self, canvas: Canvas, record: Record) -> None:
        self.canvas, self.record = canvas, record
        _, _, self.shapes, _, ratios = record.call("_tokens").result
        self.valid = ratios[:, 0]  # (N, 2), (x, y): the same on all levels, as the images' sides are multiples of 64
        _, _, self.height, self.width = record.images.shape
        for number, one in enumerate(scene.SCENES):
            forms = "".join(_form(form) for form in one.forms)
            canvas.define(f'<g id="image{number}">{forms}</g>')
            for level, (height, width) in enumerate(self.shapes):
                share_x, share_y = self.valid[number].tolist()
                columns, rows = round(width * share_x), round(height * share_y)
                image = record.batch.images[number, :, : one.height, : one.width]
                canvas.define(f'<g id="map{number}{level}">{_runs(scene.cells(image, rows, columns))}</g>')

    def box(self, x: float, y: float, width: float) -> Box:
        """A box of the padded images' proportions."""
        return Box(x, y, width, width * self.height / self.width)

    def image(self, box: Box, number: int, faint: bool = False) -> Box:
        """The image itself, its padding hatched."""
        self._padding(box, number)
        scale = box.w / self.width
        opacity = ' opacity="0.45"' if faint else ""
        self.canvas.raw(f'<use href="#image{number}" transform="{_move(box)} scale({scale:.5f})"{opacity}/>')
        return self.canvas.frame(box)

    def level(self, box: Box, number: int, level: int, view: Box = WHOLE) -> Box:
        """The image as coarse as a level's map, with the map's grid; or only a view of it."""
        height, width = self.shapes[level]
        share_x, share_y = self.valid[number].tolist()
        scale = box.w / (view.w * width)  # pixels of a cell
        lines = "".join(f"M{x},0V{height}" for x in range(1, width)) + "".join(
            f"M0,{y}H{width}" for y in range(1, height)
        )
        stroke = 0.8 if scale > 8 else 0.5 if scale > 4 else 0.3
        shown = f"{view.x * width:.2f} {view.y * height:.2f} {view.w * width:.2f} {view.h * height:.2f}"
        self._padding(box, number)
        self.canvas.raw(
            f'<svg x="{box.x:.1f}" y="{box.y:.1f}" width="{box.w:.1f}" height="{box.h:.1f}" viewBox="{shown}">'
            f'<rect width="{share_x * width:.1f}" height="{share_y * height:.1f}" fill="#ffffff"/>'
            f'<use href="#map{number}{level}" opacity="0.5"/>'
            f'<path d="{lines}" class="grid" stroke-width="{stroke / scale:.4f}"/>'
            "</svg>"
        )
        self.canvas.raw(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.w:.1f}" height="{box.h:.1f}" fill="none" '
            f'stroke="{LEVELS[level]}" stroke-width="2.5"/>'
        )
        return self.canvas.frame(box) if view == WHOLE else box

    def _padding(self, box: Box, number: int) -> None:
        share_x, share_y = self.valid[number].tolist()
        self.canvas.raw(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.w:.1f}" height="{box.h:.1f}" fill="url(#padding)"/>'
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.w * share_x:.1f}" height="{box.h * share_y:.1f}" '
            f'fill="#ffffff"/>'
        )

    def boxes(
        self, where: Box, number: int, boxes_cxcywh: Tensor, colour: str, width: float = 1.8, style: str = ""
    ) -> None:
        """Boxes (n, 4) relative to the unpadded image."""
        scale = torch.cat([self.valid[number]] * 2)
        self.padded_boxes(where, boxes_cxcywh * scale, colour, width, style)

    def padded_boxes(self, where: Box, boxes_cxcywh: Tensor, colour: str, width: float = 1.8, style: str = "") -> None:
        for cx, cy, w, h in boxes_cxcywh.tolist():
            self.canvas.raw(
                f'<rect x="{where.x + (cx - w / 2) * where.w:.1f}" y="{where.y + (cy - h / 2) * where.h:.1f}" '
                f'width="{w * where.w:.1f}" height="{h * where.h:.1f}" fill="none" stroke="{colour}" '
                f'stroke-width="{width}"{style}/>'
            )

    def dots(self, where: Box, centres: Iterable[tuple[float, float]], colour: str, radius: float) -> None:
        circles = "".join(
            f'<circle cx="{where.x + x * where.w:.1f}" cy="{where.y + y * where.h:.1f}" r="{radius}"/>'
            for x, y in centres
        )
        self.canvas.raw(f'<g fill="{colour}" fill-opacity="0.85">{circles}</g>')

    def sampling(self, where: Box, sampling: Sampling, number: int, query: int, level: int, view: Box = WHOLE) -> float:
        """The points of all heads on one level, their areas by attention weight; returns the level's share of it.

        A black cross is the reference, a black rectangle the reference box. Points outside the view are left out.
        """
        locations, weights = sampling.points(number, query)
        locations = (locations - torch.tensor([view.x, view.y])) / torch.tensor([view.w, view.h])
        reference = sampling.reference[number, query, level].clone()
        reference[:2] = (reference[:2] - torch.tensor([view.x, view.y])) / torch.tensor([view.w, view.h])
        if len(reference) == 4:
            reference[2:] /= torch.tensor([view.w, view.h])
            self.padded_boxes(where, reference[None], "#000000", 1.6)
        radius_of_mean = 3.0 if view == WHOLE else 3.8
        for head in range(len(weights)):
            circles = ""
            for (x, y), weight in zip(locations[head, level].tolist(), weights[head, level].tolist(), strict=True):
                if 0 <= x <= 1 and 0 <= y <= 1:
                    x, y, radius = (
                        where.x + x * where.w,
                        where.y + y * where.h,
                        radius_of_mean * math.sqrt(weight * weights[0].numel()),
                    )
                    circles += f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
            self.canvas.raw(f'<g fill="{HEADS[head]}" class="point">{circles}</g>')
        self.cross(where, *reference[:2].tolist())
        return float(weights[:, level].sum() / weights.sum())

    def cross(self, where: Box, x: float, y: float) -> None:
        x, y = where.x + x * where.w, where.y + y * where.h
        self.canvas.raw(f'<path d="M{x - 5:.1f},{y:.1f}h10M{x:.1f},{y - 5:.1f}v10" stroke="#000" stroke-width="1.8"/>')


def _move(box: Box) -> str:
    return f"translate({box.x:.1f} {box.y:.1f})"


def _form(form: scene.Form) -> str:
    if form.kind == "polygon":
        points = " ".join(f"{x:g},{y:g}" for x, y in zip(form.numbers[0::2], form.numbers[1::2], strict=True))
        return f'<polygon points="{points}" fill="{form.colour}"/>'
    x0, y0, x1, y1 = form.numbers
    return (
        f'<ellipse cx="{(x0 + x1) / 2:g}" cy="{(y0 + y1) / 2:g}" rx="{(x1 - x0) / 2:g}" ry="{(y1 - y0) / 2:g}" '
        f'fill="{form.colour}"/>'
    )


def _runs(cells: np.ndarray) -> str:
    """Cells as one path for each colour (four bits a channel), neighbours of a row in one piece."""
    paths: dict[str, str] = defaultdict(str)
    for y, row in enumerate(cells):
        colours = ["#" + "".join(f"{(int(value) + 8) // 17:x}" for value in cell) for cell in row]
        start = 0
        for x in range(1, len(colours) + 1):
            if x == len(colours) or colours[x] != colours[start]:
                paths[colours[start]] += f"M{start},{y}h{x - start}v1h{start - x}z"
                start = x
    return "".join(f'<path fill="{colour}" d="{path}"/>' for colour, path in sorted(paths.items()))
