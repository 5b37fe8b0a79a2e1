"""What `ddetr eval` says and writes of where a detector fails: a summary, tables, pictures of the worst images."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from ..core.evaluation import analysis as analyses
from ..core.evaluation.analysis import Analysis
from ..core.evaluation.failures import Failures, Seen
from ..data.files import write_whole
from ..data.images import load_image
from ..data.index import ShardIndex, ShardReader
from ..data.text import visible
from .console import brief
from .drawing import DrawnBox, font_of, mark_boxes

CLASSES, CONFUSIONS = "classes.csv", "confusions.csv"
WORST = "worst"  # the folder of the pictures
SHOWN = 5  # classes and confusions
PANEL, BAR, GAP = 520, 26, 6  # pixels: longer side of half a picture, height of its head, between the halves
TEXT = 13  # pixels
_FORMULA = "=+-@"  # what a spreadsheet takes for the begin of a formula


def remove(folder: Path) -> None:
    """Remove what `write` has written there."""
    for file in [*(folder / name for name in (analyses.FILE_NAME, CLASSES, CONFUSIONS)), *pictures(folder)]:
        file.unlink(missing_ok=True)


def pictures(folder: Path) -> list[Path]:
    """The places of the pictures, the worst image first, whether or not they are there."""
    return [folder / WORST / f"{number:02d}.jpg" for number in range(1, analyses.MOST_WORST + 1)]


def write(console: Console, folder: Path, index: ShardIndex, failing: Failures, most_pixels: int) -> None:
    """Write analysis.json, classes.csv, confusions.csv and the pictures of the worst images.

    most_pixels: as data.most_pixels. An image of which there can be no picture is told in a line. Raises OSError where
    nothing can be written.
    """
    analysis = failing.analysis
    analyses.write(folder, analysis)
    classes = [
        (row.id, row.name, row.objects, row.ap, row.ap50, row.recall, row.threshold, row.f1) for row in analysis.classes
    ]
    heads = ("id", "name", "objects", "AP", "AP50", "recall", "threshold", "F1")
    write_whole(folder / CLASSES, as_csv(heads, classes))
    confusions = [(row.truth, row.found, row.count, row.share) for row in analysis.confusions]
    write_whole(folder / CONFUSIONS, as_csv(("truth", "found", "count", "share"), confusions))
    if analysis.worst:
        (folder / WORST).mkdir(exist_ok=True)
    for image, file in zip(analysis.worst, pictures(folder), strict=False):
        try:
            drawn = _picture(index, failing.seen_in(image.id), image.id, most_pixels)
        except (ValueError, OSError) as error:  # read once already, but a source may have gone since
            console.print(f"no picture of image {image.id}: {error}", soft_wrap=True)
            continue
        encoded = io.BytesIO()
        drawn.save(encoded, "JPEG", quality=88)
        write_whole(file, encoded.getvalue())


def as_csv(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A table for spreadsheets: a text that one of them would take for a formula has an apostrophe in front."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(heads)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return "" if value is None else value
    text = visible(value)
    return f"'{text}" if text.lstrip().startswith(tuple(_FORMULA)) else text


def show(console: Console, folder: Path, analysis: Analysis, seconds: float) -> None:
    """Print the summary."""
    console.print(f"Where it fails (IoU 0.5; {seconds:.1f} s, all of it in {folder}):", soft_wrap=True)
    table = Table()
    table.add_column("error")
    for name in ("all", "at the best thresholds", "mending it adds to AP50"):
        table.add_column(name, justify="right")
    for kind in sorted(analysis.errors, key=lambda kind: -kind.gain):
        table.add_row(kind.name, str(kind.count), str(kind.confident), f"{kind.gain:.4f}")
    console.print(table)
    few = max(1, min(SHOWN, len(analysis.classes) // 2))
    for name, rows in (("lowest AP", analysis.classes[:few]), ("highest AP", analysis.classes[: -few - 1 : -1])):
        listed = ", ".join(f"{brief(row.name)} {row.ap:.3f}" for row in rows)
        console.print(f"{name}: {listed}", soft_wrap=True)
    if analysis.confusions:
        listed = ", ".join(
            f"{brief(row.truth)} as {brief(row.found)} {row.count}x" for row in analysis.confusions[:SHOWN]
        )
        console.print(f"most confused: {listed}", soft_wrap=True)
    console.print(f"calibration error: {analysis.calibration_error:.3f} between scores and shares of right detections")


def _picture(index: ShardIndex, seen: Seen, image_id: int, most_pixels: int) -> Image.Image:
    """Truth on the left, detections on the right. Raises ValueError and OSError when the image cannot be read."""
    (sample,) = np.flatnonzero(index.samples["image_id"] == image_id)
    reader = ShardReader(index)
    try:
        data, entry = reader.sample(*index.locate(int(sample)))
    finally:
        reader.close()
    size = entry["height"], entry["width"]
    pixels = load_image(data, most_pixels=most_pixels, stated=size, orientation=entry["orientation"])
    image = Image.fromarray(pixels)
    scale = PANEL / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    places = {id_: label for label, id_ in enumerate(index.categories.ids)}

    def box(row: np.void, mark: str, ending: str) -> DrawnBox:
        x, y, width, height = (float(value) * scale for value in row["bbox"])
        label = places[int(row["category_id"])]
        return DrawnBox((x, y, x + width, y + height), f"{mark}{index.categories.names[label]}{ending}", label)

    truth = [
        box(row, "" if found else "missed: ", " (crowd)" if row["iscrowd"] else "")
        for row, found in zip(seen.objects, seen.is_found, strict=True)
    ]
    detections = [
        box(row, "" if right else "wrong: ", f" {row['score']:.2f}")
        for row, right in zip(seen.detections, seen.is_right, strict=True)
    ]
    width, height = image.size
    sheet = Image.new("RGB", (2 * width + GAP, height + BAR), "#2b2b2b")
    pen, font = ImageDraw.Draw(sheet), font_of(TEXT)
    for left, head, boxes in ((0, "truth", truth), (width + GAP, "detections", detections)):
        half = image.copy()
        mark_boxes(half, boxes, line=2, text_size=TEXT)
        sheet.paste(half, (left, BAR))
        pen.text((left + 6, 5), f"{head}: {len(boxes)}", fill="#f0f0f0", font=font)
    return sheet
