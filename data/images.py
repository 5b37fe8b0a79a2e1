"""Untrusted image files: read, looked at and decoded within limits.

What a header states is held against a limit before a byte of it is decoded: a few hundred bytes can state 65500 x 65500
pixels, which would take 12 GiB.
"""

import contextlib
import io
import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from .config import MOST_PIXELS
from .text import visible

# What photographs and drawings are stored in. Of PIL's other formats one (EPS) would be run, by Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "DIB", "GIF", "PPM", "JPEG2000", "AVIF", "TGA", "PCX", "SGI")
MOST_FILE_BYTES = 1 << 30  # of an image file, and of any other that is read at once
_BAND_PIXELS = 1 << 24  # converted to RGB at a time, so that a large image is not in memory several times
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # tags of a TIFF
_ORIENTATION = 0x0112  # tag of EXIF
_DARKEST = 63  # of 255: what 14 of 16 bits reach

Result = TypeVar("Result")

_pil_limit = threading.Lock()
# A process forked while another thread holds the lock would wait for it for ever.
os.register_at_fork(before=_pil_limit.acquire, after_in_parent=_pil_limit.release, after_in_child=_pil_limit.release)


class SizeError(ValueError):
    """An image whose header states another size than it should."""


class DepthError(ValueError):
    """An image of floats or 32-bit integers, of which nothing says which are black and white."""


class TooManyPixels(SizeError):
    """An image whose header states more pixels than the limit."""


@dataclass(frozen=True)
class Header:
    """What an image file states. height, width: of the stored pixels. orientation: 1 to 8, as EXIF has it.

    A viewer shows the pixels turned and mirrored by the orientation; 1 means as they are stored, 5 to 8 a quarter turn.
    was_turned: PIL has already applied the orientation (TIFF), so the stored pixels are not available. exif_fault: why
    EXIF, and with it the orientation, cannot be read.
    """

    height: int
    width: int
    orientation: int = 1
    was_turned: bool = False
    exif_fault: str = ""

    @property
    def shown_size(self) -> tuple[int, int]:
        """(height, width) of the picture as a viewer shows it."""
        return turned_size(self.height, self.width, self.orientation)


def turned_size(height: int, width: int, orientation: int) -> tuple[int, int]:
    """(height, width) of pixels (height, width) after `turned`. The function is its own inverse."""
    return (width, height) if orientation >= 5 else (height, width)


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels (height, width, 3) as a viewer shows them (EXIF 2.32, tag 0x0112)."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation in (3, 4, 7, 8) else None)
    columns = slice(None, None, -1 if orientation in (2, 3, 6, 7) else None)
    return np.ascontiguousarray(pixels[rows, columns])


def load_image(
    data: bytes,
    smallest: tuple[float, float] = (np.inf, np.inf),
    *,
    most_pixels: int = MOST_PIXELS,
    stated: tuple[int, int] | None = None,
    orientation: int = 1,
) -> np.ndarray:
    """Decode any image file (grayscale, palette, CMYK, 16-bit, ...) to (height, width, 3) uint8 RGB.

    orientation: by which the stored pixels are turned (`turned`), whatever the file says of it. smallest, stated and
    the result are of the turned picture.
    A JPEG may come at half its size or less, no smaller than `smallest`, (height, width); by default at its full size.
    most_pixels: as data.most_pixels. stated: the (height, width) that it must have.
    Raises SizeError, and ValueError for data that is no image or is cut short.
    """
    if orientation != 1:
        swap = orientation >= 5
        stored = turned_size(*stated, orientation) if stated else None
        data_smallest = (smallest[1], smallest[0]) if swap else smallest
        return turned(load_image(data, data_smallest, most_pixels=most_pixels, stated=stored), orientation)
    if data.startswith(b"\xff\xd8"):
        # What libjpeg-turbo objects to, PIL judges below: it reads on over harmless oddities, and says what is wrong.
        header = None
        with contextlib.suppress(ValueError):
            header = simplejpeg.decode_jpeg_header(data)
        if header and header[2] not in ("CMYK", "YCCK"):
            height, width = int(header[0]), int(header[1])
            _check_size(height, width, most_pixels, stated)
            least_height, least_width = min(smallest[0], height), min(smallest[1], width)
            with contextlib.suppress(ValueError):
                return simplejpeg.decode_jpeg(
                    data, min_height=int(least_height), min_width=int(least_width), min_factor=2
                )

    def decode(image: Image.Image) -> np.ndarray:
        _check_depth(image)
        _check_size(image.height, image.width, most_pixels, stated)
        # PIL looks again at the size of a TIFF, and at that of a band.
        again = image.format == "TIFF" or image.width * image.height > _BAND_PIXELS
        with _pil_allows(most_pixels) if again else contextlib.nullcontext():
            image.load()
            return _rgb(image)

    return _opened(io.BytesIO(data), most_pixels, decode)


def load_upright(data: bytes, *, most_pixels: int = MOST_PIXELS) -> np.ndarray:
    """The picture as a viewer shows it: `load_image` turned by the orientation in the file."""
    pixels = load_image(data, most_pixels=most_pixels)
    orientation, _ = _opened(io.BytesIO(data), most_pixels, _orientation)  # a viewer, too, shows it as stored if broken
    return turned(pixels, orientation)


def image_header(path: Path, most_pixels: int = MOST_PIXELS) -> Header:
    """What an image file states; nothing is decoded. Raises as `load_image`, and OSError."""

    def header(image: Image.Image) -> Header:
        _check_depth(image)
        was_turned = image.format == "TIFF" and getattr(image, "tag_v2", {}).get(_ORIENTATION, 1) in range(2, 9)
        orientation, exif_fault = _orientation(image)
        return Header(image.height, image.width, orientation, was_turned, exif_fault)

    with open_file(path) as file:
        return _opened(file, most_pixels, header)


def is_dark(data: bytes, pixels: np.ndarray) -> bool:
    """Whether `pixels` are nearly black because their 16-bit file uses the lower bits alone."""
    return int(pixels.max(initial=0)) <= _DARKEST and _opened(io.BytesIO(data), 2 * pixels.size, _is_deep)


def image_suffix(data: bytes, most_pixels: int = MOST_PIXELS) -> str:
    """The suffix by content, as WebDataset's readers know it."""
    name = _opened(io.BytesIO(data), most_pixels, lambda image: (image.format or "img").lower())
    return {"jpeg": "jpg", "mpo": "jpg"}.get(name, name)


def open_file(path: Path) -> BinaryIO:
    """An ordinary file, opened to read. Raises OSError for a pipe, which would wait for a writer, or a device."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: not an ordinary file")
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # replaced since
        os.close(descriptor)
        raise OSError(f"{path}: not an ordinary file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, most_bytes: int = MOST_FILE_BYTES) -> bytes:
    """The bytes of an ordinary file. Raises OSError as `open_file`, and ValueError when they are more than that."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(size + 1) if size <= most_bytes else None
    if data is None or len(data) > most_bytes:
        raise ValueError(f"{path}: the file has more than {most_bytes} bytes")
    return data


def file_fault(folder: Path, name: str, *, allow_outside: bool = False) -> tuple[str, str] | None:
    """Why the file called `name` in a folder is not to be read: (kind of finding, what); None for one that is.

    folder: resolved. A name with .. or a link may lead out of it to any file of this machine.
    """
    try:
        place = os.path.realpath(folder / name)
        if not allow_outside and not Path(place).is_relative_to(folder):
            return "outside image", f"{name} is {place}, outside {folder}"
        mode = os.stat(place).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "missing image", f"no file {name} in {folder}"
    except (OSError, ValueError) as error:  # a name that no file can have
        return "missing image", f"no file {name} in {folder} ({error})"
    return None if stat.S_ISREG(mode) else ("not a file", f"{place} is a folder, a pipe or a device")


def _opened(file: BinaryIO, most_pixels: int, use: Callable[[Image.Image], Result]) -> Result:
    """What `use` makes of the image, which is not decoded yet. What goes wrong in PIL is a ValueError."""
    try:
        _check_size(*_canvas(file.read(30)), most_pixels)
        file.seek(0)
        with _pil_allows(most_pixels):
            image = Image.open(file, formats=FORMATS)
        with image:
            _check_size(image.height, image.width, most_pixels)
            if image.format == "TIFF":  # a tile is decoded whole, however little of it belongs to the image
                tags = getattr(image, "tag_v2", {})
                _check_size(tags.get(_TILE_LENGTH, 0), tags.get(_TILE_WIDTH, 0), most_pixels)
            return use(image)
    except UnidentifiedImageError:
        raise ValueError(f"not an image in a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:  # of formats whose size PIL looks at itself
        raise TooManyPixels(f"the image states far more pixels than data.most_pixels={most_pixels}") from None
    except (SizeError, DepthError):
        raise
    except Exception as error:  # PIL's readers raise whatever they stumble over in a broken file
        raise ValueError(f"the image cannot be decoded: {visible(str(error) or repr(error))}") from error


def _canvas(head: bytes) -> tuple[int, int]:
    """(height, width) of a WebP, whose decoder makes room for it as soon as it is opened; (0, 0) of anything else."""
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    if head[12:16] == b"VP8X":
        return 1 + int.from_bytes(head[27:30], "little"), 1 + int.from_bytes(head[24:27], "little")
    if head[12:16] == b"VP8L":
        sides = int.from_bytes(head[21:25], "little")
        return 1 + (sides >> 14 & 0x3FFF), 1 + (sides & 0x3FFF)
    return int.from_bytes(head[28:30], "little") & 0x3FFF, int.from_bytes(head[26:28], "little") & 0x3FFF


def _check_size(height: int, width: int, most_pixels: int, stated: tuple[int, int] | None = None) -> None:
    if height * width > most_pixels:
        raise TooManyPixels(
            f"the image states {width} x {height} pixels, more than data.most_pixels={most_pixels} allows; "
            "if it is meant to be so large, raise it"
        )
    if stated is not None and (height, width) != stated:
        raise SizeError(f"the json says {stated[1]} x {stated[0]}, the file holds {width} x {height} pixels")


def _check_depth(image: Image.Image) -> None:
    layouts = _layouts(image)
    if image.mode == "F" or any(layout.startswith("I;32") for layout in layouts):
        kind = "floating-point numbers" if image.mode == "F" else "integers of 32 bits"
        raise DepthError(
            f"the image holds {kind}, and nothing says which of them are black and white; save it with 8 or 16 bits"
        )


def _is_deep(image: Image.Image) -> bool:
    return any(";16" in layout for layout in _layouts(image))


def _layouts(image: Image.Image) -> list[str]:
    """How the parts of the file hold their pixels, in PIL's words: `I;16B`, `RGB;16B`, ..."""
    firsts = (tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3] for tile in getattr(image, "tile", ()))
    return [first for first in firsts if isinstance(first, str)]


def _orientation(image: Image.Image) -> tuple[int, str]:
    """(orientation of the stored pixels as PIL gives them, why EXIF does not tell it). It turns a TIFF itself."""
    if image.format == "TIFF":
        return 1, ""
    try:
        orientation = image.getexif().get(_ORIENTATION)
        if orientation is None and isinstance(exif := image.info.get("exif"), bytes):
            Image.Exif().load(exif)  # on opening some formats, PIL takes what it cannot read for nothing
    except (SyntaxError, struct.error, ValueError, LookupError, OSError) as error:  # of PIL's parser, for broken EXIF
        return 1, visible(str(error))
    return (orientation if isinstance(orientation, int) and 1 <= orientation <= 8 else 1), ""


def _rgb(image: Image.Image) -> np.ndarray:
    """(height, width, 3) uint8, converted in bands."""
    rows = max(1, _BAND_PIXELS // image.width)
    if rows >= image.height:
        return np.array(_rgb_band(image))
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        pixels[top:bottom] = _rgb_band(image.crop((0, top, image.width, bottom)))
    return pixels


def _rgb_band(image: Image.Image) -> np.ndarray:
    if image.mode.startswith("I"):  # 16-bit grayscale, which PIL would saturate at 255
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, axis=-1)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


@contextlib.contextmanager
def _pil_allows(pixels: int) -> Iterator[None]:
    """A context, for one thread at a time, in which PIL neither warns of nor refuses so many pixels.

    PIL's own limit is one for the whole process: it warns beyond it, and refuses beyond twice as many. Other warnings
    are silent as well: they name no file, and the error says the same if the image cannot be decoded.
    """
    with _pil_limit, warnings.catch_warnings(action="ignore"):
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, 2 * pixels
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
