"""Pixels and boxes agree, however EXIF turns an image and whichever program wrote the boxes.

PIL is the reference: it turns pictures as viewers do.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from ddetr.data.config import DataConfig
from ddetr.data.formats import read_sets
from ddetr.data.images import Header, image_header, load_image, load_upright
from ddetr.data.sets import CocoSet, Reading
from ddetr.data.shards import pack_set
from ddetr.data.stream import TrainStream, evaluation_batches
from PIL import Image, ImageOps

WIDTH, HEIGHT = 96, 64  # of the stored pixels
BOX = (8, 4, 40, 12)  # x, y, width, height of a red rectangle in the stored pixels
SETTINGS = DataConfig(
    short_sides=(64,), validation_short_side=64, long_side=128, crop=False, similar_sizes=False, workers=0
)


def stored(orientation: int) -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    x, y, w, h = BOX
    pixels[y : y + h, x : x + w] = (255, 0, 0)
    image = Image.fromarray(pixels)
    image.getexif()[0x0112] = orientation
    return image


def saved(orientation: int, path: Path) -> None:
    image = stored(orientation)
    image.save(path, exif=image.getexif(), **({"quality": 95} if path.suffix == ".jpg" else {}))


def red(pixels: np.ndarray) -> tuple[int, int, int, int]:
    """(x, y, width, height) of the red rectangle in pixels (height, width, 3)."""
    found = (pixels[..., 0] > 128) & (pixels[..., 1] < 100)
    rows, columns = np.flatnonzero(found.any(1)), np.flatnonzero(found.any(0))
    return int(columns[0]), int(rows[0]), len(columns), len(rows)


def shown(orientation: int) -> tuple[tuple[int, int], tuple[int, int, int, int]]:
    """((width, height), box) of the picture as PIL shows it."""
    picture = ImageOps.exif_transpose(stored(orientation))
    return picture.size, red(np.asarray(picture))


def coco(folder: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> CocoSet:
    values = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": size[0], "height": size[1]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": list(box)}],
        "categories": [{"id": 1, "name": "red"}],
    }
    (folder / "a.json").write_text(json.dumps(values))
    return only(folder / "a.json", size, box)


def voc(folder: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> CocoSet:
    x, y, w, h = box
    corners = f"<xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
    (folder / "a.xml").write_text(
        f"<annotation><filename>a.jpg</filename><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        f"<object><name>red</name><bndbox>{corners}</bndbox></object></annotation>"
    )
    return only(folder, size, box)


def yolo(folder: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> CocoSet:
    x, y, w, h = box
    (folder / "classes.txt").write_text("red\n")
    (folder / "a.txt").write_text(f"0 {(x + w / 2) / size[0]} {(y + h / 2) / size[1]} {w / size[0]} {h / size[1]}\n")
    return only(folder, size, box)


def only(path: Path, size: tuple[int, int], box: tuple[int, int, int, int]) -> CocoSet:
    """The set, read as the program meant it: a quarter turn shows in the size, for any other the user says it."""
    convention = "stored" if (size, box) == ((WIDTH, HEIGHT), BOX) else "shown"
    (read,) = read_sets(path, reading=Reading(workers=1, orientation=convention)).values()
    assert not read.findings
    return read


def assert_pixels_agree(coco: CocoSet, output: Path) -> None:
    index = pack_set(coco, output, workers=1).index
    (part,) = evaluation_batches(index, [0], SETTINGS, batch_size=1)
    stream = TrainStream(index, SETTINGS, batch_size=1, accumulation=1, rank=0, world_size=1, seed=1)
    ((trained,),) = [next(iter(stream.steps(0)))]
    stream.close()
    for batch in (part.batch, trained):
        pixels = batch.images[0].permute(1, 2, 0).numpy()
        height, width = pixels.shape[:2]
        x, y, w, h = red(pixels)
        cx, cy, box_w, box_h = batch.boxes_cxcywh[0].tolist()
        box = (cx - box_w / 2) * width, (cy - box_h / 2) * height, box_w * width, box_h * height
        assert box == pytest.approx((x, y, w, h), abs=1.5)  # resampling blurs the edges


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("write", [coco, voc, yolo])
def test_boxes_of_the_picture_as_shown_are_on_its_pixels(write, orientation: int, tmp_path: Path) -> None:
    saved(orientation, tmp_path / "a.jpg")
    assert_pixels_agree(write(tmp_path, *shown(orientation)), tmp_path / "shards")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("write", [coco, voc])
def test_boxes_of_the_stored_pixels_are_on_them(write, orientation: int, tmp_path: Path) -> None:
    saved(orientation, tmp_path / "a.jpg")
    assert_pixels_agree(write(tmp_path, (WIDTH, HEIGHT), BOX), tmp_path / "shards")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(9))
def test_an_image_is_turned_as_pil_turns_it(orientation: int, suffix: str, tmp_path: Path) -> None:
    saved(orientation, tmp_path / f"a{suffix}")
    data = (tmp_path / f"a{suffix}").read_bytes()
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert np.abs(load_upright(data).astype(int) - expected).max() <= 2  # two decoders of JPEG
    header = image_header(tmp_path / f"a{suffix}")
    assert header.shown_size == expected.shape[:2]
    if suffix == ".tif":  # PIL gives no other pixels than those
        assert header == Header(*expected.shape[:2], was_turned=orientation > 1)


def test_a_reduced_decode_is_of_the_picture_as_turned() -> None:
    file = io.BytesIO()
    pixels = np.linspace(0, 255, 400 * 800).reshape(400, 800).astype(np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    reduced = load_image(file.getvalue(), (100, 50), stated=(800, 400), orientation=6)
    assert reduced.shape == (100, 50, 3)
    whole = load_image(file.getvalue(), stated=(800, 400), orientation=6)
    assert np.abs(reduced.astype(int) - whole[4::8, 4::8]).max() < 20
    with pytest.raises(ValueError, match="the file holds"):
        load_image(file.getvalue(), stated=(400, 800), orientation=6)
