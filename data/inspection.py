"""Looking at one image of a set as the stream will: decoded, held against what is stated of it."""

from pathlib import Path

from .findings import Finding
from .images import SizeError, TooManyPixels, image_suffix, is_dark, load_image, read_file
from .sets import CocoImage


def inspect_file(image: CocoImage, path: Path, most_pixels: int) -> tuple[Finding | None, str | None, bytes]:
    """`inspect_image` of a file, and its bytes; none where it cannot be read."""
    try:
        data = read_file(path)
    except (OSError, ValueError) as error:
        return Finding("undecodable image", image.where, str(error)), None, b""
    return *inspect_image(image, data, most_pixels), data


def inspect_image(image: CocoImage, data: bytes, most_pixels: int) -> tuple[Finding | None, str | None]:
    """Decode an image file as the stream will. Returns (what is worth a word, the file's suffix in the shard).

    The suffix is None for an image that cannot be used.
    """
    stated = image.height, image.width
    try:
        pixels = load_image(data, most_pixels=most_pixels, stated=stated, orientation=image.orientation)
        finding = None
        if is_dark(data, pixels):
            what = f"16 bits, of which the upper ones are unused: its brightest pixel would be {pixels.max()} of 255"
            finding = Finding("dark image", image.where, what, "warning")
        return finding, image_suffix(data, most_pixels)
    except TooManyPixels as error:
        return Finding("too large image", image.where, str(error)), None
    except SizeError as error:
        return Finding("wrong size", image.where, str(error)), None
    except ValueError as error:
        return Finding("undecodable image", image.where, str(error)), None
