"""Image files of a stranger, of every format: pixels of the stated size, or refused within limits."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
from ddetr.data.images import FORMATS, image_header, image_suffix, load_image
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_transforms import photograph
from tests.fuzz.strategies import DAMAGES, Damage, Effort, damaged, outcome, watched

MOST_PIXELS = 1 << 20


def _files() -> dict[str, bytes]:
    """Small valid files of every format that this PIL writes, in several modes."""
    color = photograph(24, 17)
    images = {"color": color, "gray": color.convert("L"), "palette": color.convert("P"), "bits": color.convert("1")}
    images |= {"alpha": color.convert("RGBA"), "cmyk": color.convert("CMYK")}
    images |= {"deep": Image.fromarray(np.arange(24 * 17, dtype=np.uint16).reshape(24, 17) * 160)}
    kinds: list[tuple[str, str, dict[str, Any]]] = [
        *(("JPEG", mode, {}) for mode in ("color", "gray", "cmyk")),
        ("JPEG", "color", {"progressive": True}),
        *(("PNG", mode, {}) for mode in ("color", "gray", "palette", "bits", "alpha", "deep")),
        ("WEBP", "color", {}),
        ("WEBP", "alpha", {"lossless": True}),
        *(("TIFF", mode, {}) for mode in ("color", "deep", "bits")),
        *(("TIFF", "color", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg")),
        ("TIFF", "bits", {"compression": "group4"}),
        *(("BMP", mode, {}) for mode in ("color", "palette", "bits")),
        ("DIB", "color", {}),
        ("GIF", "palette", {}),
        ("GIF", "palette", {"save_all": True, "append_images": [photograph(24, 17).convert("P")]}),
        *(("PPM", mode, {}) for mode in ("color", "gray", "bits")),
        ("JPEG2000", "color", {}),
        ("AVIF", "color", {}),
        *(("TGA", mode, {"compression": rle}) for mode in ("color", "palette") for rle in (None, "tga_rle")),
        *(("PCX", mode, {}) for mode in ("color", "palette", "bits")),
        *(("SGI", mode, {}) for mode in ("color", "gray")),
    ]
    found = {}
    for format, mode, options in kinds:
        file = io.BytesIO()
        images[mode].save(file, format, **{key: value for key, value in options.items() if value is not None})
        found[f"{format} {mode} {options or ''}"] = file.getvalue()
    return found


FILES = _files()


def test_there_is_a_file_of_every_format() -> None:
    assert {name.split()[0] for name in FILES} == set(FORMATS)
    for name, data in FILES.items():
        assert load_image(data, most_pixels=MOST_PIXELS).shape == (24, 17, 3), name


def assert_image_is_sound(data: bytes, file: Path) -> None:
    file.write_bytes(data)
    with watched():
        header = outcome(lambda: image_header(file, MOST_PIXELS))
        pixels = outcome(lambda: load_image(data, most_pixels=MOST_PIXELS))
        small = outcome(lambda: load_image(data, (8, 8), most_pixels=MOST_PIXELS))
        suffix = outcome(lambda: image_suffix(data, MOST_PIXELS))
    if pixels is not None:
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 3
        assert pixels.shape[2] == 3
        assert 0 < pixels.shape[0] * pixels.shape[1] <= MOST_PIXELS
        assert header is None or pixels.shape[:2] == (header.height, header.width)
        assert outcome(lambda: load_image(data, most_pixels=MOST_PIXELS, stated=pixels.shape[:2])) is not None
    if small is not None and pixels is not None:
        assert all(
            least <= side for least, side in zip(np.minimum((8, 8), pixels.shape[:2]), small.shape[:2], strict=True)
        )
    if header is not None:
        assert all(type(side) is int and side > 0 for side in (header.height, header.width))
        assert header.height * header.width <= MOST_PIXELS
        assert header.orientation in range(1, 9)
    assert suffix is None or suffix.isalnum()


def test_a_damaged_image_is_of_its_stated_size_or_refused(effort: Effort, tmp_path: Path) -> None:
    def holds(name: str, damage: Damage) -> None:
        assert_image_is_sound(damaged(FILES[name], damage), tmp_path / "image")

    effort(holds, st.sampled_from(sorted(FILES)), DAMAGES)


NUMBERS = [*(struct.pack(order + "I", value) for order in "<>" for value in (0, 1, 2, 1 << 16, 1 << 31, (1 << 32) - 1))]
NUMBERS += [struct.pack(order + "H", value) for order in "<>" for value in (0, 1, 255, 256, 32767, 65535)]


def test_numbers_of_a_header_are_believed_within_limits(effort: Effort, tmp_path: Path) -> None:
    """Sizes, counts and offsets of everything, at the start of the file."""

    def holds(name: str, numbers: list[tuple[int, bytes]]) -> None:
        data = bytearray(FILES[name])
        for at, number in numbers:
            data[at : at + len(number)] = number
        assert_image_is_sound(bytes(data), tmp_path / "image")

    number = st.tuples(st.integers(0, 200), st.sampled_from(NUMBERS))
    effort(holds, st.sampled_from(sorted(FILES)), st.lists(number, min_size=1, max_size=4))


def test_noise_is_no_image_or_one_within_limits(effort: Effort, tmp_path: Path) -> None:
    heads = sorted({data[:length] for data in FILES.values() for length in (0, 2, 4, 12, 30)})

    def holds(head: bytes, noise: bytes) -> None:
        assert_image_is_sound(head + noise, tmp_path / "image")

    effort(holds, st.sampled_from(heads), st.binary(max_size=300))
