"""`ddetr data stats`: what a set holds, what the detector sees of it, and which settings do not fit it."""

from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.table import Table

from ..core.config import Config
from ..data.config import DataConfig
from ..data.index import ShardIndex
from ..data.plan import StepPlan
from ..data.statistics import read_objects
from ..data.stream import seen_sizes
from ..data.views import evaluation_sizes
from .console import Terminal, brief, progress_bar

SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, np.inf)}  # area in pixels, as COCO has them
ASPECTS = ("below 1:2", "1:2 to 3:4", "3:4 to 1:1", "1:1 to 4:3", "4:3 to 2:1", "above 2:1")  # width to height
ASPECT_EDGES = (1 / 2, 3 / 4, 1.0, 4 / 3 + 1e-9, 2 + 1e-9)
FINEST_STRIDE = 8  # pixels of the image under one position of the finest feature map (paper, appendix A.1)
STEPS = 500  # of an epoch, for the share of padding


def stats(shards: Path, config: Config, ranks: int) -> None:
    """Print a set's images, its objects by class and size, both as the detector sees them, and settings to change."""
    index = ShardIndex.load(shards)
    with progress_bar() as progress:
        objects = read_objects(index, progress=progress)
    console = Terminal(soft_wrap=True)
    console.print(_images(index, objects))
    console.print(_shapes(index))
    console.print(_classes(index, objects))
    console.print(_as_seen(index, objects, config, ranks))
    suggested = suggestions(index, objects, config)
    console.print("settings to change:" if suggested else "no setting needs to be changed for this set")
    for setting, reason in suggested:
        console.print(f"  {setting}: {reason}")


def _table(title: str, *columns: str) -> Table:
    table = Table(*columns, title=title, title_justify="left", caption_justify="left")
    table.columns[0].overflow = "fold"  # a name loses nothing where the table is narrow
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _images(index: ShardIndex, objects: np.ndarray) -> Table:
    rows = index.samples
    per_image = _objects_of_images(index, objects)
    table = _table(f"images of {index.location}", "what", "number")
    table.add_row("images", f"{len(rows):,}")
    table.add_row("images without objects", f"{(per_image == 0).sum():,}")
    table.add_row("shards", f"{len(index.shards):,}")
    table.add_row("size of the shards", f"{sum(shard.bytes for shard in index.shards) / 2**20:,.1f} MiB")
    table.add_row("size of an image file, mean", f"{rows['image_bytes'].mean() / 2**10:,.1f} KiB")
    for name, sides in (("short", np.minimum), ("long", np.maximum)):
        low, middle, high = np.quantile(sides(rows["height"], rows["width"]), (0, 0.5, 1))
        table.add_row(f"{name} side: least, median, most", f"{low:.0f}, {middle:.0f}, {high:.0f} pixels")
    table.add_row("objects", f"{int((~objects['iscrowd']).sum()):,}")
    table.add_row("crowds", f"{int(objects['iscrowd'].sum()):,}")
    shown = f"{per_image.mean():.1f}, {np.median(per_image):.0f}, {per_image.max()}"
    table.add_row("objects in an image: mean, median, most", shown)
    return table


def _shapes(index: ShardIndex) -> Table:
    rows = index.samples
    counts = np.bincount(np.searchsorted(ASPECT_EDGES, rows["width"] / rows["height"], side="right"), minlength=6)
    table = _table("aspect ratios, width to height", "ratio", "images", "share (%)")
    for name, count in zip(ASPECTS, counts.tolist(), strict=True):
        table.add_row(name, f"{count:,}", f"{100 * count / len(rows):.1f}")
    return table


def _classes(index: ShardIndex, objects: np.ndarray) -> Table:
    single = objects[~objects["iscrowd"]]
    table = _table("objects by class and size", "class", "id", "images", "objects", "share (%)", *SIZES, "crowds")
    table.caption = "small: area below 32^2 pixels of the stored image, medium: below 96^2, as COCO counts them"
    counts = np.bincount(single["label"], minlength=len(index.categories))
    for label in np.argsort(-counts, kind="stable").tolist():
        own = single[single["label"] == label]
        crowds = np.count_nonzero(objects["iscrowd"] & (objects["label"] == label))
        cells = len(np.unique(own["sample"])), len(own), 100 * len(own) / max(1, len(single)), *by_size(own), crowds
        shown = [f"{cell:.1f}" if isinstance(cell, float) else f"{cell:,}" for cell in cells]
        table.add_row(brief(index.categories.names[label]), str(index.categories.ids[label]), *shown)
    table.add_section()
    total = [f"{number:,}" for number in (len(np.unique(single["sample"])), len(single))]
    sizes = [f"{number:,}" for number in (*by_size(single), int(objects["iscrowd"].sum()))]
    table.add_row("all", "", *total, "100.0", *sizes)
    return table


def by_size(objects: np.ndarray) -> list[int]:
    """How many are small, medium and large."""
    return [int(((objects["area"] >= low) & (objects["area"] < high)).sum()) for low, high in SIZES.values()]


def _as_seen(index: ShardIndex, objects: np.ndarray, config: Config, ranks: int) -> Table:
    data, rows = config.data, index.samples
    short_sides = _seen_short_sides(index, objects, data)
    table = _table("as the detector sees them", "what", "number")
    scale = np.median(evaluation_sizes(rows["height"], rows["width"], data).min(1) / _short_sides(index))
    table.add_row("images are resized by, evaluation, median", f"{scale:.2f}")
    if len(short_sides):
        low, middle, high = np.quantile(short_sides, (0.05, 0.5, 0.95))
        table.add_row("objects' short sides: 5 %, median, 95 %", f"{low:.0f}, {middle:.0f}, {high:.0f} pixels")
        below = 100 * (short_sides < FINEST_STRIDE).mean()
        table.add_row(f"objects thinner than {FINEST_STRIDE} pixels, the finest stride", f"{below:.1f} %")
    steps = index.num_samples // config.train.batch_size
    for name, similar in (("images of similar size together", True), ("as shuffled", False)) if steps else ():
        share = padding_share(index, config, ranks, similar)
        images = config.train.batch_size // (ranks * config.train.accumulation)
        table.add_row(f"padding, {images} images a rank, {name}", f"{100 * share:.1f} %")
    return table


def padding_share(index: ShardIndex, config: Config, ranks: int, similar: bool) -> float:
    """Padded pixels by all pixels of the training batches of the first steps of epoch 0; pure arithmetic."""
    train = config.train
    sizes = partial(seen_sizes, index.samples, config.data, train.seed)
    plan = StepPlan(
        shard_sizes=tuple(len(shard.samples) for shard in index.shards),
        batch_size=train.batch_size,
        accumulation=train.accumulation,
        rank=0,
        world_size=ranks,
        seed=train.seed,
        window=config.data.shuffle_window,
        seen_sizes=sizes if similar else None,
    )
    real = padded = 0
    for batch in islice(plan.batches(0), STEPS):
        seen = sizes(0, batch).reshape(-1, plan.micro_batch_size, 2)
        real += int(seen.prod(-1).sum())
        padded += int(seen.max(1).prod(-1).sum()) * plan.micro_batch_size
    return 1 - real / padded


def suggestions(index: ShardIndex, objects: np.ndarray, config: Config) -> list[tuple[str, str]]:
    """(setting, reason) of what does not fit the set."""
    found, data, model = [], config.data, config.model
    if len(index.categories) != model.num_classes:
        found.append((f"model.num_classes={len(index.categories)}", f"the set has that many, not {model.num_classes}"))
    most = int(_objects_of_images(index, objects).max())
    if most > model.queries:
        needed = -(-most * 3 // 2 // 50) * 50
        reason = f"an image has {most} objects; what goes beyond {model.queries} queries is never found"
        found.append((f"model.queries={needed}", reason))
    if most > config.eval.top_k:
        found.append((f"eval.top_k={most}", f"an image has {most} objects; predictions are cut at {config.eval.top_k}"))
    scales = evaluation_sizes(index.samples["height"], index.samples["width"], data).min(1) / _short_sides(index)
    scale, thin = float(np.median(scales)), _seen_short_sides(index, objects, data) < FINEST_STRIDE
    if scale > 2.5:
        side = round(1.5 * float(np.median(_short_sides(index))) / 32) * 32
        settings = f"data.validation_short_side={side} data.short_sides={_below(side)}"
        found.append((settings, f"images are enlarged {scale:.1f} times: much to compute, nothing more to see"))
    elif scale < 1 and len(thin) and thin.mean() > 0.1:
        side = round(float(np.median(_short_sides(index))) / 32) * 32
        long_side = round(float(np.median(index.samples["height"] + index.samples["width"])) - side)
        settings = f"data.validation_short_side={side} data.short_sides={_below(side)} "
        reason = f"{100 * thin.mean():.0f} % of the objects are thinner than {FINEST_STRIDE} pixels after shrinking"
        found.append((f"{settings}data.long_side={long_side}", reason))
    steps, left = divmod(index.num_samples, config.train.batch_size)
    if data.remainder == "drop" and steps and left / index.num_samples > 0.05:
        reason = f"each epoch leaves out {left} of {index.num_samples} images, as many as fill no batch"
        found.append(("data.remainder=pad", reason))
    if steps == 0:
        found.append((f"train.batch_size={index.num_samples}", "or fewer: the set has no more images"))
    return found


def _below(side: int) -> str:
    """Short sides for training up to one for evaluation, spaced like the published ones up to 800."""
    sides = dict.fromkeys(max(8, round(side * share / 800) * 8) for share in range(60, 101, 4))
    return f"[{','.join(map(str, sides))}]"


def _objects_of_images(index: ShardIndex, objects: np.ndarray) -> np.ndarray:
    return np.bincount(objects["sample"][~objects["iscrowd"]], minlength=index.num_samples)


def _short_sides(index: ShardIndex) -> np.ndarray:
    return np.minimum(index.samples["height"], index.samples["width"])


def _seen_short_sides(index: ShardIndex, objects: np.ndarray, data: DataConfig) -> np.ndarray:
    """Of each object that is no crowd, in pixels at evaluation."""
    single = objects[~objects["iscrowd"]]
    rows = index.samples[single["sample"]]
    scale = evaluation_sizes(rows["height"], rows["width"], data) / np.stack((rows["height"], rows["width"]), -1)
    return np.minimum(single["height"] * scale[:, 0], single["width"] * scale[:, 1])
