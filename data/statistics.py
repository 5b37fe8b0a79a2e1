"""The objects of a set as one table of numbers, read from its shards."""

import numpy as np
from rich.progress import Progress

from .index import ShardIndex, ShardReader
from .parallel import ordered_map

# One row an annotation. sample: its number in the index. width, height: pixels of the stored image, what overhangs it
# left out. area: as annotated, for COCO of the segmentation.
OBJECT_DTYPE = np.dtype(
    [
        ("sample", np.int64),
        ("label", np.int32),
        ("width", np.float64),
        ("height", np.float64),
        ("area", np.float64),
        ("iscrowd", np.bool_),
    ]
)


def read_objects(index: ShardIndex, *, workers: int = 0, progress: Progress | None = None) -> np.ndarray:
    """Rows of OBJECT_DTYPE of all shards, read by several processes (0: one a core).

    Raises SampleError for a damaged sample.
    """
    task = progress.add_task("reading annotations", total=index.num_samples) if progress else None
    tables = []
    first = 0
    # Each process gets the index of its shard alone: the whole one is large.
    shards = [ShardIndex(index.real_location, index.categories, index.source, [shard]) for shard in index.shards]
    for rows, shard in zip(ordered_map(_objects, shards, workers=workers), shards, strict=True):
        rows["sample"] += first
        first += shard.num_samples
        tables.append(rows)
        if progress and task is not None:
            progress.advance(task, shard.num_samples)
    return np.concatenate(tables)


def _objects(index: ShardIndex) -> np.ndarray:
    """Rows of OBJECT_DTYPE of an index of one shard."""
    reader, rows = ShardReader(index), []
    for row in range(index.num_samples):
        entry = reader.annotations(0, row)
        for annotation in entry["annotations"]:
            left, top, width, height = annotation["bbox"]
            sides = min(left + width, entry["width"]) - max(left, 0), min(top + height, entry["height"]) - max(top, 0)
            try:
                label = index.categories.label(annotation["category_id"])
            except ValueError as error:
                raise reader.error(0, row, error) from error
            rows.append((row, label, *sides, annotation["area"], bool(annotation["iscrowd"])))
    reader.close()
    return np.array(rows, dtype=OBJECT_DTYPE)
