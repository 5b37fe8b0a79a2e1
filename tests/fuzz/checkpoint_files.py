"""The parts of a checkpoint that the tests of its readers change."""

import json
import struct
from typing import Any

from ddetr.data.categories import Categories

CATEGORIES = Categories((1, 3), ("cat", "dog"))
STEP = "checkpoints/step_00000020"


def with_header(file: bytes, header: bytes) -> bytes:
    (size,) = struct.unpack_from("<Q", file)
    return struct.pack("<Q", len(header)) + header + file[8 + size :]


def header_of(file: bytes) -> dict[str, Any]:
    (size,) = struct.unpack_from("<Q", file)
    return json.loads(file[8 : 8 + size])
