"""Indexed tar shards: the layout on disk, the index, reading one sample without reading the rest.

A folder holds `shard-000000.tar`, ... and `index.json`. A shard is an ordinary WebDataset tar: for each image
`<key>.jpg` (or .png, ...: the original bytes) and `<key>.json` with its annotations. The index names every shard with
its size and sha256, and every sample with its size in pixels and the places and checksums of its two members.
"""

import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from .categories import Categories
from .documents import parse_json
from .files import write_whole
from .images import read_file
from .layout import (
    INDEX_NAME,
    INDEX_VERSION,
    MOST_INDEX_BYTES,
    ForeignIndexError,
    Shard,
    check_density,
    check_own,
    entry_from_json,
)
from .location import Location
from .parallel import threaded_map
from .protocols import ProtocolName, protocol_in
from .storage import LocalStorage, Storage
from .text import visible
from .values import described, member

Item = TypeVar("Item")
Result = TypeVar("Result")

READS_AT_ONCE = 16  # of a process, from a remote source


class SampleError(ValueError):
    """A sample that cannot be used; the message names its shard and key and says what to do."""


class ShardIndex:
    """All shards of a set, in order; samples are numbered through them.

    location: their folder, as a message may show it; real_location: as it was asked for. storage: from where their
    bytes are read. protocol: by which detections in the set are scored. Raises nothing itself; `load` checks the files.
    """

    def __init__(
        self,
        location: str | Path,
        categories: Categories,
        source: dict[str, Any],
        shards: Sequence[Shard],
        protocol: ProtocolName = "coco",
    ) -> None:
        self.real_location = Location(location)
        self.categories = categories
        self.source = source  # what the shards were made from: name and digest of the json, counts
        self.shards = tuple(shards)
        self.protocol: ProtocolName = protocol
        self.storage: Storage = LocalStorage()

    @property
    def location(self) -> str:
        return self.real_location.shown

    @classmethod
    def load(cls, folder: str | Path) -> "ShardIndex":
        """Read an index and check that exactly its shards are there, each of its size.

        Raises FileNotFoundError for a missing folder, index or shard, ValueError for an unreadable index and for
        shards that are cut short or not in the index.
        """
        index = cls.read(folder)
        index.check({shard.name: shard.path.stat().st_size if shard.path.is_file() else None for shard in index.shards})
        return index

    @classmethod
    def read(cls, folder: str | Path) -> "ShardIndex":
        """The index alone, without a look at the shards. Raises as `load` for folder and index."""
        folder = Path(folder)
        path = folder / INDEX_NAME
        if not path.is_file():
            what = "no such folder" if not folder.exists() else f"no {INDEX_NAME} in it, so it is no folder of shards"
            where = Location(folder).shown
            raise FileNotFoundError(f"{where}: {what}. Make one with `ddetr data pack COCO_JSON IMAGES {where}`.")
        return cls.parse(read_file(path, MOST_INDEX_BYTES), folder, folder)

    @classmethod
    def parse(cls, text: bytes | bytearray, location: str | Path, folder: Path) -> "ShardIndex":
        """The index in the text of index.json, its shards in `folder`. Raises ValueError when it is not usable."""
        try:
            check_density(text)
            values = parse_json(text)
            check_own(values)
            version = values.get("version") if isinstance(values, dict) else None
            if version != INDEX_VERSION or type(version) is not int:
                raise ValueError(f"version {described(version)} (this release reads {INDEX_VERSION})")
            shards = [Shard.from_json(folder, item) for item in member(values, "shards", list)]
            if not any(len(shard.samples) for shard in shards):
                raise ValueError("no samples in it")
            if twice := [name for name, count in Counter(shard.name for shard in shards).items() if count > 1]:
                raise ValueError(f"{twice[0]} is in it twice")
            source = member(values, "source", dict)
            if not all(type(value) in (str, int) for value in source.values()):
                raise ValueError(f"'source' is {described(source)}")
            categories = Categories.from_json(member(values, "categories", list))
            if not categories:
                raise ValueError("no categories in it")
            return cls(location, categories, source, shards, protocol_in(values))
        except ForeignIndexError as error:
            raise ValueError(f"{Location(location).shown}/{INDEX_NAME}: {error}") from None
        except (ValueError, MemoryError) as error:
            what = visible(str(error)) or "it takes more memory than there is"
            raise ValueError(
                f"{Location(location).shown}/{INDEX_NAME}: not a usable index ({what}); copy the set again from "
                "where it is from, or pack it into a new folder"
            ) from error

    def check(self, sizes: Mapping[str, int | None]) -> None:
        """Raise FileNotFoundError unless exactly the shards of the index are there, each of its size.

        sizes: bytes of shards by name, None for one that is not there; one that is not named is not judged.
        """
        faults = []
        for shard in self.shards:
            size = sizes.get(shard.name, shard.bytes)
            if size is None:
                faults.append(f"{shard.name} is missing")
            elif size != shard.bytes:
                faults.append(f"{shard.name} has {size} bytes instead of {shard.bytes}")
        faults += [f"{name} is not in the index (move it elsewhere)" for name in self.extra_shards()]
        if faults:
            more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
            raise FileNotFoundError(
                f"{self.location}: the shards do not fit their index: {'; '.join(faults[:5])}{more}. "
                "Copy the folder again, or run the same `ddetr data pack` again: it makes only what is missing."
            )

    def save(self) -> None:
        """Write index.json, whole or not at all."""
        values = {
            "version": INDEX_VERSION,
            "categories": self.categories.to_json(),
            "source": self.source,
            "shards": [shard.to_json() for shard in self.shards],
            **({} if self.protocol == "coco" else {"protocol": self.protocol}),
        }
        write_whole(Path(self.real_location) / INDEX_NAME, json.dumps(values, separators=(",", ":")).encode())

    def extra_shards(self) -> list[str]:
        """Tar files in a local folder that the index does not name; none of a remote source."""
        if self.real_location.is_remote:
            return []
        found = {path.name for path in Path(self.real_location).glob("*.tar")}
        return sorted(visible(name) for name in found - {shard.name for shard in self.shards})

    @property
    def num_samples(self) -> int:
        return sum(len(shard.samples) for shard in self.shards)

    @cached_property
    def samples(self) -> np.ndarray:
        """Rows of SAMPLE_DTYPE by sample number."""
        return np.concatenate([shard.samples for shard in self.shards])

    @cached_property
    def lack(self) -> str | None:
        """Why no detector can be trained on the set, nor scored; None where there are objects, or an older index does
        not tell how many of its boxes are crowds."""
        return lack_of_objects(int(self.samples["num_boxes"].sum()), self.source.get("crowds"))

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(shard.samples) for shard in self.shards])

    def locate(self, sample: int) -> tuple[int, int]:
        """(shard, row) of a sample's number."""
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        return shard, sample - int(self._ends[shard]) + len(self.shards[shard].samples)


class ShardReader:
    """Reads single samples of an index by their place in the tar.

    Raises SampleError for a damaged sample, SourceError when a remote source does not give it.
    """

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._storage = index.storage.anew()

    def image(self, shard: int, row: int) -> bytes:
        """The original bytes of an image file."""
        return self._read(shard, row, "image")[0]

    def annotations(self, shard: int, row: int) -> dict[str, Any]:
        """{"image_id", "file_name", "height", "width", "annotations"} as packed."""
        return self._entry(shard, row, self._read(shard, row, "annotations")[0])

    def sample(self, shard: int, row: int) -> tuple[bytes, dict[str, Any]]:
        """Image bytes and annotations in one read, checked against the index."""
        image, annotations = self._read(shard, row, "image", "annotations")
        entry, indexed = self._entry(shard, row, annotations), self._index.shards[shard].samples[row]
        for name, value in {**entry, "num_boxes": len(entry["annotations"])}.items():
            if name in indexed.dtype.names and value != indexed[name]:
                raise self.error(shard, row, f"{name} is {value} in the shard, {indexed[name]} in the index")
        return image, entry

    def _entry(self, shard: int, row: int, data: bytes) -> dict[str, Any]:
        try:
            return entry_from_json(data)
        except ValueError as error:
            raise self.error(shard, row, f"its annotations cannot be used: {visible(str(error))}") from error

    def ahead(self, read: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`read(item)` for each item in order; what comes from a remote source is asked for early, many at once."""
        return threaded_map(read, items, threads=READS_AT_ONCE if self._storage.remote else 0, ahead=2 * READS_AT_ONCE)

    def error(self, shard: int, row: int, what: object) -> SampleError:
        """The one message for a sample that cannot be used."""
        place = self._index.shards[shard]
        return SampleError(
            f"{self._index.location}/{place.name}: sample {place.key(row)}: {what}. "
            f"`ddetr data check {self._index.location}` lists every bad sample; pack this shard again, or copy it "
            "again from where it is from."
        )

    def close(self) -> None:
        self._storage.close()

    def _read(self, shard: int, row: int, *members: str) -> list[bytes]:
        """The members of a sample, which lie side by side in the tar, in one read."""
        place = self._index.shards[shard].samples[row]
        spans = [(int(place[f"{member}_offset"]), int(place[f"{member}_bytes"])) for member in members]
        begin, end = min(offset for offset, _ in spans), max(offset + size for offset, size in spans)
        for last in (not self._storage.remote, True):  # bytes may be damaged on their way, too
            data = self._storage.read(self._index.shards[shard], begin, end)
            if len(data) != end - begin:
                raise self.error(shard, row, f"the shard ends {end - begin - len(data)} bytes early")
            parts = [data[offset - begin : offset - begin + size] for offset, size in spans]
            # Decoders overlook much damage: a JPEG with a zeroed half decodes, in grey.
            sums = [place[f"{member}_crc32"] for member in members]
            damaged = [
                member for member, part, good in zip(members, parts, sums, strict=True) if zlib.crc32(part) != good
            ]
            if not damaged:
                break
            if last:
                raise self.error(shard, row, f"the {damaged[0]} in the shard is damaged (its checksum is wrong)")
        return parts


def lack_of_objects(boxes: int, crowds: Any) -> str | None:
    """What a message says of a set with so many boxes, of which so many are crowds; None where there are others."""
    if not boxes:
        return "there is no box in it"
    return "every box in it is a crowd" if crowds == boxes else None


def tar_members(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """key -> suffix -> (offset, size) of a tar's files, from its own headers. Raises tarfile.TarError."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.offset < end or member.size < 0:  # would be read for ever
                    raise tarfile.ReadError("its headers lead back into what was read")
                end = member.offset_data
                key, _, suffix = member.name.partition(".")
                members.setdefault(key, {})[suffix] = (member.offset_data, member.size)
    except (OSError, EOFError, ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        # tarfile computes with whatever numbers a header holds, and calls itself for each header that extends another.
        raise tarfile.ReadError(f"its headers cannot be read ({visible(str(error))})") from error
    return members
