"""Line and bar charts as inline SVG, without a script: colours come from the page's CSS, values from hovering a point.

Coordinates: x and y are data, px and py are units of the SVG's view box.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .page import escaped

WIDTH, HEIGHT = 640, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 106, 24, 40
LABEL_GAP = 17  # least distance between two lines' names
MOST_POINTS = 150
BAR, BARS_LEFT, BARS_RIGHT = 30, 150, 130  # height of a bar with its gap; room for the names of bars and their texts


@dataclass(frozen=True)
class Line:
    """One named curve. Values that are not finite leave a gap and a mark."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Point:
    """Neighbouring values of a line drawn as one: their mean, smallest and largest; not finite when one is not."""

    x: float
    mean: float
    low: float
    high: float


def thinned(line: Line, most: int = MOST_POINTS) -> list[Point]:
    """The line as few enough points to be distinguished: a long one is cut into `most` runs of neighbouring values."""
    count = len(line.x)
    bins = count if count <= 60 else min(most, max(60, count // 5))
    points = []
    for index in range(bins):
        values = slice(index * count // bins, (index + 1) * count // bins)
        xs, ys = line.x[values], line.y[values]
        mean = sum(ys) / len(ys)
        low, high = (min(ys), max(ys)) if math.isfinite(mean) else (mean, mean)
        points.append(Point(sum(xs) / len(xs), mean, low, high))
    return points


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_name: str,
    log: bool = False,
    from_zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
) -> str:
    """An SVG element with up to four lines; `marks` are (x, name) of moments shown as dashed verticals.

    A line of many values is drawn as means of neighbours over a band from the smallest to the largest of them.
    A logarithmic axis leaves out what is not positive.
    """
    drawn = [(line.name, thinned(line)) for line in lines]
    points = [point for _, line in drawn for point in line]
    shown = [p for p in points if math.isfinite(p.mean) and (p.low > 0 or not log)]
    if not shown:
        return f'<p class="empty">No finite value of {escaped(title.lower())} yet.</p>'
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    if x_low == x_high:
        x_low, x_high = x_low - 1, x_high + 1
    y_low, y_high, y_ticks = _axis(min(p.low for p in shown), max(p.high for p in shown), log, from_zero)

    def px(x: float) -> float:
        return LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        share = math.log(y / y_low) / math.log(y_high / y_low) if log else (y - y_low) / (y_high - y_low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

    words = escaped(_in_words(title, lines))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{words}">']
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {py(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_tick(LEFT - 8, py(tick) + 4, number(tick), "end"))
    for tick in _round_values(x_low, x_high, 6, least=1):
        parts.append(_tick(px(tick), HEIGHT - BOTTOM + 18, short(tick), "middle"))
    parts.append(_tick(WIDTH - RIGHT, HEIGHT - 5, x_name, "end"))
    for x, name in marks:
        if x_low <= x <= x_high:
            parts.append(f'<path class="mark" d="M{px(x):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            parts.append(_tick(px(x), TOP - 8, name, "middle"))
    ends = []
    for color, (name, line) in enumerate(drawn, start=1):
        stretches = _stretches(line, log)
        parts += [_stretch(stretch, color, px, py) for stretch in stretches]
        bad = [p for p in line if not math.isfinite(p.mean)]
        parts += [f'<path class="bad" d="M{px(p.x):.1f} {HEIGHT - BOTTOM}v-9"/>' for p in bad]
        if stretches:
            ends.append((py(stretches[-1][-1].mean), name, color))
    ends.sort()
    for y, (_, name, color) in zip(_apart([end[0] for end in ends]), ends, strict=True):
        x = WIDTH - RIGHT + 10
        parts.append(f'<circle class="dot c{color}" cx="{x}" cy="{y - 4:.1f}" r="4"/>')
        parts.append(f'<text class="name" x="{x + 9}" y="{y:.1f}">{escaped(name)}</text>')
    parts += _readings(drawn, px, x_name)
    return "".join([*parts, "</svg>"])


def bars(rows: Sequence[tuple[str, float, str]], *, title: str) -> str:
    """An SVG element with a bar a row: its name, its length as a share of the longest, and the text at its end."""
    longest = max((length for _, length, _ in rows), default=0) or 1
    words = escaped(f"{title}: {', '.join(f'{name} {text}' for name, _, text in rows)}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {BAR * len(rows) + 6}" role="img" aria-label="{words}">']
    for row, (name, length, text) in enumerate(rows):
        y, width = BAR * row + 6, length / longest * (WIDTH - BARS_LEFT - BARS_RIGHT)
        parts.append(f'<text class="name" x="{BARS_LEFT - 10}" y="{y + 15}" text-anchor="end">{escaped(name)}</text>')
        parts.append(f'<rect class="c1" x="{BARS_LEFT}" y="{y}" width="{max(width, 1):.1f}" height="{BAR - 10}"/>')
        parts.append(_tick(BARS_LEFT + width + 8, y + 15, text, "start"))
    return "".join([*parts, "</svg>"])


def spark(shares: Sequence[float]) -> str:
    """A small SVG curve of values from 0 to 1, without axes."""
    step, height = 3, 20
    places = "L".join(f"{step * index} {height - round(share * height)}" for index, share in enumerate(shares))
    words = f"from {100 * shares[0]:.0f} to {100 * shares[-1]:.0f} percent"
    size = f"0 -1 {step * (len(shares) - 1)} {height + 2}"
    return f'<svg class="spark" viewBox="{size}" role="img" aria-label="{words}"><path d="M{places}"/></svg>'


def number(value: float) -> str:
    """Three or four digits that matter: 0.000412, 3.142, 65 536."""
    if not math.isfinite(value):
        return str(value)
    if value != 0 and abs(value) < 1e-3:
        digits, exponent = f"{value:.2e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    if abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\N{THIN SPACE}")
    return f"{value:.4g}"


def short(value: float) -> str:
    """A count on an axis: 800, 1.5k, 20k, 3M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{unit}"
    return f"{value:g}"


def _axis(low: float, high: float, log: bool, from_zero: bool) -> tuple[float, float, list[float]]:
    """Limits that hold low and high, and the round values between them."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = [factor * 10.0**decade for decade in decades for factor in (1, 2, 5)]
        low = max((step for step in steps if step <= low), default=low)
        high = min((step for step in steps if step >= high), default=high)
        if low == high:
            low, high = low / 2, high * 2
        ticks = [step for step in steps if low <= step <= high]
        return low, high, ticks if len(ticks) <= 7 else [tick for tick in ticks if _is_decade(tick)]
    if from_zero:
        low = min(low, 0.0)
    if low == high:
        low, high = (low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1))
    room = 0.04 * (high - low)
    low, high = (low if from_zero and low == 0 else low - room), high + room
    return low, high, _round_values(low, high, 5)


def _is_decade(value: float) -> bool:
    exponent = math.log10(value)
    return abs(exponent - round(exponent)) < 1e-9


def _round_values(low: float, high: float, count: int, least: float = 0) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten, itself at least `least`, between low and high."""
    raw = max((high - low) / count, least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _stretches(points: Sequence[Point], log: bool) -> list[list[Point]]:
    """The parts of a line between values that cannot be drawn."""
    stretches: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point.mean) and (point.low > 0 or not log):
            stretches[-1].append(point)
        elif stretches[-1]:
            stretches.append([])
    return [stretch for stretch in stretches if stretch]


def _stretch(points: Sequence[Point], color: int, px: Callable[[float], float], py: Callable[[float], float]) -> str:
    means = [f"{px(p.x):.1f} {py(p.mean):.1f}" for p in points]
    parts = [f'<path class="line c{color}" d="M{"L".join(means)}"/>']
    if any(p.low < p.high for p in points):
        outline = [f"{px(p.x):.1f} {py(p.high):.1f}" for p in points]
        outline += [f"{px(p.x):.1f} {py(p.low):.1f}" for p in reversed(points)]
        parts.insert(0, f'<path class="band c{color}" d="M{"L".join(outline)}Z"/>')
    if len(points) <= 30:
        parts += [f'<circle class="dot c{color}" cx="{px(p.x):.1f}" cy="{py(p.mean):.1f}" r="2.5"/>' for p in points]
    return "".join(parts)


def _tick(px: float, py: float, text: str, anchor: str) -> str:
    return f'<text class="tick" x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}">{escaped(text)}</text>'


def _apart(heights: Sequence[float]) -> list[float]:
    """The rising heights of the lines' names, moved as little as keeps them LABEL_GAP apart and inside."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height + 4, placed[-1] + LABEL_GAP if placed else TOP + 8))
    ceiling = HEIGHT - BOTTOM + 4.0
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], ceiling)
        ceiling = placed[index] - LABEL_GAP
    return placed


def _readings(drawn: Sequence[tuple[str, list[Point]]], px: Callable[[float], float], x_name: str) -> list[str]:
    """Unseen columns over the chart, each of which shows the values beneath it when hovered."""
    columns: dict[float, list[str]] = {}
    for name, points in drawn:
        for point in points:
            spread = f" ({number(point.low)} to {number(point.high)})" if point.low < point.high else ""
            columns.setdefault(point.x, []).append(f"{name} {number(point.mean)}{spread}")
    places = sorted(columns)
    edges = [LEFT, *((px(a) + px(b)) / 2 for a, b in itertools.pairwise(places)), WIDTH - RIGHT]
    rectangles = []
    for x, (left, right) in zip(places, itertools.pairwise(edges), strict=True):
        place = f'x="{left:.1f}" y="{TOP}" width="{max(right - left, 0.5):.1f}" height="{HEIGHT - TOP - BOTTOM}"'
        values = "\n".join(map(escaped, [f"{x_name} {x:g}", *columns[x]]))
        rectangles.append(f'<rect class="reading" {place}><title>{values}</title></rect>')
    return rectangles


def _in_words(title: str, lines: Sequence[Line]) -> str:
    ends = (f"{line.name} from {number(line.y[0])} to {number(line.y[-1])}" for line in lines if line.y)
    return f"{title}: {', '.join(ends)}"
