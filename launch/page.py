"""A self-contained HTML page: style, tables, figures. Nothing in it is loaded from elsewhere."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from ..data.images import load_image, read_file
from ..data.text import visible

# No script runs and nothing is loaded, even if a text should ever reach the page as markup.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1b1b19; --soft: #63625d; --rule: #e3e2dd; --bad: #c8332f;
  --c1: #2a78d6; --c2: #d95926; --c3: #12855c; --c4: #7a4fc4; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131312; --card: #1c1c1a; --ink: #f1f0ec; --soft: #a5a49d; --rule: #34332f; --bad: #ff7b72;
  --c1: #5b9df0; --c2: #f08a5c; --c3: #3fbf8f; --c4: #b094ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 36px 24px 64px; }
h1 { font-size: 26px; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 12px; }
h3 { font-size: 14px; margin: 0; }
p { margin: 4px 0; max-width: 100ch; }
figure { margin: 0; }
.soft, figcaption, .note { color: var(--soft); font-size: 13px; }
.warning { border-left: 3px solid var(--bad); padding: 2px 0 2px 12px; margin-top: 14px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 16px 18px; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px; margin-top: 22px; }
.below { margin-top: 14px; }
.tile { padding: 12px 16px; margin: 0; }
.tile dt { color: var(--soft); font-size: 13px; }
.tile dd { margin: 0; }
.value { font-size: 22px; font-weight: 600; line-height: 1.25; white-space: nowrap; }
.value small { font-size: 14px; font-weight: 400; color: var(--soft); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 460px), 1fr)); gap: 14px; }
.column { display: grid; gap: 14px; align-content: space-between; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-weight: 500; font-size: 13px; }
tbody th { font-weight: 500; }
td.n, th.n { text-align: right; padding-right: 0; padding-left: 14px; white-space: nowrap; }
td { overflow-wrap: anywhere; }
.n + td:not(.n), .n + th:not(.n) { padding-left: 14px; }
.wide { overflow-x: auto; }
.scroll { max-height: 420px; overflow: auto; }
.scroll .wide { overflow: visible; }
.scroll thead th { position: sticky; top: -16px; background: var(--card); }
code, pre { font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 500; }
details[open] > summary { margin-bottom: 10px; }
svg { display: block; width: 100%; height: auto; margin-top: 8px; font-size: 13px; }
svg text { fill: var(--ink); }
svg .tick { fill: var(--soft); font-size: 12px; }
svg .name { font-size: 13px; }
.grid { stroke: var(--rule); fill: none; }
.mark { stroke: var(--soft); stroke-dasharray: 3 4; fill: none; }
.bad { stroke: var(--bad); stroke-width: 2; fill: none; }
.line { fill: none; stroke-width: 2; stroke-linejoin: round; }
.band { opacity: .2; stroke: none; }
.line.c1 { stroke: var(--c1); } .line.c2 { stroke: var(--c2); }
.line.c3 { stroke: var(--c3); } .line.c4 { stroke: var(--c4); }
.c1:not(.line) { fill: var(--c1); } .c2:not(.line) { fill: var(--c2); }
.c3:not(.line) { fill: var(--c3); } .c4:not(.line) { fill: var(--c4); }
.reading { fill: var(--ink); opacity: 0; } .reading:hover { opacity: .08; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 14px; }
.pictures img { width: 100%; height: auto; display: block; border-radius: 6px; }
.pictures figcaption { margin-top: 6px; overflow-wrap: anywhere; }
.pictures.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 520px), 1fr)); }
.spark { width: 72px; height: 24px; margin: 0; }
.spark path { stroke: var(--c1); stroke-width: 1.5; fill: none; }
.empty { color: var(--soft); padding: 40px 0; text-align: center; max-width: none; }
@media (max-width: 600px) { svg .tick { font-size: 15px; } svg .name { font-size: 14px; } }
@media print { body { background: none; } .card, figure { break-inside: avoid; } .scroll { max-height: none; } }
"""
PICTURE_PIXELS = 720  # of the longer side, once embedded
PICTURE_BYTES = 64 << 10  # of an embedded picture at most: its quality goes down, then its size


class Markup(str):
    """HTML that is shown as it is: nothing in it is untrusted."""


def escaped(text: str) -> str:
    """One line of text as HTML or SVG has it, between tags and in an attribute."""
    return html.escape(visible(text))


def page(title: str, body: Iterable[str]) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows whose first cell names them; the columns of `numbers` are set to the right."""

    def cell(tag: str, column: int, text: str) -> str:
        attributes = (' scope="col"' if tag == "th" else "") + (' class="n"' if column in numbers else "")
        return f"<{tag}{attributes}>{text if isinstance(text, Markup) else escaped(text)}</{tag}>"

    head = "".join(cell("th", column, text) for column, text in enumerate(heads))
    lines = []
    for row in rows:
        cells = "".join(cell("td", column, text) for column, text in enumerate(row[1:], start=1))
        lines.append(f'<tr><th scope="row">{escaped(row[0])}</th>{cells}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def tile(name: str, value: str, unit: str = "", note: str = "") -> str:
    unit = f" <small>{escaped(unit)}</small>" if unit else ""
    note = f'<dd class="soft">{escaped(note)}</dd>' if note else ""
    value = f'<dd class="value">{escaped(value)}{unit}</dd>'
    return f'<dl class="card tile"><dt>{escaped(name)}</dt>{value}{note}</dl>'


def figure(title: str, note: str, drawing: str) -> str:
    caption = f"<h3>{escaped(title)}</h3><figcaption>{escaped(note)}</figcaption>"
    return f'<figure class="card">{caption}{drawing}</figure>'


def picture(path: Path, caption: str, pixels: int = PICTURE_PIXELS) -> str:
    """The picture made small enough to be part of the page, its longer side at most `pixels`.

    Raises ValueError when it cannot be read.
    """
    try:
        image = Image.fromarray(load_image(read_file(path), (pixels, pixels)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: not a picture that can be read ({error}); move it away, then report again"
        ) from error
    image.thumbnail((pixels, pixels))
    data = base64.b64encode(_encoded(image)).decode()
    return (
        f'<figure class="card"><img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" '
        f'alt="{escaped(caption)}"><figcaption>{escaped(caption)}</figcaption></figure>'
    )


def _encoded(image: Image.Image) -> bytes:
    """A JPEG of at most PICTURE_BYTES."""
    while True:
        for quality in (88, 75, 60, 45):
            encoded = io.BytesIO()
            image.save(encoded, "JPEG", quality=quality)
            if encoded.tell() <= PICTURE_BYTES:
                return encoded.getvalue()
        image = image.resize((max(1, image.width * 3 // 4), max(1, image.height * 3 // 4)))


def duration(seconds: float) -> str:
    """As people say it: seconds, then minutes, then hours."""
    if not seconds >= 60:  # or not a number
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def date(moment: float) -> str:
    """Date and time in UTC of seconds since 1970."""
    return datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
