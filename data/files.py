"""Atomic writes: a file has its name only when all of it is on the disk. Checksums of files."""

import contextlib
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from .text import file_name


def write_whole(path: Path, data: bytes | Iterable[bytes]) -> None:
    """Write or replace a file. Raises OSError that names it; what had its name before is still there then.

    data: the content, or pieces of it.
    """
    with unfinished(path) as partial, partial.open("xb") as file:  # x: not through a link that another user left there
        file.writelines([data] if isinstance(data, bytes) else data)


@contextlib.contextmanager
def unfinished(path: Path, *, synced: bool = True) -> Iterator[Path]:
    """A context with a file to write, renamed to `path` after the block; a block that fails or deletes it leaves none.

    synced: it has that name only when it is on the disk, which takes milliseconds. Raises OSError that names `path`.
    """
    partial = path.with_name(file_name(f".{path.name}", f".{os.getpid()}.partial"))
    try:
        partial.unlink(missing_ok=True)
        yield partial
        if partial.exists():
            if synced:
                sync(partial)
            partial.replace(path)
    except OSError as error:
        if error.errno is not None and (error.filename is None or str(error.filename) == str(partial)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Return when a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
