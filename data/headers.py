"""The headers of a set's image files: read before anything else, by several processes, nothing decoded.

They say which files cannot be used, what size the others have, and whether a viewer shows them turned (EXIF).
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import Progress

from .images import Header, TooManyPixels, file_fault, image_header
from .parallel import ordered_map

_CHUNK = 64  # headers that a process reads at a time
_FEW = 2 * _CHUNK  # so few are read here: a process takes longer to start


def read_headers(
    folder: Path,
    names: Sequence[str],
    *,
    allow_outside: bool,
    most_pixels: int,
    workers: int,
    progress: Progress | None = None,
) -> list[Header | tuple[str, str]]:
    """Of each file in the folder its header, or why it cannot be used: (kind of finding, what).

    Raises FileNotFoundError without the folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; expected the images that the annotations name")
    read = partial(_read_header, folder.resolve(), allow_outside, most_pixels)
    if len(names) <= _FEW:
        return list(map(read, names))
    task = progress.add_task("reading headers", total=len(names)) if progress else None
    headers = []
    for header in ordered_map(read, names, workers=workers, chunk=_CHUNK):
        headers.append(header)
        if progress and task is not None:
            progress.advance(task)
    return headers


def _read_header(folder: Path, allow_outside: bool, most_pixels: int, name: str) -> Header | tuple[str, str]:
    if fault := file_fault(folder, name, allow_outside=allow_outside):
        return fault
    try:
        return image_header(folder / name, most_pixels)
    except TooManyPixels as error:
        return "too large image", str(error)
    except (OSError, ValueError) as error:
        return "undecodable image", str(error)
