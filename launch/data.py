"""`ddetr data ...`: pack, check, synth and show, with progress bars and tables."""

import math
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path

from PIL import Image, ImageDraw
from rich.table import Table
from rich.text import Text

from ..core.config import Config
from ..data.batch import Batch
from ..data.boxes import cxcywh_to_xyxy
from ..data.categories import Categories
from ..data.doctor import check_set, check_shards
from ..data.findings import FIXES, Finding, summary
from ..data.formats import EVERYTHING, read_sets
from ..data.index import ShardIndex
from ..data.layout import INDEX_NAME
from ..data.sets import Reading
from ..data.shards import pack_set
from ..data.stream import TrainStream
from ..data.synthetic import draw_set
from .console import Terminal, brief, progress_bar, say
from .drawing import fitted_text, font_of

ROWS_PER_KIND = 20
CELL_LENGTH = 300  # characters of a finding in the table of `check`
CELL = 400  # pixels of one sample's side in `show`
COLOURS = ("#e6194b", "#3cb44b", "#ffe119", "#4363d8", "#f58231", "#42d4f4", "#f032e6", "#bfef45", "#fabed4", "#9a6324")


def pack(
    annotations: Path,
    images: Path | None,
    output: Path,
    *,
    workers: int,
    shard_megabytes: int,
    drop_degenerate: bool,
    reading: Reading,
    split: str | None,
) -> None:
    """Annotations and images -> shards, a line that says what was packed, and what else is to be known of it.

    The splits of an export's root are packed into folders of `output` of their names; a single one into `output`.
    """
    with progress_bar() as progress:
        sets = read_sets(annotations, images, replace(reading, workers=workers), split=split, progress=progress)
    for name, coco in sets.items():
        place = output / name if len(sets) > 1 else output
        with progress_bar() as progress:
            packed = pack_set(
                coco,
                place,
                workers=workers,
                shard_bytes=shard_megabytes << 20,
                drop_degenerate=drop_degenerate,
                most_pixels=reading.most_pixels,
                progress=progress,
            )
        index = packed.index
        megabytes = sum(shard.bytes for shard in index.shards) / 2**20
        say(
            f"{place}: {index.num_samples} images with {index.source['boxes']} boxes of {len(index.categories)} "
            f"categories in {len(index.shards)} shards, {megabytes:.1f} MiB"
        )
        if index.source["dropped_boxes"]:
            say(f"{index.source['dropped_boxes']} boxes without area were left out")
        if packed.warnings:
            for line in (f"{len(packed.warnings)} warning(s):", *summary(packed.warnings, each=3).splitlines()):
                say(line)


def check(
    path: Path, images: Path | None, *, workers: int = 0, reading: Reading = EVERYTHING, split: str | None = None
) -> bool:
    """Print everything wrong with annotations and their images, or with a folder of shards; True without errors."""
    if images is None and (path / INDEX_NAME).exists():
        with progress_bar() as progress:
            findings = check_shards(path, workers=workers, most_pixels=reading.most_pixels, progress=progress)
        return _told(str(path), findings)
    with progress_bar() as progress:
        sets = read_sets(path, images, replace(reading, workers=workers), split=split, progress=progress)
    right = []
    for name, coco in sets.items():
        with progress_bar() as progress:
            findings = check_set(coco, workers=workers, most_pixels=reading.most_pixels, progress=progress)
        right.append(_told(f"{path}, {name}" if len(sets) > 1 else str(path), findings))
    return all(right)


def _told(place: str, findings: list[Finding]) -> bool:
    errors = sum(finding.severity == "error" for finding in findings)
    if findings:
        _print_findings(findings)
    say(f"{place}: {errors} error(s), {len(findings) - errors} warning(s)")
    return errors == 0


def synth(output: Path, images: int, size: int, classes: int, seed: int) -> None:
    """Draw a procedural COCO-format set."""
    with progress_bar() as progress:
        path = draw_set(output, images=images, size=size, classes=classes, seed=seed, progress=progress)
    say(f"{path} and {images} images in {output / 'images'}; next: ddetr data pack {path} {output / 'images'} SHARDS")


def show(shards: Path, output: Path, count: int, config: Config) -> None:
    """Draw the first `count` samples of epoch 0, augmented, with their boxes, as one picture."""
    index = ShardIndex.load(shards)
    count = min(count, index.num_samples)
    data = config.data.model_copy(update={"workers": 0})
    stream = TrainStream(index, data, batch_size=1, accumulation=1, rank=0, world_size=1, seed=config.train.seed)
    samples = [batch for (batch,) in islice(stream.steps(0), count)]
    columns = math.ceil(math.sqrt(count))
    sheet = Image.new("RGB", (columns * CELL, math.ceil(count / columns) * CELL), "#202020")
    for number, batch in enumerate(samples):
        sheet.paste(_cell(batch, index.categories), (number % columns * CELL, number // columns * CELL))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, format="PNG")
    say(f"{output}: {count} samples of {shards}")


def _cell(batch: Batch, categories: Categories) -> Image.Image:
    """One sample, fitted into CELL x CELL above a caption, its boxes drawn and named."""
    caption_height = 22
    image = Image.fromarray(batch.images[0].permute(1, 2, 0).numpy())
    scale = min((CELL - 8) / image.width, (CELL - 8 - caption_height) / image.height)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    cell = Image.new("RGB", (CELL, CELL), "#202020")
    left, top = (CELL - fitted.width) // 2, (CELL - caption_height - fitted.height) // 2
    cell.paste(fitted, (left, top))
    draw = ImageDraw.Draw(cell)
    font = font_of(11)
    boxes = cxcywh_to_xyxy(batch.boxes_cxcywh) * batch.boxes_cxcywh.new_tensor([fitted.width, fitted.height] * 2)
    # Large boxes first, so that the names of small ones stay readable.
    areas = (batch.boxes_cxcywh[:, 2] * batch.boxes_cxcywh[:, 3]).tolist()
    for i in sorted(range(len(areas)), key=areas.__getitem__, reverse=True):
        label = int(batch.labels[i])
        x0, y0, x1, y1 = (value + offset for value, offset in zip(boxes[i].tolist(), (left, top) * 2, strict=True))
        colour = COLOURS[label % len(COLOURS)]
        draw.rectangle((x0, y0, x1, y1), outline=colour, width=2 if min(x1 - x0, y1 - y0) > 24 else 1)
        name = fitted_text(categories.names[label], CELL - 8, font)
        corner = (min(x0 + 2, CELL - 4 - draw.textlength(name, font=font)), max(top, y0 - 13))
        text_box = draw.textbbox(corner, name, font=font)
        draw.rectangle((text_box[0] - 2, text_box[1] - 1, text_box[2] + 2, text_box[3] + 1), fill=colour)
        draw.text(corner, name, fill="black", font=font)
    height, width = batch.original_sizes[0].tolist()
    caption = f"image {int(batch.image_ids[0])}: {width} x {height} seen at {image.width} x {image.height}"
    draw.text((6, CELL - caption_height + 2), caption, fill="#d0d0d0", font=font)
    return cell


def _print_findings(findings: list[Finding]) -> None:
    table = Table("kind", "where", "what", title="findings", title_justify="left")
    for column in table.columns:
        column.overflow = "fold"  # a name loses nothing where the table is narrow
    shown: Counter[str] = Counter()
    for finding in sorted(findings, key=lambda finding: (finding.severity, finding.kind)):
        shown[finding.kind] += 1
        if shown[finding.kind] <= ROWS_PER_KIND:
            style = "red" if finding.severity == "error" else "yellow"
            table.add_row(
                Text(finding.kind, style), brief(finding.where, CELL_LENGTH), brief(finding.what, CELL_LENGTH)
            )
    console = Terminal()
    console.print(table)
    for kind, total in shown.items():
        console.print(f"{kind}: {total}" + (f" ({ROWS_PER_KIND} shown)" if total > ROWS_PER_KIND else ""))
        console.print(f"  fix: {FIXES[kind]}")
