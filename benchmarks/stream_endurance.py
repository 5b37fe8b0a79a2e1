"""Whether the training stream's memory and descriptors stay flat, and how soon its first batch comes.

    python benchmarks/stream_endurance.py [--shards 1000] [--epochs 5]

Procedural images, two in a shard, two loader workers. Memory is that of the trainer and its workers, pages that they
share counted once (PSS); descriptors are those of all three. Both are read at the end of each epoch, while the workers
read ahead. The time to the first batch begins with listing the shards, and holds the start of the workers.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

from ddetr.data.config import DataConfig
from ddetr.data.shards import ShardIndex, pack
from ddetr.data.stream import TrainStream
from ddetr.data.synthetic import draw_set

SMALL = {"short_sides": (96, 128), "crop_resize_short_sides": (80, 96), "crop_sizes": (48, 80), "workers": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        annotations = draw_set(Path(folder) / "set", images=2 * arguments.shards, size=128, classes=3, seed=0)
        images, shards = annotations.parent / "images", Path(folder) / "shards"
        mean_bytes = sum(file.stat().st_size for file in images.iterdir()) // (2 * arguments.shards)
        pack(annotations, images, shards, shard_bytes=2 * mean_bytes, workers=0)
        start = time.perf_counter()
        index = ShardIndex.load(shards)
        config = DataConfig.model_validate(SMALL)
        stream = TrainStream(index, config, batch_size=8, accumulation=1, rank=0, world_size=1, seed=0)
        next(stream.steps(0))
        print(f"{len(index.shards)} shards: first batch after {time.perf_counter() - start:.2f} s")
        print("| epoch | memory, MiB | descriptors |\n| --- | --- | --- |")
        for epoch in range(arguments.epochs):
            for _ in stream.steps(epoch):
                pass
            processes = [os.getpid(), *children()]
            memory = sum(map(resident_kilobytes, processes)) / 1024
            descriptors = sum(len(os.listdir(f"/proc/{process}/fd")) for process in processes)
            print(f"| {epoch} | {memory:.0f} | {descriptors} |", flush=True)
        stream.close()


def children() -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()]


def resident_kilobytes(process: int) -> int:
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
