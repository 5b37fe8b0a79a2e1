"""Decoding, the published sizes, and views against torchvision's transforms applied step by step."""

import io

import numpy as np
import pytest
import torch
from ddetr.data import transforms, views
from ddetr.data.batch import collate
from ddetr.data.boxes import cxcywh_to_xyxy
from ddetr.data.categories import Categories
from ddetr.data.config import DataConfig
from ddetr.data.splitmix import random_numbers
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

CATEGORIES = Categories(ids=(1, 23, 56), names=("disc", "triangle", "cross"))
SIZES = [(480, 640), (640, 480), (427, 640), (333, 500), (500, 500), (375, 1242), (100, 900), (800, 1066), (37, 23)]


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, **options)
    return buffer.getvalue()


def photograph(height: int, width: int, coarse: int = 8) -> Image.Image:
    """Smooth enough to be resampled without aliasing."""
    blobs = np.random.default_rng(0).integers(0, 256, (coarse, coarse, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((width, height), Image.Resampling.BICUBIC)


def pixels_of(image: Image.Image) -> np.ndarray:
    return np.array(image)


def entry(height: int, width: int, annotations: list[dict], image_id: int) -> dict:
    """As a shard holds it."""
    return {"image_id": image_id, "height": height, "width": width, "annotations": annotations}


def black(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), dtype=np.uint8)


def published_size(image_size, size, max_size=None):
    """`get_size_with_aspect_ratio` of the published code; sizes are (width, height), the result is (height, width)."""
    w, h = image_size
    if max_size is not None:
        min_original_size = float(min((w, h)))
        max_original_size = float(max((w, h)))
        if max_original_size / min_original_size * size > max_size:
            size = round(max_size * min_original_size / max_original_size)
    if (w <= h and w == size) or (h <= w and h == size):
        return (h, w)
    if w < h:
        ow = size
        oh = int(size * h / w)
    else:
        oh = size
        ow = int(size * w / h)
    return (oh, ow)


def resized_size(height: int, width: int, short_side: int, long_side: int | None = None) -> tuple[int, int]:
    ((new_height, new_width),) = views.resized_sizes(np.array([height]), np.array([width]), short_side, long_side)
    return int(new_height), int(new_width)


def training_views(height: int, width: int, config: DataConfig, count: int) -> list[views.View]:
    random = random_numbers(0, 0, np.arange(count), views.DRAWS)
    drawn = views.training_views(np.full(count, height), np.full(count, width), config, random)
    sizes = views.training_sizes(np.full(count, height), np.full(count, width), config, random)
    assert [view.size for view in drawn] == [tuple(size) for size in sizes.tolist()]
    return drawn


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_sizes_are_the_published_ones(height, width):
    for short_side in (128, 333, 480, 512, 600, 800):
        for long_side in (None, 192, 1000, 1333):
            expected = published_size((width, height), short_side, long_side)
            assert resized_size(height, width, short_side, long_side) == expected


EXTREME_SIDES = (1, 2, 3, 7, 60, 333, 640, 1000, 1334, 7900, 65_500, 200_000_000)


@pytest.mark.parametrize("long_side", [1, 96, 1333, 1335])
@pytest.mark.parametrize("short_side", [1, 50, 800, 16384])
def test_no_side_is_longer_than_the_long_side_may_be(short_side, long_side):
    """The published size where that is within the bound, and always where the aspect ratio is below 2."""
    for height in EXTREME_SIDES:
        for width in EXTREME_SIDES:
            size = resized_size(height, width, short_side, long_side)
            assert 1 <= min(size) <= max(size) <= long_side
            published = published_size((width, height), short_side, long_side)
            if 0 < min(published) <= max(published) <= long_side:
                assert size == published
            else:
                assert max(height, width) >= 2 * min(height, width)
                assert min(size) == max(1, min(published))


def test_sizes_that_rounding_made_too_long():
    assert published_size((640, 200), 800, 1333) == (417, 1334)
    assert resized_size(200, 640, 800, 1333) == (417, 1333)
    assert resized_size(7900, 3, 800, 1333) == (1333, 1)
    assert resized_size(1, 200_000_000, 800, 1333) == (1, 1333)


@pytest.mark.parametrize("crop", [False, True])
def test_a_batch_with_a_strip_is_within_the_long_side(crop):
    """Also where a strip is resized to the short side of a crop first, which makes it 60 times 1000 pixels long."""
    config = DataConfig(
        short_sides=(48, 64), long_side=96, crop=crop, crop_resize_short_sides=(60,), crop_sizes=(48, 80)
    )
    samples = []
    for height, width in ((1, 1000), (1000, 1), (3, 250), (90, 120)):
        for view in training_views(height, width, config, 40):
            left, top, right, bottom = view.window_xyxy
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            samples.append(
                transforms.annotated_sample(black(height, width), view, entry(height, width, [], 1), CATEGORIES)
            )
    batch = collate(samples).batch()
    assert max(batch.images.shape[-2:]) <= 96
    assert batch.sizes.min() >= 1


def test_evaluation_sizes_of_common_coco_images():
    config = DataConfig()
    sizes = [views.evaluation_view(h, w, config).size for h, w in [(480, 640), (640, 480), (427, 640), (300, 1000)]]
    assert sizes == [(800, 1066), (1066, 800), (800, 1199), (400, 1333)]


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(("height", "width"), [(480, 640), (500, 375)])
def test_a_cropped_view_agrees_with_resize_crop_resize_flip(height, width, flipped):
    """The one resampling of a rectangle against the published chain of steps, for boxes and for pixels."""
    random = np.random.default_rng(1)
    corners = np.sort(random.uniform(-30, 670, (40, 2, 2)), axis=1).reshape(40, 4)
    given = torch.tensor(corners, dtype=torch.float64)
    # Twice the stored size, so that the crop's edges are whole stored pixels.
    first, (top, left, crop_height, crop_width) = (2 * height, 2 * width), (120, 180, 800, 566)
    size = resized_size(crop_height, crop_width, 608, 1333)

    image = tv_tensors.Image(torch.from_numpy(np.asarray(photograph(height, width)).copy()).permute(2, 0, 1))
    boxes = F.clamp_bounding_boxes(tv_tensors.BoundingBoxes(given, format="XYXY", canvas_size=(height, width)))
    for step in (
        lambda x: F.resize(x, list(first), antialias=True),
        lambda x: F.crop(x, top, left, crop_height, crop_width),
        lambda x: F.resize(x, list(size), antialias=True),
        lambda x: F.horizontal_flip(x) if flipped else x,
    ):
        image, boxes = step(image), step(boxes)
    boxes = F.clamp_bounding_boxes(boxes).as_subclass(torch.Tensor)
    expected_kept = (boxes[:, 2:] > boxes[:, :2]).all(1)
    relative = boxes[expected_kept] / torch.tensor([size[1], size[0]] * 2)

    view = views.View((left // 2, top // 2, (left + crop_width) // 2, (top + crop_height) // 2), size, flipped)
    boxes_cxcywh, kept = transforms.view_boxes(given, height, width, view)
    assert 5 < kept.sum() < 40
    assert kept.tolist() == expected_kept.tolist()
    torch.testing.assert_close(cxcywh_to_xyxy(boxes_cxcywh), relative.float(), atol=2e-6, rtol=0)

    pixels = transforms.view_pixels(pixels_of(photograph(height, width)), view, (height, width))
    assert pixels.shape == image.shape
    assert (pixels.float() - image.float()).abs().mean() < 1.0


@pytest.mark.parametrize(
    ("window_xyxy", "size"),
    [((0, 0, 400, 300), (150, 200)), ((0, 0, 400, 300), (480, 640)), ((31, 7, 390, 201), (291, 538))],
)
def test_a_rectangle_is_resampled_as_pil_does_after_a_crop(window_xyxy, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8))
    expected = np.array(image.crop(window_xyxy).resize(size[::-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    pixels = transforms.view_pixels(pixels_of(image), views.View(window_xyxy, size), (300, 400))
    difference = np.abs(pixels.numpy().astype(int) - expected)
    assert difference.max() <= 1
    assert difference.mean() < 0.1
    mirrored = transforms.view_pixels(pixels_of(image), views.View(window_xyxy, size, flipped=True), (300, 400))
    assert torch.equal(mirrored, pixels.flip(-1))


@pytest.mark.parametrize(
    ("size", "decoded"),
    [((896, 1200), (896, 1200)), ((225, 302), (896, 1200)), ((224, 300), (448, 600)), ((60, 80), (224, 300))],
)
def test_a_jpeg_is_decoded_smaller_where_that_does_not_show(size, decoded):
    data = encoded(photograph(896, 1200, coarse=12), "JPEG", quality=90)
    view = views.View((0, 0, 1200, 896), size)
    image = transforms.load_for(data, 896, 1200, view)
    assert image.shape == (*decoded, 3)
    full = transforms.view_pixels(transforms.load_image(data), view, (896, 1200))
    pixels = transforms.view_pixels(image, view, (896, 1200))
    assert (pixels.float() - full.float()).abs().mean() < 1


def test_a_crop_of_a_large_jpeg_is_decoded_at_the_size_that_the_crop_needs():
    photo = photograph(900, 1200, coarse=12)
    data = encoded(photo, "JPEG", quality=90)
    view = views.View((600, 300, 1200, 900), (150, 150))
    image = transforms.load_for(data, 900, 1200, view)
    assert image.shape == (450, 600, 3)
    pixels = transforms.view_pixels(image, view, (900, 1200))
    expected = np.array(photo.crop(view.window_xyxy).resize((150, 150), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    assert np.abs(pixels.numpy().astype(int) - expected).mean() < 1.5


def test_views_are_drawn_as_published():
    config = DataConfig()
    drawn = training_views(480, 640, config, 2000)
    assert abs(sum(view.flipped for view in drawn) / 2000 - 0.5) < 0.05
    whole = [view for view in drawn if view.window_xyxy == (0, 0, 640, 480)]
    assert abs(len(whole) / 2000 - 0.5) < 0.05
    assert {view.size[0] for view in whole} == set(config.short_sides)
    for view in drawn:
        left, top, right, bottom = view.window_xyxy
        assert 0 <= left < right <= 640
        assert 0 <= top < bottom <= 480
        assert min(view.size) <= 800
        assert max(view.size) <= 1333
    cropped = [view.window_xyxy for view in drawn if view.window_xyxy != (0, 0, 640, 480)]
    # After resizing to a short side s in 400..600 a crop is at least 384 of s pixels, so 0.64 of the side or more.
    assert min(bottom - top for _, top, _, bottom in cropped) >= 480 * 384 / 600
    assert len(set(cropped)) > 900


def test_without_crop_the_whole_image_is_seen():
    config = DataConfig(crop=False, flip_probability=0)
    drawn = training_views(480, 640, config, 200)
    assert all(view.window_xyxy == (0, 0, 640, 480) and not view.flipped for view in drawn)


def test_images_smaller_than_the_crop_are_kept_whole():
    config = DataConfig(crop_resize_short_sides=(100,), crop_sizes=(384, 600))
    for view in training_views(80, 80, config, 50):
        assert view.window_xyxy == (0, 0, 80, 80)


def test_boxes_of_a_sample_by_hand():
    """An overhanging box is clipped, one without area and a crowd are left out, labels follow sparse ids."""
    annotations = [
        {"id": 1, "bbox": [10, 20, 30, 40], "category_id": 56, "area": 1200, "iscrowd": 0},
        {"id": 2, "bbox": [90, 40, 30, 40], "category_id": 1, "area": 1200, "iscrowd": 0},
        {"id": 3, "bbox": [10, 10, 0, 5], "category_id": 1, "area": 0, "iscrowd": 0},
        {"id": 4, "bbox": [0, 0, 50, 50], "category_id": 23, "area": 2500, "iscrowd": 1},
    ]
    view = views.View((0, 0, 100, 80), (160, 200), flipped=True)
    sample = transforms.annotated_sample(black(80, 100), view, entry(80, 100, annotations, 9), CATEGORIES)
    expected = [[1 - 0.25, 0.5, 0.3, 0.5], [1 - 0.95, 0.75, 0.1, 0.5]]
    torch.testing.assert_close(sample.boxes_cxcywh, torch.tensor(expected))
    assert sample.labels.tolist() == [2, 0]
    assert sample.image.shape == (3, 160, 200)
    assert (sample.image_id, sample.original_size) == (9, (80, 100))


def test_an_empty_image_stays():
    view = views.View((0, 0, 10, 10), (20, 20))
    sample = transforms.annotated_sample(black(10, 10), view, entry(10, 10, [], 1), CATEGORIES)
    assert sample.boxes_cxcywh.shape == (0, 4)
    assert sample.labels.shape == (0,)


def test_prediction_sees_what_evaluation_sees():
    image = pixels_of(photograph(90, 120))
    config = DataConfig(validation_short_side=45)
    sample = transforms.evaluation_sample(image, config)
    view = views.evaluation_view(90, 120, config)
    expected = transforms.annotated_sample(image, view, entry(90, 120, [], 4), CATEGORIES)
    assert torch.equal(sample.image, expected.image)
    assert sample.original_size == (90, 120)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "RGBA", "LA", "1"])
def test_every_mode_becomes_rgb(mode):
    image = photograph(32, 48).convert(mode)
    file_format = "JPEG" if mode in ("L", "CMYK") else "PNG"
    options = {"quality": 95} if file_format == "JPEG" else {}
    pixels = transforms.load_image(encoded(image, file_format, **options))
    assert pixels.shape == (32, 48, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(float) - np.asarray(image.convert("RGB"), dtype=float)).mean() < 4


def test_sixteen_bit_grayscale_keeps_its_range():
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    pixels = transforms.load_image(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(pixels[..., 0], ramp >> 8)


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[274] = 6  # show rotated by a quarter turn
    assert transforms.load_image(encoded(photograph(30, 50), "JPEG", exif=exif)).shape == (30, 50, 3)


def test_an_oddity_in_a_jpeg_that_does_no_harm_is_read_over():
    data = encoded(photograph(64, 64), "JPEG")
    odd = data[:-2] + b"junk" + data[-2:]
    assert np.array_equal(transforms.load_image(odd), transforms.load_image(data))


def test_broken_files_are_refused():
    data = encoded(photograph(64, 64), "JPEG")
    with pytest.raises(ValueError, match="cannot be decoded"):
        transforms.load_image(data[: len(data) // 2])
    with pytest.raises(ValueError, match="not an image"):
        transforms.load_image(b"no picture at all")
