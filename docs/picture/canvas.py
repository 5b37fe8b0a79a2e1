"""Drawing primitives: texts, boxes, arrows and maps as plain SVG, and a check that nothing collides.

Texts are measured in DejaVu, the widest of the fonts that a browser may take, so that they fit in all of them.
Coordinates are pixels, x to the right, y down.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import matplotlib
from PIL import ImageFont

SANS, MONO, SERIF = "DejaVuSans", "DejaVuSansMono", "DejaVuSerif-Italic"
STYLES = {  # font, size, colour; the CSS follows from it
    "title": (f"{SANS}-Bold", 27, "#0b1f33"),
    "zone": (f"{SANS}-Bold", 17, "#0b1f33"),
    "badge": (f"{SANS}-Bold", 15, "#ffffff"),
    "head": (f"{SANS}-Bold", 13, "#0b1f33"),
    "body": (SANS, 12, "#24292f"),
    "strong": (f"{SANS}-Bold", 12, "#24292f"),
    "quiet": (SANS, 11.5, "#57606a"),
    "code": (MONO, 11, "#24292f"),
    "shape": (MONO, 11.5, "#116329"),
    "parameter": (MONO, 11, "#7d4e00"),
    "place": (MONO, 11, "#8250df"),
    "paper": (SANS, 11, "#0550ae"),
    "stop": (f"{SANS}-Bold", 11.5, "#cf222e"),
    "math": (SERIF, 14, "#24292f"),
    "formula": (SERIF, 16, "#24292f"),
}
LINE_HEIGHT = {"math": 19, "formula": 28, "code": 15.5, "head": 18}
KINDS = {  # of boxes: fill, stroke, what else
    "zone": ("#f6f8fa", "#d0d7de", ""),
    "data": ("#e6f4ea", "#1a7f37", ""),
    "compute": ("#ffffff", "#57606a", ""),
    "kernel": ("#fff1e0", "#bc4c00", "stroke-width:1.6"),
    "parameter": ("#fff5cc", "#bf8700", ""),
    "frozen": ("#dfe3e8", "#57606a", ""),
    "layer": ("#eef2f6", "#57606a", "stroke-width:1.6"),
    "instead": ("#faf5ff", "#8250df", "stroke-dasharray:6 4"),
    "paper": ("#eef5ff", "#0550ae", ""),
    "picture": ("none", "#57606a", "stroke-width:.8"),
}
ARROWS = {  # stroke, what else
    "flow": ("#424a53", "stroke-width:1.6"),
    "stop": ("#cf222e", "stroke-width:1.8;stroke-dasharray:6 4"),
    "opens": ("#bc4c00", "stroke-width:1.3;stroke-dasharray:1.5 3"),
    "instead": ("#8250df", "stroke-width:1.5;stroke-dasharray:6 4"),
}
Point = tuple[float, float]


class Box(NamedTuple):
    x: float
    y: float
    w: float
    h: float

    def left(self, share: float = 0.5) -> Point:
        return self.x, self.y + share * self.h

    def right(self, share: float = 0.5) -> Point:
        return self.x + self.w, self.y + share * self.h

    def top(self, share: float = 0.5) -> Point:
        return self.x + share * self.w, self.y

    def bottom(self, share: float = 0.5) -> Point:
        return self.x + share * self.w, self.y + self.h

    def holds(self, other: "Box", slack: float = 0.5) -> bool:
        return (
            other.x >= self.x - slack
            and other.y >= self.y - slack
            and other.x + other.w <= self.x + self.w + slack
            and other.y + other.h <= self.y + self.h + slack
        )

    def meets(self, other: "Box", slack: float = 0.5) -> bool:
        return (
            self.x < other.x + other.w - slack
            and other.x < self.x + self.w - slack
            and self.y < other.y + other.h - slack
            and other.y < self.y + self.h - slack
        )


@dataclass(frozen=True)
class Line:
    style: str
    text: str


def code(text: str) -> Line:
    return Line("code", text)


def shape(text: str) -> Line:
    return Line("shape", text)


def quiet(text: str) -> Line:
    return Line("quiet", text)


def math(text: str) -> Line:
    """Italics, with _{below} and ^{above}."""
    return Line("math", text)


def gap() -> Line:
    return Line("body", "")


class Canvas:
    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._defined = [
            '<pattern id="padding" width="7" height="7" patternUnits="userSpaceOnUse"><rect width="7" height="7" '
            'fill="#eaeef2"/><path d="M0,7 7,0" stroke="#8c959f" stroke-width="1"/></pattern>'
        ]
        self._drawn: list[str] = []
        self._arrows: list[str] = []
        self._texts: list[tuple[Box, str]] = []
        self._boxes: list[tuple[Box, str]] = []
        self._paths: list[list[Point]] = []
        self._problems: list[str] = []

    def text(self, x: float, y: float, text: str, style: str = "body", anchor: str = "start") -> None:
        """(x, y) on the base line."""
        size = STYLES[style][1]
        width = text_width(text, style)
        left = x - {"start": 0.0, "middle": width / 2, "end": width}[anchor]
        if text:
            self._texts.append((Box(left, y - 0.76 * size, width, 0.96 * size), text))
        attributes = "" if anchor == "start" else f' text-anchor="{anchor}"'
        self._drawn.append(f'<text x="{x:.1f}" y="{y:.1f}" class="{style}"{attributes}>{_spans(text)}</text>')

    def lines(self, x: float, y: float, lines: Iterable[str | Line], width: float | None = None) -> float:
        """Lines below y; returns where the next would begin. Wider ones than `width` are a problem."""
        for line in lines:
            line = Line("body", line) if isinstance(line, str) else line
            height = LINE_HEIGHT.get(line.style, 16) if line.text else 6
            if width is not None and text_width(line.text, line.style) > width:
                self._problems.append(f"{line.text!r} is {text_width(line.text, line.style) - width:.0f} too wide")
            self.text(x, y + height - 4, line.text, line.style)
            y += height
        return y

    def box(
        self,
        kind: str,
        box: Box,
        title: str = "",
        lines: Sequence[str | Line] = (),
        place: str | Sequence[str] = (),
        paper: str = "",
        note: str = "",
    ) -> Box:
        """A box of a kind: title, lines, at the right the paper's place or a note, at the bottom places in the code."""
        self._rectangle(kind, box, radius=9 if kind in ("zone", "layer", "instead") else 5)
        self._boxes.append((box, kind))
        x, width = box.x + 9, box.w - 18
        y = box.y + 4
        if title:
            self.text(x, box.y + 18, title, "head")
            y = box.y + 23
        if paper or note:
            self.text(box.x + box.w - 9, box.y + 17, paper or note, "paper" if paper else "quiet", "end")
            if text_width(title, "head") + text_width(paper or note, "quiet") + 10 > width:
                self._problems.append(f"{title!r} and {paper or note!r} are wider than their box")
        places = [place] if isinstance(place, str) else list(place)
        end = self.lines(x, y, lines, width)
        bottom = box.y + box.h - 15 * len(places) - (4 if places else 0)
        if end > bottom + 1:
            self._problems.append(f"{title or lines}: {end - bottom:.0f} too high")
        self.lines(x, bottom - 1, [Line("place", place) for place in places], width)
        return box

    def zone(self, number: int, title: str, about: str, box: Box, paper: str = "") -> Box:
        """A numbered part of the picture."""
        self._rectangle("zone", box, radius=12)
        self._boxes.append((box, "zone"))
        self._drawn.append(f'<circle cx="{box.x + 25:.1f}" cy="{box.y + 23:.1f}" r="13" fill="#0550ae"/>')
        self.text(box.x + 25, box.y + 28.5, str(number), "badge", "middle")
        self.text(box.x + 46, box.y + 29, title, "zone")
        self.text(box.x + 58 + text_width(title, "zone"), box.y + 29, about, "quiet")
        if paper:
            self.text(box.x + box.w - 16, box.y + 29, paper, "paper", "end")
        return box

    def pill(self, x: float, y: float, name: str, size: str = "", width: float | None = None) -> Box:
        """Parameters: a name in the model and their size."""
        text = f"{name}  {size}" if size else name
        box = Box(x, y, width or text_width(text, "parameter") + 20, 22)
        self._rectangle("parameter", box, radius=11)
        self._boxes.append((box, "parameter"))
        if text_width(text, "parameter") > box.w - 12:
            self._problems.append(f"{text!r} is wider than its pill")
        self.text(box.x + box.w / 2, box.y + 15, text, "parameter", "middle")
        return box

    def arrow(self, *points: Point, kind: str = "flow", tip: bool = True, free: bool = False) -> None:
        """A line through the points, from one box's border to another's; `free`: an end may join another line."""
        self._paths.append(list(points))
        if not free:
            for end in (points[0], points[-1]):
                if not any(_on_border(end, box) for box, _ in self._boxes):
                    self._problems.append(f"an arrow ends at {end}, at no box")
        path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marker = f' marker-end="url(#{kind})"' if tip else ""
        self._arrows.append(f'<path d="{path}" class="arrow-{kind}"{marker}/>')

    def plus(self, x: float, y: float) -> Box:
        """A sum."""
        self._drawn.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" class="compute"/>'
            f'<path d="M{x - 5:.1f},{y:.1f}h10M{x:.1f},{y - 5:.1f}v10" stroke="#24292f" stroke-width="1.5"/>'
        )
        box = Box(x - 9, y - 9, 18, 18)
        self._boxes.append((box, "compute"))
        return box

    def define(self, svg: str) -> None:
        """Something with an id, drawn where it is used."""
        self._defined.append(svg)

    def raw(self, svg: str) -> None:
        self._drawn.append(svg)

    def frame(self, box: Box) -> Box:
        """A drawing's border, to which arrows may point."""
        self._boxes.append((box, "picture"))
        self._rectangle("picture", box, radius=0)
        return box

    def _rectangle(self, kind: str, box: Box, radius: float) -> None:
        corners = f' rx="{radius}"' if radius else ""
        self._drawn.append(
            f'<rect x="{box.x:.1f}" y="{box.y:.1f}" width="{box.w:.1f}" height="{box.h:.1f}"{corners} class="{kind}"/>'
        )

    def problems(self) -> list[str]:
        """Texts that do not fit or overlap, boxes that overlap, arrows that end nowhere or run over something."""
        found = list(self._problems)
        whole = Box(0, 0, self.width, self.height)
        found += [f"{text!r} leaves the picture" for box, text in self._texts if not whole.holds(box)]
        for index, (box, text) in enumerate(self._texts):
            found += [f"{text!r} overlaps {other!r}" for there, other in self._texts[index + 1 :] if box.meets(there)]
            for there, kind in self._boxes:
                if box.meets(there) and not there.holds(box):
                    found.append(f"{text!r} crosses the border of a box ({kind}) at {there}")
        for index, (box, kind) in enumerate(self._boxes):
            for there, other in self._boxes[index + 1 :]:
                if box.meets(there) and not box.holds(there) and not there.holds(box):
                    found.append(f"boxes overlap: {kind} {box}, {other} {there}")
        for path in self._paths:
            for start, end in pairwise(path):
                segment = Box(
                    min(start[0], end[0]), min(start[1], end[1]), abs(start[0] - end[0]), abs(start[1] - end[1])
                )
                found += [f"an arrow runs over {text!r}" for box, text in self._texts if segment.meets(box, -1.0)]
                for box, kind in self._boxes:
                    if all(box.holds(Box(*point, 0, 0)) for point in path):
                        continue  # an arrow within the box
                    inner = Box(box.x + 1.5, box.y + 1.5, box.w - 3, box.h - 3)
                    if kind not in ("zone", "layer", "instead", "picture") and segment.meets(inner, 0):
                        found.append(f"an arrow {start} to {end} runs over a box ({kind}) at {box}")
        return found

    def svg(self, label: str) -> str:
        size = f'width="{self.width:g}" height="{self.height:g}" viewBox="0 0 {self.width:g} {self.height:g}"'
        markers = "".join(
            f'<marker id="{kind}" viewBox="0 0 8 8" refX="7.4" refY="4" markerUnits="userSpaceOnUse" markerWidth="10" '
            f'markerHeight="10" orient="auto"><path d="M0,0 8,4 0,8z" fill="{stroke}"/></marker>'
            for kind, (stroke, _) in ARROWS.items()
        )
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(label)}">',
                f"<style>\n{_css()}\n</style>\n<defs>{markers}",
                *self._defined,
                "</defs>",
                f'<rect width="{self.width:g}" height="{self.height:g}" fill="#ffffff"/>',
                *self._drawn,
                *self._arrows,
                "</svg>\n",
            ]
        )


def _css() -> str:
    families = {MONO: "Menlo,Consolas,monospace", SERIF: "Times,serif"}
    rules = [
        "text{white-space:pre}",
        ".grid{fill:none;stroke:#57606a;stroke-opacity:.45}",
        ".point{fill-opacity:.9;stroke:#fff;stroke-width:.5}",
    ]
    for name, (font, size, colour) in STYLES.items():
        family = families.get(font, "Helvetica,Arial,sans-serif")
        more = ";font-weight:bold" if font.endswith("Bold") else ";font-style:italic" if font == SERIF else ""
        rules.append(f".{name}{{font:{size}px {family};fill:{colour}{more}}}")
    # After the texts' rules, as a box and a text may share a name: parameters.
    rules += [
        f"rect.{name},circle.{name}{{fill:{fill};stroke:{line};{more}}}" for name, (fill, line, more) in KINDS.items()
    ]
    rules += [f".arrow-{name}{{fill:none;stroke:{stroke};{more}}}" for name, (stroke, more) in ARROWS.items()]
    return "\n".join(rules)


@cache
def _font(name: str) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), 100, layout_engine=ImageFont.Layout.BASIC)


@cache
def text_width(text: str, style: str) -> float:
    font, size, _ = STYLES[style]
    return sum(_font(font).getlength(part) * size / 100 * (0.72 if raised else 1.0) for part, raised in _parts(text))


def _parts(text: str) -> list[tuple[str, str]]:
    """Pieces of a text with where they stand: "", "_" or "^"."""
    pieces = []
    for match in re.finditer(r"([_^])\{([^}]*)\}|((?:(?![_^]\{).)+)", text):
        pieces.append((match[2], match[1]) if match[1] else (match[3], ""))
    return pieces


def _spans(text: str) -> str:
    """Text with lowered and raised parts as SVG."""
    spans, depth = [], 0.0
    for part, raised in _parts(text):
        wanted = {"": 0.0, "_": 4.0, "^": -6.0}[raised]
        size = ' font-size="72%"' if raised else ""
        if wanted == depth and not raised:
            spans.append(escape(part))
        else:
            spans.append(f'<tspan dy="{wanted - depth:.1f}"{size}>{escape(part)}</tspan>')
        depth = wanted
    return "".join(spans)


def _on_border(point: Point, box: Box) -> bool:
    x, y = point
    inside = box.x - 1 <= x <= box.x + box.w + 1 and box.y - 1 <= y <= box.y + box.h + 1
    edge = min(abs(x - box.x), abs(x - box.x - box.w), abs(y - box.y), abs(y - box.y - box.h))
    return inside and edge <= 1
