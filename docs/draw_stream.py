"""Draw docs/images/stream.svg: from shards to one rank's batches, with the real plan of a small set.

python docs/draw_stream.py
"""

import sys
from functools import partial
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from ddetr.data.batch import layout
from ddetr.data.config import DataConfig
from ddetr.data.layout import SAMPLE_DTYPE
from ddetr.data.plan import NOTHING, StepPlan, epoch_order
from ddetr.data.stream import seen_sizes
from picture.canvas import Box, Canvas, code, quiet

PICTURE = Path(__file__).parent / "images/stream.svg"
TITLE = "The training stream: from shards to one rank's batches"
SHARDS, BATCH, RANKS, WINDOW, SEED, EPOCH = (12, 9, 12, 11), 8, 2, 16, 3, 0
SIZES = ((480, 640), (640, 480), (427, 640), (640, 427), (500, 375), (375, 500), (612, 612), (333, 500))
COLOURS = ("#79c0ff", "#ffc680", "#9be9a8", "#e2c5ff")  # of the shards
CELL = 24
WIDTH, HEIGHT = 1400, 1010


def sample_rows() -> np.ndarray:
    """The index's rows of the set: sizes as COCO has them."""
    rows = np.zeros(sum(SHARDS), dtype=SAMPLE_DTYPE)
    rows["image_id"] = np.arange(len(rows))
    rows["height"], rows["width"] = np.array([SIZES[i % len(SIZES)] for i in range(len(rows))]).T
    return rows


def plan_of(rank: int) -> StepPlan:
    sizes = partial(seen_sizes, sample_rows(), DataConfig(), SEED)
    return StepPlan(SHARDS, BATCH, 1, rank, RANKS, SEED, WINDOW, remainder="pad", seen_sizes=sizes)


def shard_of(sample: int) -> int:
    return int(np.searchsorted(np.cumsum(SHARDS), sample, side="right"))


def cell(canvas: Canvas, x: float, y: float, sample: int) -> None:
    """A sample in its shard's colour, with the shape that it is seen at; an empty place is hatched."""
    fill = "url(#padding)" if sample == NOTHING else COLOURS[shard_of(sample)]
    side = CELL - 2
    canvas.raw(f'<rect x="{x:.1f}" y="{y:.1f}" width="{side}" height="{side}" rx="3" fill="{fill}"/>')
    if sample != NOTHING:
        height, width = (
            float(s) * 17 / 1333 for s in seen_sizes(sample_rows(), DataConfig(), SEED, EPOCH, [sample])[0]
        )
        left, top = x + (side - width) / 2, y + (side - height) / 2
        shape = f'width="{width:.1f}" height="{height:.1f}"'
        canvas.raw(f'<rect x="{left:.1f}" y="{top:.1f}" {shape} fill="#fff" fill-opacity=".75" stroke="#24292f"/>')


def drawing() -> str:
    """Raises ValueError when something overlaps or does not fit."""
    canvas = Canvas(WIDTH, HEIGHT)
    canvas.text(20, 40, TITLE, "title")
    about = (
        f"Drawn from the real plan: {sum(SHARDS)} images, global batch {BATCH}, {RANKS} ranks, windows of {WINDOW} "
        "images, data.remainder=pad. A cell is an image: its colour is its shard, its frame the shape it is seen at."
    )
    canvas.text(20, 66, about, "body")
    shards(canvas, 84)
    order(canvas, 206)
    steps(canvas, 392)
    worker(canvas, 690)
    if problems := canvas.problems():
        raise ValueError("\n".join(problems))
    return canvas.svg(TITLE)


def shards(canvas: Canvas, top: float) -> None:
    canvas.zone(1, "Shards", "tar files, on a disk or fetched into data.cache", Box(20, top, WIDTH - 40, 108))
    first, x = 0, 40.0
    for number, size in enumerate(SHARDS):
        canvas.text(x, top + 58, f"shard-{number:06d}.tar", "code")
        for place in range(size):
            cell(canvas, x + place * CELL, top + 68, first + place)
        first, x = first + size, x + max(size * CELL, 200) + 40


def order(canvas: Canvas, top: float) -> None:
    about = "a function of (seed, epoch, shards, window, global batch) alone: plan.py"
    canvas.zone(2, "The order of an epoch", about, Box(20, top, WIDTH - 40, 172))
    starts = np.cumsum((0, *SHARDS))
    window = WINDOW // BATCH * BATCH
    shuffled = epoch_order(SHARDS, seed=SEED, epoch=EPOCH, window=window)
    permuted = epoch_order(SHARDS, seed=SEED, epoch=EPOCH, window=1)
    turns = list(dict.fromkeys(shard_of(int(sample)) for sample in permuted))
    rows = (
        ("shards in random order", np.concatenate([np.arange(starts[i], starts[i + 1]) for i in turns])),
        ("images shuffled inside windows", shuffled),
    )
    for row, (name, samples) in enumerate(rows):
        y = top + 52 + 62 * row
        canvas.text(40, y + 15, name, "body")
        for place, sample in enumerate(samples.tolist()):
            cell(canvas, 260 + place * CELL + row * 8 * (place // window), y, sample)
    for number in range(-(-len(shuffled) // window)):
        x, size = 260 + number * (window * CELL + 8), min(window, len(shuffled) - number * window)
        canvas.text(x + size * CELL / 2, top + 160, f"window {number}", "quiet", "middle")


def steps(canvas: Canvas, top: float) -> None:
    about = "images of similar size together, then the steps of a window in random order; ranks divide each step"
    canvas.zone(3, "Steps", about, Box(20, top, WIDTH - 40, 282))
    plans = [plan_of(rank) for rank in range(RANKS)]
    total = plans[0].steps_per_epoch
    share = BATCH // RANKS
    parts = [[samples for _, samples in islice(plan.micro_batches(EPOCH), total)] for plan in plans]
    for rank in range(RANKS):
        canvas.text(40, top + 92 + 52 * rank, f"rank {rank}", "strong")
    per_window = WINDOW // BATCH
    for step in range(total):
        x = 120 + 206 * step
        canvas.text(x, top + 62, f"step {step}", "head")
        if step % per_window == 0:
            canvas.text(x + 60, top + 62, f"window {step // per_window}", "quiet")
        for rank in range(RANKS):
            box = canvas.box("data", Box(x, top + 72 + 52 * rank, share * CELL + 14, 38))
            for place, sample in enumerate(parts[rank][step]):
                cell(canvas, box.x + 8 + place * CELL, box.y + 8, sample)
        canvas.text(x, top + 190, f"rank 0: worker {step % 2}", "quiet")
    canvas.text(120 + 206 * (total - 1), top + 206, "hatched: places without image", "quiet")
    y = top + 226
    canvas.lines(
        40,
        y,
        [
            "A run stopped after step 2 goes on at (epoch 0, step 3): these two numbers are the whole position. Any "
            "number of ranks and of workers gets the same steps;",
            "each image's augmentation is a hash of (seed, epoch, image id). Shards whose images are all taken are not "
            "opened again.",
        ],
    )


def worker(canvas: Canvas, top: float) -> None:
    canvas.zone(4, "A worker", "one micro-batch after another: stream.py", Box(20, top, WIDTH - 40, 300))
    stages = (
        ("planned", "sample numbers", "of every other micro-batch:", "workers take turns", "data/plan.py"),
        (
            "read",
            "bytes by offset from the shard,",
            "CRC-32 verified; a damaged one",
            "leaves an empty place",
            "data/index.py",
        ),
        (
            "augment",
            "rectangle and size drawn;",
            "JPEG decoded, resampled once;",
            "boxes carried along",
            "data/transforms.py",
        ),
        ("packed", "images padded, boxes in a row:", "one tensor of bytes,", "in shared memory", "data/batch.py"),
    )
    boxes = []
    for number, (title, *lines, place) in enumerate(stages):
        box = Box(40 + 330 * number, top + 50, 270, 104)
        boxes.append(canvas.box("compute", box, title, list(lines), place))
    for one, other in pairwise(boxes):
        canvas.arrow(one.right(), other.left())
    x, y, height = 40.0, top + 208, 46
    canvas.text(
        x, y - 12, "What leaves the worker, 4 images with 29 boxes: tensors one after another in one of bytes", "strong"
    )
    for name, (dtype, shape) in layout(4, 736, 992, 29).items():
        wide = 250 if name == "images" else 150
        dtype_name = str(dtype).removeprefix("torch.")
        canvas.box("data", Box(x, y, wide, height), "", [code(name), quiet(f"{dtype_name} {shape}")])
        x += wide + 4
    canvas.arrow(boxes[-1].bottom(0.3), (boxes[-1].bottom(0.3)[0], y))
    then = "Then to the trainer: pinned where there is a GPU, copied to it, normalised there; "
    canvas.text(40, top + 284, f"{then}the padding mask is made there from the sizes.")


if __name__ == "__main__":
    PICTURE.write_text(drawing())
    sys.exit(0)
