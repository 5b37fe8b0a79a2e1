"""Images that state more than they should, are no files, or are opened past PIL's own limit."""

import io
import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from ddetr.data.images import TooManyPixels, image_header, load_image, read_file
from PIL import Image

from tests.data.test_transforms import encoded, photograph

SIDE = 65500


def png(height: int, width: int, rows: bytes = b"", depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that states a size, whatever `rows` hold."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 1)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg(height: int, width: int, progressive: bool = False) -> bytes:
    data = bytearray(encoded(photograph(16, 16), "JPEG", progressive=progressive))
    at = data.index(b"\xff\xc2" if progressive else b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def cmyk(height: int, width: int) -> bytes:
    data = bytearray(encoded(photograph(16, 16).convert("CMYK"), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def gif(height: int, width: int) -> bytes:
    """The screen is small; its only frame, which is disposed of, is not."""
    data = bytearray(encoded(photograph(16, 16).convert("P"), "GIF"))
    at = data.rindex(b"\x2c", 0, data.index(b"\x2c\x00\x00\x00\x00") + 1)
    control = b"\x21\xf9\x04\x08\x00\x00\x00\x00"
    data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(data[:at] + control + data[at:])


def bmp(height: int, width: int) -> bytes:
    data = bytearray(encoded(photograph(16, 16), "BMP"))
    data[18:26] = struct.pack("<ii", width, height)
    return bytes(data)


def tiff(height: int, width: int, first_tag: int = 256) -> bytes:
    """256 and 257 state the size of the image, 322 and 323 of a tile."""
    size = {first_tag: width, first_tag + 1: height}
    tags = {256: 16, 257: 16, 258: 8, 259: 5, 262: 1, 277: 1, **size}
    tags |= {324: 8, 325: 100} if first_tag == 322 else {273: 8, 278: height, 279: 100}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags.items()))
    return b"II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(tags)) + entries + bytes(104)


def webp(height: int, width: int) -> bytes:
    """The extended header with a canvas of the stated size, around a small image."""
    image = encoded(photograph(16, 16), "WEBP")[12:]
    canvas = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + canvas + image
    return b"RIFF" + struct.pack("<I", len(body)) + body


def lossless_webp(height: int, width: int) -> bytes:
    data = bytearray(encoded(photograph(16, 16), "WEBP", lossless=True))
    at = data.index(b"VP8L") + 9
    data[at : at + 4] = struct.pack("<I", (width - 1) | (height - 1) << 14)
    return bytes(data)


BOMBS = {
    "jpeg": jpeg(SIDE, SIDE),
    "progressive jpeg": jpeg(SIDE, SIDE, progressive=True),
    "cmyk jpeg": cmyk(SIDE, SIDE),
    "png": png(SIDE, SIDE),
    "16-bit png": png(SIDE, SIDE, depth=16, colour=0),
    "gif": gif(SIDE, SIDE),
    "bmp": bmp(SIDE, SIDE),
    "tiff": tiff(SIDE, SIDE),
    "tiff of one tile": tiff(SIDE, SIDE, first_tag=322),
    "webp": webp(16383, 16383),
    "lossless webp": lossless_webp(16383, 16383),
    "ppm": b"P6 65500 65500 255\n" + bytes(100),
}


@pytest.mark.integration
def test_headers_that_state_too_many_pixels_are_refused_before_anything_is_decoded(tmp_path):
    """In a process that may have 512 MiB more memory than it has: a decoder would need gigabytes."""
    for name, data in BOMBS.items():
        assert len(data) < 3000
        (tmp_path / name).write_bytes(data)
    program = (
        "import sys, resource, warnings; from pathlib import Path; warnings.simplefilter('error');"
        "from ddetr.data.images import TooManyPixels, image_header, load_image;"
        "held = int(Path('/proc/self/statm').read_text().split()[0]) * 4096;"
        "resource.setrlimit(resource.RLIMIT_AS, (held + (512 << 20), held + (512 << 20)))\n"
        "for file in Path(sys.argv[1]).iterdir():\n"
        "    for read in (lambda: load_image(file.read_bytes(), (8, 8)), lambda: image_header(file)):\n"
        "        try: read()\n"
        "        except TooManyPixels as error: print(file.name, error)\n"
        "        except Exception as error: print(file.name, 'BUT', error)\n"
    )
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60)
    told = result.stdout.splitlines()
    assert result.returncode == 0, result.stderr
    assert len(told) == 2 * len(BOMBS)
    assert [line for line in told if "data.most_pixels=250000000" not in line] == []


def test_the_limit_holds_for_reduced_decodes_and_can_be_raised():
    data = encoded(photograph(300, 400), "JPEG")
    with pytest.raises(TooManyPixels, match=r"states 400 x 300 pixels, more than data.most_pixels=119999"):
        load_image(data, (10, 10), most_pixels=119_999)
    assert load_image(data, (10, 10), most_pixels=120_000).shape == (38, 50, 3)
    with pytest.raises(ValueError, match="the json says 300 x 400, the file holds 400 x 300"):
        load_image(data, stated=(400, 300))


def test_pils_own_limit_neither_stops_nor_warns_nor_changes(monkeypatch):
    """Its limit is 1,000 pixels here: it would warn beyond, and refuse beyond 2,000."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in (encoded(photograph(100, 100), name) for name in ("PNG", "GIF", "WEBP", "TIFF", "BMP")):
            assert load_image(data).shape == (100, 100, 3)
            with pytest.raises(TooManyPixels):
                load_image(data, most_pixels=9_999)
    assert Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.slow
@pytest.mark.parametrize(("depth", "colour", "channels"), [(16, 0, 1), (8, 2, 3)])
def test_an_image_at_the_limit_takes_little_more_than_itself(depth, colour, channels):
    height, width = 16_000, 15_600
    program = (
        "import sys, resource; from ddetr.data.images import load_image;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "pixels = load_image(sys.stdin.buffer.read());"
        "print(*pixels.shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    data = png(height, width, bytes(height * (1 + width * channels * depth // 8)), depth, colour)
    result = subprocess.run([sys.executable, "-c", program], input=data, capture_output=True, timeout=300)
    assert result.returncode == 0, result.stderr
    shape, peak = result.stdout.split()[:3], int(result.stdout.split()[3])
    assert shape == [b"16000", b"15600", b"3"]
    assert peak < 8 * height * width


def test_bands_of_a_large_image_are_those_of_a_small_one(monkeypatch):
    images = [
        np.random.default_rng(0).integers(0, 65535, (50, 70), dtype=np.uint16),
        np.asarray(photograph(50, 70).convert("P")),
        np.asarray(photograph(50, 70)),
    ]
    for data in (encoded(Image.fromarray(image), "PNG") for image in images):
        whole = load_image(data)
        with monkeypatch.context() as patched:
            patched.setattr("ddetr.data.images._BAND_PIXELS", 70 * 8)
            assert np.array_equal(load_image(data), whole)


def test_postscript_is_not_run():
    with pytest.raises(ValueError, match="not an image in a known format"):
        load_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")


def test_only_ordinary_files_are_read(tmp_path: Path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    for name in ("pipe.jpg", "device.jpg", "."):
        for read in (read_file, image_header):
            with pytest.raises(OSError, match="not an ordinary file"):
                read(tmp_path / name)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_file", lambda path: True)  # it was one, and is replaced before it is opened
        with pytest.raises(OSError, match=r"pipe.jpg: not an ordinary file"):
            read_file(tmp_path / "pipe.jpg")
    (tmp_path / "large.jpg").write_bytes(bytes(100))
    with pytest.raises(ValueError, match=r"large.jpg: the file has more than 99 bytes"):
        read_file(tmp_path / "large.jpg", 99)
    assert read_file(tmp_path / "large.jpg", 100) == bytes(100)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "TGA", "PCX", "SGI"])
def test_usual_and_old_formats_are_read(format: str) -> None:
    pixels = (np.arange(40 * 30 * 3).reshape(30, 40, 3) // 1200 * 83).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **({"lossless": True} if format == "WEBP" else {}))
    assert (load_image(file.getvalue()) == pixels).all()
