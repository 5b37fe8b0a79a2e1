"""Shards of a remote source on a local disk: fetched once for all processes of a machine, within a limit of bytes.

A file has its name only when it is whole and its checksum right. Its name begins with the checksum, so folders and
versions of a set can share a cache. What was not used for longest is deleted when room is needed; who has such a file
open reads on. Locks are the kernel's (flock), so a killed process leaves none behind.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

from .config import DataConfig
from .index import INDEX_NAME, Shard, ShardIndex
from .sources import Source, SourceError, fetch, is_remote, source_of

log = logging.getLogger("ddetr")

ABANDONED_SECONDS = 24 * 3600  # after which half a shard that nobody fetches any more is deleted


class ShardCache:
    """The local copies of the shards of a source.

    limit_bytes: of all shards in the folder together, those of other sets included; those being fetched come on top.
    """

    def __init__(self, source: Source, folder: Path, limit_bytes: int, attempts: int) -> None:
        self._source, self._folder, self._limit_bytes, self._attempts = source, folder, limit_bytes, attempts
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, shard: Shard) -> int:
        """A descriptor of the shard's local copy, which is fetched when it is not there.

        Raises SourceError, naming shard and address, when that fails.
        """
        while True:
            path = self.ensure(shard)
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError:  # deleted in between, to make room for another
                continue

    def ensure(self, shard: Shard) -> Path:
        path = self._folder / f"{shard.sha256[:16]}-{shard.name}"
        if not self._touch(path):
            with _locked(path.with_suffix(".lock")):
                if not self._touch(path):
                    self._make_room(shard.bytes)
                    self._fetch(shard, path)
        return path

    def _touch(self, path: Path) -> bool:
        """Whether it is there; marks it as used now."""
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _fetch(self, shard: Shard, path: Path) -> None:
        unfinished = path.with_suffix(".partial")
        for last in (False, True):  # bytes may be damaged on their way, too
            with unfinished.open("ab") as file:
                begun = file.tell()
                if begun < shard.bytes:
                    fetch(self._source, shard.name, file.write, size=shard.bytes, offset=begun, attempts=self._attempts)
                file.flush()
                os.fsync(file.fileno())
            with unfinished.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    unfinished.rename(path)
                    return
            unfinished.unlink()
            if last:
                raise SourceError(
                    f"{self._source.address(shard.name)}: its checksum is not that of the index: the shard is damaged "
                    "or of another set. Copy the whole folder there again."
                )

    def _make_room(self, needed_bytes: int) -> None:
        with _locked(self._folder / "room.lock"):
            files = []
            for path in (*self._folder.glob("*.tar"), *self._folder.glob("*.partial")):
                with contextlib.suppress(FileNotFoundError):
                    stat = path.stat()
                    if path.suffix == ".tar":
                        files.append((stat.st_mtime, stat.st_size, path))
                    elif stat.st_mtime < time.time() - ABANDONED_SECONDS:
                        path.unlink()
            excess = sum(size for _, size, _ in files) + needed_bytes - self._limit_bytes
            for _, size, path in sorted(files):
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                path.with_suffix(".lock").unlink(missing_ok=True)
                excess -= size


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the kernel's lock of a file; a file deleted while we waited for it is another's no more, so try again."""
    while True:
        with path.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if _is_at(path, file):
                    yield
                    return
            finally:  # closing is not enough: a process forked meanwhile has the file open too
                fcntl.flock(file, fcntl.LOCK_UN)


def _is_at(path: Path, file: BinaryIO) -> bool:
    try:
        return path.stat().st_ino == os.fstat(file.fileno()).st_ino
    except FileNotFoundError:
        return False


def open_shards(location: str, config: DataConfig) -> ShardIndex:
    """The shards in a local folder, or wherever `data.train` and `data.validation` may say.

    Raises FileNotFoundError when there are none or they do not fit their index, ValueError for an unusable index, and
    SourceError when the source cannot be reached.
    """
    if not is_remote(location):
        return ShardIndex.load(location)
    source = source_of(location, config.fetch_timeout_seconds)
    text = bytearray()
    fetch(source, INDEX_NAME, text.extend, size=None, attempts=config.fetch_attempts)
    folder = Path(config.cache).expanduser()
    index = ShardIndex.parse(bytes(text), location, folder)
    index.check(source.sizes([shard.name for shard in index.shards]))
    if config.fetch == "samples":
        index.part = partial(_part, source, config.fetch_attempts)
        index.part(index.shards[0], 0, 512)  # whether the source gives parts of files at all
        return index
    total = sum(shard.bytes for shard in index.shards)
    if total > config.cache_bytes:
        log.warning(
            "%s: its shards are %.1f GiB, data.cache_bytes holds %.1f: each epoch fetches all of them anew. "
            "Set data.cache_bytes=%d, or data.fetch=samples, which reads only what each rank needs.",
            *(location, total / 2**30, config.cache_bytes / 2**30, total),
        )
    cache = ShardCache(source, folder, config.cache_bytes, config.fetch_attempts)
    index.open, index.fetch = cache.open, cache.ensure
    return index


def _part(source: Source, attempts: int, shard: Shard, begin: int, end: int) -> bytes:
    data = bytearray()
    fetch(source, shard.name, data.extend, size=shard.bytes, offset=begin, end=end, attempts=attempts)
    return bytes(data)
