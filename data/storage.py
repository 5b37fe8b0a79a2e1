"""Where the bytes of shards come from when they are read: files of this machine, or parts of files elsewhere."""

import copy
import os
from collections import OrderedDict
from pathlib import Path
from typing import Protocol, Self

from .layout import Shard
from .sources import Source, fetch


class Storage(Protocol):
    """Reads bytes of shards. Each reader has one of its own: open files are shared with no other thread or process."""

    remote: bool  # each read asks a source: worth asking for early, by many threads at once, and again if damaged

    def read(self, shard: Shard, begin: int, end: int) -> bytes:
        """The bytes between two offsets, fewer where the shard ends. Raises OSError; SourceError naming a source."""
        ...

    def anew(self) -> Self:
        """The same for another reader."""
        return self

    def close(self) -> None:
        """Close what is open."""


class LocalStorage(Storage):
    """Shards on a disk; few of them are open at a time."""

    remote = False
    MOST_OPEN_FILES = 64

    def __init__(self) -> None:
        self._files: OrderedDict[Path, int] = OrderedDict()  # shard -> descriptor, least recently used first

    def open(self, shard: Shard) -> int:
        return os.open(shard.path, os.O_RDONLY)

    def read(self, shard: Shard, begin: int, end: int) -> bytes:
        if shard.path not in self._files:
            if len(self._files) >= self.MOST_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[shard.path] = self.open(shard)
        self._files.move_to_end(shard.path)
        return os.pread(self._files[shard.path], end - begin, begin)

    def anew(self) -> Self:
        other = copy.copy(self)
        other._files = OrderedDict()
        return other

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])


class RangedStorage(Storage):
    """Parts of the shards of a source, asked for each time; none is kept."""

    remote = True

    def __init__(self, source: Source, attempts: int) -> None:
        self._source, self._attempts = source, attempts

    def read(self, shard: Shard, begin: int, end: int) -> bytes:
        data = bytearray()
        size, attempts = shard.bytes, self._attempts
        fetch(self._source, shard.name, data.extend, size=size, offset=begin, end=end, attempts=attempts)
        return bytes(data)
