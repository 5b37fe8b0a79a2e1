"""Takes steps of an epoch on several ranks and writes down what it saw, from where the file ends: to be killed.

    consumer.py SHARDS RECORD RANKS WORKERS

A line of RECORD is a step and its image ids; one that is not whole does not count, as a checkpoint that is not whole.
"""

import json
import sys
import time
from pathlib import Path

from ddetr.data.config import DataConfig
from ddetr.data.index import ShardIndex
from ddetr.data.stream import TrainStream

CONFIG = {"short_sides": (64,), "crop": False, "shuffle_window": 8, "remainder": "pad"}
BATCH_SIZE = 4


def recorded(path: Path) -> list[list[int]]:
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


if __name__ == "__main__":
    shards, record, ranks, workers = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    config = DataConfig.model_validate({**CONFIG, "workers": workers})
    index = ShardIndex.load(shards)
    done = recorded(record)
    record.write_text("".join(json.dumps(line) + "\n" for line in done))
    streams = [
        TrainStream(index, config, batch_size=BATCH_SIZE, accumulation=1, rank=r, world_size=ranks, seed=5)
        for r in range(ranks)
    ]
    with record.open("a") as file:
        for parts in zip(*(stream.steps(3, len(done)) for stream in streams), strict=True):
            ids = [i for (batch,) in parts for i in batch.image_ids[batch.is_real].tolist()]
            file.write(json.dumps(ids)[:5])
            file.flush()
            print(len(ids), flush=True)
            time.sleep(0.05)  # time to be killed in, between having seen a batch and having it on record
            file.write(json.dumps(ids)[5:] + "\n")
            file.flush()
    print("end", flush=True)
