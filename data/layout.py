"""The contents of index.json and of a shard: one row a sample, one entry an image. Readers trust neither.

Index and shards are untrusted: every name, digest and number is checked before it is used.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .documents import parse_json
from .images import MOST_FILE_BYTES
from .protocols import lists_in
from .values import MOST_ID, MOST_SIDE, described, is_number, is_whole, member, whole

INDEX_NAME = "index.json"
INDEX_VERSION = 1
MOST_INDEX_BYTES = 1 << 30  # about four million images
LARGE_INDEX_BYTES = 64 << 20  # above it, what is written must be worth its memory
MOST_ANNOTATIONS_BYTES = 16 << 20  # of one image: over a hundred thousand boxes
MOST_BETWEEN_BYTES = 1 << 20  # between the two members of a sample, which are read at once

# No character that a shell, a file system or an address takes for anything but a part of a name.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,@-]{0,199}\.tar")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_INTO_NEW = "into a new folder: `ddetr data pack COCO_JSON IMAGES NEW_FOLDER`"


class ForeignIndexError(ValueError):
    """An index.json that another program has written for its own data: there is nothing wrong with it."""


# One row a sample. Offsets and sizes are bytes of the tar; num_boxes counts annotations, crowds included.
SAMPLE_DTYPE = np.dtype(
    [
        ("image_id", np.int64),
        ("height", np.int32),
        ("width", np.int32),
        ("num_boxes", np.int32),
        ("image_offset", np.int64),
        ("image_bytes", np.int64),
        ("annotations_offset", np.int64),
        ("annotations_bytes", np.int64),
        ("image_crc32", np.uint32),
        ("annotations_crc32", np.uint32),
    ]
)
# Least and most of each of them.
SAMPLE_LIMITS = {
    "image_id": (0, MOST_ID),
    "height": (1, MOST_SIDE),
    "width": (1, MOST_SIDE),
    "num_boxes": (0, 2**31 - 1),
    "image_offset": (0, MOST_ID),
    "image_bytes": (1, MOST_FILE_BYTES),
    "annotations_offset": (0, MOST_ID),
    "annotations_bytes": (1, MOST_ANNOTATIONS_BYTES),
    "image_crc32": (0, 2**32 - 1),
    "annotations_crc32": (0, 2**32 - 1),
}


@dataclass(frozen=True, eq=False)
class Shard:
    """One tar file. samples: rows of SAMPLE_DTYPE in the tar's order. fingerprint: digest of what it was made from."""

    path: Path
    bytes: int
    sha256: str
    fingerprint: str
    samples: np.ndarray

    @property
    def name(self) -> str:
        return self.path.name

    def key(self, row: int) -> str:
        """The name of a sample in the tar, without suffix."""
        return sample_key(int(self.samples[row]["image_id"]))

    def to_json(self) -> dict[str, Any]:
        columns = {name: self.samples[name].tolist() for name in SAMPLE_DTYPE.names or ()}
        samples = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return {
            "name": self.name,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "fingerprint": self.fingerprint,
            "samples": [{"key": sample_key(sample["image_id"]), **sample} for sample in samples],
        }

    @classmethod
    def from_json(cls, folder: Path, values: Any) -> "Shard":
        """A shard from its entry in index.json. Raises ValueError, naming the shard, for one that is not valid."""
        name = member(values, "name", str)
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"a shard is called {described(name)}: no file name of letters, digits and ._+=,@- in .tar"
            )
        try:
            size = whole(values, "bytes", least=1)
            digests = {digest: member(values, digest, str) for digest in ("sha256", "fingerprint")}
            for digest, text in digests.items():
                if not _DIGEST.fullmatch(text):
                    raise ValueError(f"{digest!r} is {described(text)}, not 64 hexadecimal digits in lower case")
            return cls(folder / name, size, **digests, samples=_rows(member(values, "samples", list), size))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def check_own(values: Any) -> None:
    """Raise ForeignIndexError for an index.json of another program that is known here."""
    keys = values if isinstance(values, dict) else {}
    shards = keys.get("shards")
    first = shards[0] if isinstance(shards, list) and shards else None
    if isinstance(first, dict) and "raw_data" in first:
        theirs = "MosaicML Streaming"
    elif "shardlist" in keys:
        theirs = "WebDataset (wids)"
    elif "chunks" in keys and "config" in keys:
        theirs = "LitData"
    elif "images" in keys and "annotations" in keys:
        raise ForeignIndexError(f"a COCO json, not an index of shards; pack it {_INTO_NEW}")
    else:
        return
    raise ForeignIndexError(
        f"the index of {theirs}, whose shards ddetr does not read; write their images as files and their boxes as a "
        f"COCO json, and pack these {_INTO_NEW}"
    )


def check_density(text: bytes | bytearray) -> None:
    """Raise ValueError for a large text that would take far more memory as values than an index of its size does.

    A sample has at least 15 bytes for each of its values; `[],[],[]` takes 24 times the memory of its text.
    """
    values = sum(text.count(mark) for mark in (b",", b"[", b"{")) if len(text) > LARGE_INDEX_BYTES else 0
    if values and (not text.isascii() or 12 * values > len(text)):
        raise ValueError(f"{len(text)} bytes, which do not describe samples")


def _rows(samples: list[Any], shard_bytes: int) -> np.ndarray:
    """Rows of SAMPLE_DTYPE; every member lies within the shard, those of a sample side by side."""
    rows = np.empty(len(samples), dtype=SAMPLE_DTYPE)
    for name, (least, most) in SAMPLE_LIMITS.items():
        try:
            column = [sample[name] for sample in samples]
        except (TypeError, KeyError, IndexError):
            raise ValueError(f"a sample has no {name!r}") from None
        # Column by column, because there may be millions.
        if column and not (set(map(type, column)) == {int} and least <= min(column) and max(column) <= most):
            bad = next(value for value in column if not is_whole(value, least, most))
            raise ValueError(f"a sample's {name!r} is {described(bad)}, not a whole number from {least} to {most}")
        rows[name] = column
    offsets = np.stack([rows["image_offset"], rows["annotations_offset"]])
    sizes = np.stack([rows["image_bytes"], rows["annotations_bytes"]])
    beyond = ((sizes > shard_bytes) | (offsets > shard_bytes - sizes)).any(0)
    apart = ~beyond & ((offsets + sizes).max(0) - offsets.min(0) - sizes.sum(0) > MOST_BETWEEN_BYTES)
    for bad, what in ((beyond, f"ends beyond the {shard_bytes} bytes of the shard"), (apart, "lies in two places")):
        if bad.any():
            raise ValueError(f"sample {sample_key(int(rows[bad.argmax()]['image_id']))} {what}")
    return rows


def entry_from_json(data: bytes) -> dict[str, Any]:
    """{"image_id", "file_name", "height", "width", "annotations", "orientation"} of a sample.

    height, width: of the picture, which is the stored one turned by `orientation` (1 where none is noted). The lists
    of categories that a protocol has of an image (`protocols.IMAGE_LISTS`) are there, too, where they are noted.
    Raises ValueError for anything else.
    """
    values = parse_json(data)
    return {
        "image_id": whole(values, "image_id"),
        "file_name": member(values, "file_name", str),
        "height": whole(values, "height", 1, MOST_SIDE),
        "width": whole(values, "width", 1, MOST_SIDE),
        "annotations": [_annotation(annotation) for annotation in member(values, "annotations", list)],
        "orientation": whole(values, "orientation", 1, 8) if "orientation" in values else 1,
        **lists_in(values),
    }


def _annotation(values: Any) -> dict[str, Any]:
    bbox = member(values, "bbox", list)
    if len(bbox) != 4 or not all(map(is_number, bbox)):
        raise ValueError(f"'bbox' is {described(bbox)}, not four numbers")
    area = values.get("area")
    if not is_number(area):
        raise ValueError(f"'area' is {described(area)}")
    return {
        "id": whole(values, "id"),
        "bbox": bbox,
        "category_id": whole(values, "category_id", -MOST_ID),
        "area": area,
        "iscrowd": whole(values, "iscrowd", 0, 1),
    }


def sample_key(image_id: int) -> str:
    return f"{image_id:012d}"
