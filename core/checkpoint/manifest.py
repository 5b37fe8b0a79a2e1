"""What makes a folder a checkpoint: written aside, synced, listed with sizes and checksums, and only then named.

A folder with the name of a step is therefore whole, wherever the process was killed; `latest` names the newest one.
"""

import errno
import hashlib
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ...data.documents import as_json, parse_json
from ...data.text import LONGEST_FILE_NAME, visible
from ...data.values import described, is_number, member, whole

log = logging.getLogger("ddetr")

MANIFEST = "checkpoint.json"
LATEST = "latest"
EVALUATION = "evaluation.json"
_VERSION = 2  # what of a checkpoint is listed: codec.py


def write_checkpoint(final: Path, needed_bytes: int, write: Callable[[Path], None], values: Mapping[str, Any]) -> None:
    """Let `write` fill a folder, and name it `final` when it is on the disk.

    needed_bytes: about what it will hold. values: kept in the manifest. Raises OSError when there is no room or it
    cannot be written; no checkpoint is touched then.
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
            _sync(path)
        files = {path.name: _digest(path) for path in written}
        text = as_json({"version": _VERSION, **values, "files": files}, indent=1)
        _write(unfinished / MANIFEST, text)
        _sync(unfinished)
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
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)
    _replace(final.parent / LATEST, final.name + "\n")


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are all there, each of its size.

    Raises ValueError that names what is missing or cut.
    """
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise ValueError(f"{checkpoint}: no {MANIFEST} in it, so it can be evaluated but not resumed")
    try:
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
    """As `read_manifest`, with every byte of the files compared with its checksum."""
    values = read_manifest(checkpoint)
    for name, entry in values["files"].items():
        if _digest(checkpoint / name) != entry:
            raise ValueError(damaged(checkpoint, f"the checksum of {name} is wrong"))
    return values


def is_evaluated(checkpoint: Path) -> bool:
    return (checkpoint / EVALUATION).is_file()


def record_evaluation(checkpoint: Path, metrics: Mapping[str, float]) -> None:
    _replace(checkpoint / EVALUATION, as_json(dict(metrics)))


def prune(checkpoints: Iterable[Path], keep: int) -> list[Path]:
    """Delete all but the newest `keep` checkpoints (0: none) and the one with the best AP; returns the deleted.

    checkpoints: oldest first. One whose evaluation cannot be read stays, too: it may be the best.
    """
    checkpoints = list(checkpoints)
    scores = {path: _average_precision(path) for path in checkpoints}
    unread = [path for path in checkpoints if scores[path] == math.inf]
    evaluated = [path for path in checkpoints if 0 <= scores[path] < math.inf]
    kept = {*unread, *sorted(evaluated, key=lambda path: scores[path], reverse=True)[:1]}
    surplus = [path for path in checkpoints[:-keep] if path not in kept] if keep else []
    for path in surplus:
        unnamed = path.with_name(f".{path.name}")  # at once no checkpoint any more, however long deleting takes
        path.rename(unnamed)
        shutil.rmtree(unnamed, ignore_errors=True)  # somebody may be reading it; the next save tries again
    return surplus


def _average_precision(checkpoint: Path) -> float:
    """-1 where it was not evaluated or met numbers that are not finite, infinity where that cannot be read."""
    path = checkpoint / EVALUATION
    try:
        scores = parse_json(path.read_bytes()) if path.is_file() else {"AP": None}
        if not isinstance(scores, dict) or "AP" not in scores:
            raise ValueError("it has no 'AP'")
        score = scores["AP"]
        if score is None or score != score:  # NaN, as earlier versions wrote it
            return -1.0
        if not is_number(score):
            raise ValueError(f"'AP' is {described(score)}")
        return float(score)
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s): its checkpoint is kept", path, visible(str(error)))
        return math.inf


def damaged(checkpoint: Path, what: str) -> str:
    """One message for all that can be wrong with a checkpoint's files."""
    return (
        f"{checkpoint} is damaged: {what}. Move it away, to {checkpoint.name}.damaged, say; the run then resumes from "
        f"the checkpoint before it"
    )


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        checksum = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": checksum}


def _write(path: Path, text: str) -> None:
    with path.open("x") as file:  # x: not through a link that a stranger left there
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _replace(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}")
    unfinished.unlink(missing_ok=True)
    _write(unfinished, text)
    unfinished.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
