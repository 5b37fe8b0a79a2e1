"""Atomic checkpoints: a folder is written aside, synced, listed with sizes and checksums, and only then renamed.

A folder with the name of a step is therefore whole, whenever the process was killed; `latest` names the newest one.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...data.documents import as_json, parse_json
from ...data.files import sync, write_whole
from ...data.text import LONGEST_FILE_NAME, visible
from ...data.values import described, member, whole

MANIFEST = "checkpoint.json"
LATEST = "latest"
_MOST_BYTES = 16 << 20  # a name of every parameter, a hundred times
_VERSION = 2  # of the manifest's fields, which codec.py reads


def write_checkpoint(final: Path, needed_bytes: int, write: Callable[[Path], None], values: Mapping[str, Any]) -> None:
    """Let `write` fill a folder, and rename it to `final` when it is on the disk.

    needed_bytes: about what it will hold. values: kept in the manifest. Raises OSError when there is no room or it
    cannot be written; checkpoints that are there stay unchanged then.
    """
    unfinished, replaced = final.with_name(f".{final.name}"), final.with_name(f".{final.name}.replaced")
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(".step_*"):  # of saves that were killed
        leftover.unlink() if leftover.is_symlink() else shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(final.parent).free
    if free < needed_bytes:
        raise OSError(
            errno.ENOSPC,
            f"no room for a checkpoint of {needed_bytes / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; make "
            f"room there, or set train.keep_checkpoints",
            str(final),
        )
    try:
        unfinished.mkdir()
        write(unfinished)
        written = sorted(unfinished.iterdir())
        for path in written:
            sync(path)
        files = {path.name: _digest(path) for path in written}
        text = as_json({"version": _VERSION, **values, "files": files}, indent=1)
        _replace(unfinished / MANIFEST, text)
        if final.exists():  # the same step once more, after a resume from before it
            final.rename(replaced)
        unfinished.rename(final)
    except SafetensorError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OSError(errno.EIO, f"the checkpoint cannot be written ({error})", str(final)) from error
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        if replaced.exists():
            replaced.rename(final)
        raise
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _replace(final.parent / LATEST, final.name + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest, and check that all its files are there, each with its size.

    Raises ValueError that names what is missing, truncated or wrong.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"{checkpoint}: no {MANIFEST} in it, so it can be evaluated but not resumed")
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES} bytes")
        values = parse_json(path.read_bytes())
        if not 1 <= (version := whole(values, "version")) <= _VERSION:
            raise ValueError(f"version {version}, this release reads 1 to {_VERSION}")
        files = member(values, "files", dict)
        for name in files:
            if Path(name).name != name or name != visible(name) or len(name.encode()) > LONGEST_FILE_NAME:
                raise ValueError(f"{described(name)} is no file name")
        sizes = {name: whole(entry, "bytes") for name, entry in files.items()}
    except ValueError as error:
        raise ValueError(f"{path}: not a usable manifest ({visible(str(error))})") from error
    for name, expected in sizes.items():
        size = (checkpoint / name).stat().st_size if (checkpoint / name).is_file() else None
        if size != expected:
            what = "is missing" if size is None else f"has {size} bytes instead of {expected}"
            raise ValueError(damaged(checkpoint, f"{name} {what}"))
    return values


def verify(checkpoint: Path) -> dict[str, Any]:
    """As `read_manifest`; also compares every file with its SHA-256 checksum."""
    values = read_manifest(checkpoint)
    for name, entry in values["files"].items():
        if _digest(checkpoint / name) != entry:
            raise ValueError(damaged(checkpoint, f"the checksum of {name} is wrong"))
    return values


def damaged(checkpoint: Path, what: str) -> str:
    """The message for anything wrong with a checkpoint's files, with the way out."""
    return (
        f"{checkpoint} is damaged: {what}. Move it away, to {checkpoint.name}.damaged, say; the run then resumes from "
        f"the checkpoint before it"
    )


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": checksum}


def _replace(path: Path, text: str) -> None:
    write_whole(path, text.encode())
    sync(path.parent)
