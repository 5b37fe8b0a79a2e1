"""Shards of a remote source on a local disk: fetched once for all processes of a machine, within a limit of bytes.

A file has its name only when it is whole and its checksum right. The name is the checksum, so folders and versions of a
set can share a cache, and no source has a say in what a file is called. The least recently used file is deleted when
room is needed; a process that has it open reads on. Locks are the kernel's (flock), so a killed process leaves none
behind.

Only what the cache has made is opened or deleted: ordinary files with names of its own form, in a folder of its own
that has its mark. No link is followed.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from .config import DataConfig
from .folders import obstacle
from .index import ShardIndex
from .layout import INDEX_NAME, MOST_INDEX_BYTES, Shard
from .location import Location
from .sources import Source, SourceError, fetch, source_of
from .storage import LocalStorage, RangedStorage

log = logging.getLogger("ddetr")

FOLDER = "ddetr-shards"  # inside data.cache
MARK = "CACHEDIR.TAG"  # by which programs that back up know a cache, too: https://bford.info/cachedir/
MARK_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Made by ddetr for copies of shards. It deletes here what it has fetched, whenever it needs the room.\n"
)
ABANDONED_SECONDS = 24 * 3600  # after which half a shard that nobody fetches any more is deleted

_OWN_NAME = re.compile(r"[0-9a-f]{64}\.(tar|partial)")


class ShardCache:
    """The local copies of the shards of a source, in a folder of its own inside `parent`.

    limit_bytes: of all shards in the folder together, those of other sets included; those being fetched come on top.
    Raises FileExistsError when something else has that folder's name, OSError when it can be neither found nor made.
    """

    def __init__(self, source: Source, parent: Path, limit_bytes: int, attempts: int) -> None:
        self._source, self._limit_bytes, self._attempts = source, limit_bytes, attempts
        if not _is_marked(parent / FOLDER) and (reason := obstacle(parent)):
            raise OSError(_unusable(parent, reason))
        self._folder = _own_folder(parent)

    def check(self, shards: Iterable[Shard]) -> None:
        """Raise OSError when a shard is not in the cache and the cache cannot be written to."""
        reason = obstacle(self._folder)
        if reason and any(not (self._folder / f"{shard.sha256}.tar").exists() for shard in shards):
            raise OSError(_unusable(self._folder.parent, reason))

    def open(self, shard: Shard) -> int:
        """A file descriptor of the shard's local copy, which is fetched when it is not there.

        Raises SourceError when it cannot be fetched or the cache cannot be written to, and ValueError when the shard is
        larger than the cache.
        """
        check_room([shard], self._limit_bytes)
        path = self._folder / f"{shard.sha256}.tar"
        descriptor = _used(path)
        if descriptor is None:
            try:
                with _locked(path.with_suffix(".lock")):
                    descriptor = _used(path)
                    if descriptor is None:
                        self._make_room(shard.bytes)
                        descriptor = self._fetch(shard, path)
            except SourceError:
                raise
            except OSError as error:
                raise SourceError(_unusable(self._folder.parent, str(error))) from error
        return descriptor

    def _fetch(self, shard: Shard, path: Path) -> int:
        unfinished = path.with_suffix(".partial")
        for _ in range(2):  # bytes may be damaged on their way, too
            with os.fdopen(_opened(unfinished, os.O_RDWR | os.O_APPEND | os.O_CREAT), "a+b") as file:
                begun = file.seek(0, os.SEEK_END)
                if begun < shard.bytes:
                    fetch(self._source, shard.name, file.write, size=shard.bytes, offset=begun, attempts=self._attempts)
                file.flush()
                os.fsync(file.fileno())
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256:
                    descriptor = _opened(unfinished, os.O_RDONLY)
                    unfinished.rename(path)
                    return descriptor
            unfinished.unlink()
        raise SourceError(
            f"{self._source.address(shard.name)}: its checksum is not that of the index: the shard is damaged "
            "or of another set. Copy the whole folder there again."
        )

    def _make_room(self, needed_bytes: int) -> None:
        with _locked(self._folder / "room.lock"):
            files = []
            for path in self._folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    if not _OWN_NAME.fullmatch(path.name) or not stat.S_ISREG(status.st_mode):
                        continue
                    if path.suffix == ".tar":
                        files.append((status.st_mtime, status.st_size, path))
                    elif status.st_mtime < time.time() - ABANDONED_SECONDS:
                        path.unlink()
            excess = sum(size for _, size, _ in files) + needed_bytes - self._limit_bytes
            for _, size, path in sorted(files):
                if excess <= 0:
                    return
                path.unlink(missing_ok=True)
                lock = path.with_suffix(".lock")
                with contextlib.suppress(FileNotFoundError):
                    if stat.S_ISREG(lock.lstat().st_mode):
                        lock.unlink()
                excess -= size


def _unusable(parent: Path, reason: str) -> str:
    return (
        f"data.cache={parent}: shards cannot be kept there: {reason}. Set data.cache to another folder, or "
        "data.fetch=samples, which keeps none"
    )


def check_room(shards: list[Shard], limit_bytes: int) -> None:
    """Raise ValueError unless each shard, alone, is within the cache's limit."""
    largest = max(shards, key=lambda shard: shard.bytes)
    if largest.bytes > limit_bytes:
        raise ValueError(
            f"{largest.name} has {largest.bytes} bytes, data.cache_bytes={limit_bytes} holds less. Set "
            f"data.cache_bytes={largest.bytes} or more, or data.fetch=samples, which caches nothing."
        )


def _own_folder(parent: Path) -> Path:
    """The cache's folder, made with its mark in it, or refused when it is not ours."""
    folder = parent / FOLDER
    if not _is_marked(folder):
        parent.mkdir(parents=True, exist_ok=True)
        made = parent / f".{FOLDER}.{os.getpid()}.{secrets.token_hex(8)}"
        made.mkdir()
        (made / MARK).write_text(MARK_TEXT)
        try:
            made.rename(folder)  # takes the place of an empty folder too, and of nothing else
        except OSError as error:
            (made / MARK).unlink()
            made.rmdir()
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if not _is_marked(folder):  # by another process in the meantime
                raise FileExistsError(
                    f"{folder}: not a folder that ddetr has made for shards (no {MARK} of its own in it), so nothing "
                    "there is touched. Set data.cache to another folder, or move this one away."
                ) from None
    return folder


def _is_marked(folder: Path) -> bool:
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return False
        with os.fdopen(_opened(folder / MARK, os.O_RDONLY), "rb") as file:
            return file.read(len(MARK_TEXT) + 1) == MARK_TEXT.encode()
    except (FileNotFoundError, SourceError):
        return False


def _opened(path: Path, flags: int) -> int:
    """A descriptor of an ordinary file. Raises SourceError for a link, a pipe or whatever else has its name."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise SourceError(f"{path}: not an ordinary file, and not of the cache's making; move it away") from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError(f"{path}: not an ordinary file, and not of the cache's making; move it away")
    return descriptor


def _used(path: Path) -> int | None:
    """A descriptor of the file at `path`, marked as used now; None when there is none."""
    try:
        descriptor = _opened(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a cache that can only be read deletes nothing either
        os.utime(descriptor)
    return descriptor


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the kernel's lock of a file; a file deleted while we waited for it is another's no more, so try again."""
    while True:
        descriptor = _opened(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            try:
                if _is_at(path, descriptor):
                    yield
                    return
            finally:  # closing is not enough: a process forked since then has the file open too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        finally:
            os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return path.lstat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False


class CachedStorage(LocalStorage):
    """Reads shards from their copies in a cache. Raises what `ShardCache.open` raises."""

    def __init__(self, cache: ShardCache) -> None:
        super().__init__()
        self._cache = cache

    def open(self, shard: Shard) -> int:
        return self._cache.open(shard)

    def ensure(self, shard: Shard) -> None:
        """Fetch a shard ahead of its use."""
        os.close(self.open(shard))


def open_shards(location: str, config: DataConfig) -> ShardIndex:
    """Open the shards in a local folder or at a remote source, as data.train and data.validation name them.

    Raises FileNotFoundError when there are none or they do not fit their index, and ValueError for an unusable index or
    a cache smaller than the largest shard. Raises OSError when the cache is not writable, SourceError when the source
    cannot be reached.
    """
    if not Location(location).is_remote:
        return ShardIndex.load(location)
    source = source_of(location, config.fetch_timeout_seconds)
    text = bytearray()
    fetch(source, INDEX_NAME, text.extend, size=MOST_INDEX_BYTES, exact=False, attempts=config.fetch_attempts)
    try:
        folder = Path(config.cache).expanduser()
    except RuntimeError:  # nobody knows this home
        folder = Path(config.cache)
        if config.fetch == "shards":
            raise ValueError(_unusable(folder, f"no home is known for {folder.parts[0]}")) from None
    index = ShardIndex.parse(text, location, folder)
    if config.fetch == "shards":
        check_room(list(index.shards), config.cache_bytes)
    index.check(source.sizes([shard.name for shard in index.shards]))
    if config.fetch == "samples":
        index.storage = RangedStorage(source, config.fetch_attempts)
        index.storage.read(index.shards[0], 0, 1)  # whether the source gives parts of files at all
        return index
    total = sum(shard.bytes for shard in index.shards)
    if total > config.cache_bytes:
        log.warning(
            "%s: its shards are %.1f GiB, data.cache_bytes holds %.1f: each epoch fetches all of them anew. "
            "Set data.cache_bytes=%d, or data.fetch=samples, which reads only what each rank needs.",
            *(index.location, total / 2**30, config.cache_bytes / 2**30, total),
        )
    cache = ShardCache(source, folder, config.cache_bytes, config.fetch_attempts)
    cache.check(index.shards)
    index.storage = CachedStorage(cache)
    return index
