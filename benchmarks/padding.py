"""How much of a batch is padding, and how much more the slowest rank has to do, with and without similar sizes.

    python benchmarks/padding.py COCO_JSON [--images 118000]

Arithmetic on sizes alone: as many images as COCO's training set, their sizes drawn from those of the json, seen with
the published augmentation in the order of the stream. "as shuffled" is data.similar_sizes=false, as the usual loaders
have it. A batch is padded to its largest height and width. The slowest rank is the one with the most pixels,
padding included; what it does more is counted against the mean of the images' own pixels.
"""

import argparse
import json
from functools import partial
from pathlib import Path

import numpy as np
from ddetr.data.config import DataConfig
from ddetr.data.layout import SAMPLE_DTYPE
from ddetr.data.plan import StepPlan
from ddetr.data.stream import seen_sizes

CASES = ((2, 1), (4, 1), (16, 1), (2, 8), (4, 8), (8, 8), (4, 64), (4, 256))  # images of a rank, ranks
SHARD_SIZE, STEPS = 400, 3000


def figures(rows: np.ndarray, images: int, ranks: int, similar: bool) -> tuple[float, float]:
    """(share of padding, pixels of the slowest rank by those of the mean one without padding)."""
    config = DataConfig()
    sizes_of = partial(seen_sizes, rows, config, 0)
    whole, left = divmod(len(rows), SHARD_SIZE)
    shards = (SHARD_SIZE,) * whole + ((left,) if left else ())
    plan = StepPlan(
        shards, images * ranks, 1, 0, ranks, 0, config.shuffle_window, seen_sizes=sizes_of if similar else None
    )
    real = padded = slowest = 0
    for number, batch in enumerate(plan.batches(0)):
        if number == STEPS:
            break
        sizes = sizes_of(0, batch).reshape(ranks, images, 2)
        pixels = sizes.max(1).prod(-1) * images
        real, padded, slowest = real + sizes.prod(-1).sum(), padded + pixels.sum(), slowest + pixels.max() * ranks
    return 1 - real / padded, slowest / real


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("annotations", type=Path)
    parser.add_argument("--images", type=int, default=118_000)
    options = parser.parse_args()
    given = [(image["height"], image["width"]) for image in json.loads(options.annotations.read_bytes())["images"]]
    rows = np.zeros(options.images, dtype=SAMPLE_DTYPE)
    chosen = np.random.default_rng(0).integers(len(given), size=options.images)
    rows["image_id"] = np.arange(options.images)
    rows["height"], rows["width"] = np.array(given)[chosen].T
    print(f"{options.images} images of {len(given)} sizes")
    names = ["images a rank", "ranks", "padding, as shuffled", "of similar sizes", "slowest rank, as shuffled"]
    names.append("of similar sizes")
    print(f"| {' | '.join(names)} |")
    print("| --- " * 6 + "|")
    for images, ranks in CASES:
        (share, slow), (similar_share, similar_slow) = (
            figures(rows, images, ranks, similar) for similar in (False, True)
        )
        shares = f"{100 * share:.1f} % | {100 * similar_share:.1f} % | {slow:.2f} | {similar_slow:.2f}"
        print(f"| {images} | {ranks} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
