"""A row of the table of annotations, and what its sets are made of."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from ddetr.data.sets import Reading
from PIL import Image

NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """files: path -> text or bytes. path, images, classes: what the user names of them; "" is the folder of them all.

    boxes: image -> (class, x, y, width, height) each in pixels of the picture, crowds after a "*". findings: kind ->
    how many; with an error among them nothing is packed. message: what refuses it as a whole instead, a regex.
    """

    name: str
    files: Mapping[str, str | bytes]
    boxes: Mapping[str, Sequence[tuple[Any, ...]]] = field(default_factory=dict)
    findings: Mapping[str, int] = field(default_factory=dict)
    message: str = ""
    path: str = ""
    images: str | None = None
    reading: Reading = field(default_factory=lambda: Reading(workers=1))
    drop_degenerate: bool = False
    classes: str | None = None


def picture(width: int, height: int, format: str = "PNG", orientation: int = 1) -> bytes:
    """Noise of a fixed seed. orientation: of EXIF; the pixels are stored as (width, height)."""
    pixels = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **({"exif": exif} if orientation != 1 else {}))
    return file.getvalue()


def deep(numbers: np.ndarray, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, format)
    return file.getvalue()


A, B = picture(100, 80), picture(60, 90)
BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 30, 40], "area": 1200, "iscrowd": 0}
IMAGE_A = {"id": 1, "file_name": "a.png", "width": 100, "height": 80}
IMAGE_B = {"id": 2, "file_name": "b.png", "width": 60, "height": 90}
CATEGORIES = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
CAT = ("cat", 10, 20, 30, 40)


def coco(
    annotations: Sequence[Any] = (BOX,),
    images: Sequence[Any] = (IMAGE_A,),
    categories: Any = CATEGORIES,
    files: Mapping[str, str | bytes] | None = None,
) -> dict[str, str | bytes]:
    values = {"images": list(images), "annotations": list(annotations), "categories": categories}
    return {"instances.json": json.dumps(values), "a.png": A, "b.png": B, **(files or {})}


def changed(**values: Any) -> dict[str, Any]:
    return {**BOX, **values}


def without(entry: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


def xml(
    *objects: str, filename: str | None = "a.png", size: str = "<width>100</width><height>80</height>", head: str = ""
) -> str:
    name = "" if filename is None else f"<filename>{escape(filename)}</filename>"
    return f"{head}<annotation>{name}<size>{size}</size>{''.join(objects)}</annotation>"


def entry(name: str = "cat", corners: Sequence[Any] = (11, 21, 40, 60), more: str = "", box: str = "bndbox") -> str:
    sides = "".join(
        f"<{side}>{value}</{side}>" for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
    )
    return f"<object><name>{escape(name)}</name>{more}<{box}>{sides}</{box}></object>"


ROW = "0 0.25 0.5 0.3 0.5\n"  # ("cat", 10, 20, 30, 40) of 100 x 80
YAML = "train: images\nval: images\nnames: [cat, dog]\n"


def yolo(
    rows: str | bytes = ROW, names: str | bytes = YAML, files: Mapping[str, str | bytes] | None = None
) -> dict[str, str | bytes]:
    return {"data.yaml": names, "images/a.png": A, "labels/a.txt": rows, **(files or {})}


ONE = {"a.png": [CAT]}
