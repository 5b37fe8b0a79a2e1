"""Detections in columns: as they travel between processes, and as they are scored."""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ...data.categories import Categories
from ...data.documents import as_json, parse_json
from ...data.values import described, is_whole

# One row a detection. category_id: the set's own; bbox: x, y, width, height in pixels of the picture.
DETECTION_DTYPE = np.dtype(
    [("image_id", np.int64), ("category_id", np.int64), ("bbox", np.float32, (4,)), ("score", np.float32)]
)
# The same as other programs compute them.
_EXACT_DTYPE = np.dtype(
    [("image_id", np.int64), ("category_id", np.int64), ("bbox", np.float64, (4,)), ("score", np.float64)]
)

_ROWS_AT_ONCE = 100_000
_LONGEST_LENGTHS = 10_000  # bytes


def to_coco(detections: np.ndarray) -> list[dict[str, Any]]:
    """Rows of DETECTION_DTYPE in COCO's result format."""
    names = DETECTION_DTYPE.names or ()
    columns = [detections[name].tolist() for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


def as_text(detections: np.ndarray) -> Iterator[bytes]:
    """The json file of these rows in COCO's result format, in pieces: as dictionaries they take far more memory."""
    yield b"["
    for start in range(0, len(detections), _ROWS_AT_ONCE):
        piece = as_json(to_coco(detections[start : start + _ROWS_AT_ONCE]))[1:-1]
        yield (", " * bool(start) + piece).encode()
    yield b"]"


def of_coco(rows: Iterable[Mapping[str, Any]]) -> np.ndarray:
    """Detections in COCO's result format as rows, with their float64."""
    values = [(row["image_id"], row["category_id"], tuple(row["bbox"]), row["score"]) for row in rows]
    return np.array(values, dtype=_EXACT_DTYPE)


def counted(detections: np.ndarray, categories: Categories) -> np.ndarray:
    """Those that a score counts: finite ones of the set's categories."""
    finite = np.isfinite(detections["bbox"]).all(-1) & np.isfinite(detections["score"])
    return detections[finite & np.isin(detections["category_id"], categories.ids)]


def packed(*parts: bytes) -> bytes:
    """Several as one, for `unpacked` in another process."""
    return json.dumps([len(part) for part in parts]).encode() + b"\n" + b"".join(parts)


def unpacked(data: bytes) -> list[bytes]:
    """The parts of `packed`. Raises ValueError for any other bytes."""
    first, mark, rest = data.partition(b"\n")
    lengths = parse_json(first) if mark and len(first) <= _LONGEST_LENGTHS else None
    if not (isinstance(lengths, list) and all(map(is_whole, lengths)) and sum(lengths) == len(rest)):
        raise ValueError(f"not a tally: {described(first[:40])}")
    return [rest[start:end] for start, end in pairwise(accumulate(lengths, initial=0))]


def unpacked_rows(data: bytes, *dtypes: np.dtype) -> list[np.ndarray]:
    """The arrays of these types whose bytes were `packed`. Raises ValueError for any other bytes."""
    parts = unpacked(data)
    if len(parts) != len(dtypes) or any(len(part) % dtype.itemsize for part, dtype in zip(parts, dtypes, strict=True)):
        raise ValueError(f"not a tally of this kind: parts of {', '.join(str(len(part)) for part in parts)} bytes")
    return [np.frombuffer(part, dtype=dtype) for part, dtype in zip(parts, dtypes, strict=True)]
