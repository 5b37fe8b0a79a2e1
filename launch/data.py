"""`ddetr data pack`, `check`, `synth` and `show`, with progress bars and tables."""

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
from ..data.protocols import SPELLED, ProtocolName
from ..data.sets import Reading
from ..data.shards import pack_set
from ..data.stream import TrainStream
from ..data.synthetic import draw_set
from .console import Terminal, brief, progress_bar, say
from .drawing import DrawnBox, font_of, mark_boxes

ROWS_PER_KIND = 20
CELL_LENGTH = 300  # characters of a finding in the table of `check`
CELL, CAPTION = 400, 22  # pixels of one sample's side in `show`, and of them below the image
GREY = "#202020"


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
    """Pack annotations and images into shards; print what was packed, and the warnings.

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
        say(_scored(index.protocol))
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
        say(_scored(ShardIndex.read(path).protocol))
        return _told(str(path), findings)
    with progress_bar() as progress:
        sets = read_sets(path, images, replace(reading, workers=workers), split=split, progress=progress)
    right = []
    for name, coco in sets.items():
        with progress_bar() as progress:
            findings = check_set(coco, workers=workers, most_pixels=reading.most_pixels, progress=progress)
        say(_scored(coco.protocol))
        right.append(_told(f"{path}, {name}" if len(sets) > 1 else str(path), findings))
    return all(right)


def _scored(protocol: ProtocolName) -> str:
    return f"detections in it are scored by the protocol of {SPELLED[protocol]}"


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
    sheet = Image.new("RGB", (columns * CELL, math.ceil(count / columns) * CELL), GREY)
    for number, batch in enumerate(samples):
        sheet.paste(_cell(batch, index.categories), (number % columns * CELL, number // columns * CELL))
    output.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(output, format="PNG")
    say(f"{output}: {count} samples of {shards}")


def _cell(batch: Batch, categories: Categories) -> Image.Image:
    """One sample, fitted into CELL x CELL above a caption, its boxes drawn and named."""
    image = Image.fromarray(batch.images[0].permute(1, 2, 0).numpy())
    space = Image.new("RGB", (CELL, CELL - CAPTION), GREY)
    scale = min((space.width - 8) / image.width, (space.height - 8) / image.height)
    fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    left, top = (space.width - fitted.width) // 2, (space.height - fitted.height) // 2
    space.paste(fitted, (left, top))
    boxes_cxcywh = batch.boxes_cxcywh
    boxes_xyxy = cxcywh_to_xyxy(boxes_cxcywh) * boxes_cxcywh.new_tensor([fitted.width, fitted.height] * 2)
    boxes_xyxy += boxes_xyxy.new_tensor([left, top] * 2)
    # Large boxes first, so that the names of small ones stay readable.
    order = (boxes_cxcywh[:, 2] * boxes_cxcywh[:, 3]).argsort(descending=True, stable=True)
    labels = batch.labels[order].tolist()
    boxes = [
        DrawnBox(tuple(box), categories.names[label], label)
        for box, label in zip(boxes_xyxy[order].tolist(), labels, strict=True)
    ]
    mark_boxes(space, boxes, line=2, text_size=11)
    cell = Image.new("RGB", (CELL, CELL), GREY)
    cell.paste(space)
    height, width = batch.original_sizes[0].tolist()
    caption = f"image {int(batch.image_ids[0])}: {width} x {height} seen at {image.width} x {image.height}"
    ImageDraw.Draw(cell).text((6, space.height + 2), caption, fill="#d0d0d0", font=font_of(11))
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
