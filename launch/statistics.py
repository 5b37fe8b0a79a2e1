"""`ddetr data stats`: what a set holds, what the detector sees of it, and which settings do not fit it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path

import numpy as np
from rich.table import Table

from ..core.config import Config, ConfigError, changed, with_classes
from ..core.evaluation.scores import headline, most_detections
from ..core.overrides import read
from ..data.config import LONGEST_SIDE, DataConfig
from ..data.index import ShardIndex, lack_of_objects
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
    if lack := lack_of_objects(len(objects), int(objects["iscrowd"].sum())):
        console.print(
            f"{lack}: no detector can be trained on this set, and evaluations on it give no {headline(index.protocol)}"
        )
        return
    suggested = suggestions(index, objects, config, ranks)
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
    """How many objects are small, medium and large."""
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
    """The share of padding among all pixels of the training batches of the first STEPS steps of epoch 0."""
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


@dataclass(frozen=True)
class _Set:
    """What the checks look at. ranks: processes that will train."""

    index: ShardIndex
    objects: np.ndarray
    ranks: int

    @cached_property
    def single(self) -> np.ndarray:
        """Rows of the objects that are no crowds."""
        return self.objects[~self.objects["iscrowd"]]

    @cached_property
    def per_image(self) -> np.ndarray:
        return _objects_of_images(self.index, self.objects)


_Remedies = Iterator[tuple[str, str]]  # (settings, reason), the better ones first; none where nothing is wrong


def suggestions(index: ShardIndex, objects: np.ndarray, config: Config, ranks: int = 1) -> list[tuple[str, str]]:
    """(settings, reason) of what does not fit the set; each to be taken together with those before it.

    Each is tried: a remedy is only advised if its check finds nothing any more, and the checks before it that found
    nothing still do not. So when all are taken, nothing more is advised: with each remedy, the row of what the checks
    find, read as a binary number, gets smaller. What is advised depends on the configuration alone.
    Nothing is advised for a set without objects.
    """
    seen, found = _Set(index, objects, ranks), []
    if _is_trained_on(index, config):
        config = with_classes(config, len(index.categories))
    while len(seen.single) and (remedy := _remedy(seen, config)) is not None:
        settings, reason, config = remedy
        found.append((settings, reason))
    return found


def _remedy(seen: _Set, config: Config) -> tuple[str, str, Config] | None:
    """The first remedy that works: settings, reason, and the configuration with it."""
    nothing_found = []
    for check in _CHECKS if _is_trained_on(seen.index, config) else (_top_k,):
        remedies = list(check(seen, config))
        for settings, reason in remedies:
            changes = [setting for setting in settings.split() if not _is_set(setting, config)]
            try:
                changed_config = changed(config, changes, settings)
            except ConfigError:  # more than may be set
                continue
            if not any(list(other(seen, changed_config)) for other in (*nothing_found, check)):
                return " ".join(changes), reason, changed_config
        if not remedies:
            nothing_found.append(check)
    return None


def _is_trained_on(index: ShardIndex, config: Config) -> bool:
    """Not a set that is the configuration's for validation alone: what trains is another set's business."""
    train, validation = (
        location is not None
        and not location.is_remote
        and Path(location).resolve() == Path(index.real_location).resolve()
        for location in (config.data.train, config.data.validation)
    )
    return train or not validation or config.data.train is None


def _is_set(setting: str, config: Config) -> bool:
    (section, key), value = read(setting, Config)
    return config.model_dump(mode="json")[section][key] == value


def _num_classes(seen: _Set, config: Config) -> _Remedies:
    number = len(seen.index.categories)
    if number != config.model.num_classes:
        yield f"model.num_classes={number}", f"the set has that many, not {config.model.num_classes}"


def _sizes(seen: _Set, config: Config) -> _Remedies:
    """Images much enlarged, and objects that shrinking makes thinner than the finest stride."""
    rows = seen.index.samples
    short_sides, long_sides = _short_sides(seen.index), np.maximum(rows["height"], rows["width"])
    scale = float(np.median(evaluation_sizes(rows["height"], rows["width"], config.data).min(1) / short_sides))
    if scale > 2.5:
        side = _in_eights(1.5 * float(np.median(short_sides)))
        settings = f"data.validation_short_side={side} data.short_sides={_below(side)}"
        yield settings, f"images are enlarged {scale:.1f} times: much to compute, nothing more to see"
    thin = _seen_short_sides(seen.index, seen.objects, config.data) < FINEST_STRIDE
    lost = thin & (np.minimum(seen.single["width"], seen.single["height"]) >= FINEST_STRIDE)
    for share in (0.5, 0.9) if lost.mean() > 0.1 else ():
        side, long_side = (_in_eights(float(np.quantile(sides, share))) for sides in (short_sides, long_sides))
        settings = f"data.validation_short_side={side} data.short_sides={_below(side)} data.long_side={long_side}"
        reason = f"{100 * lost.mean():.0f} % of the objects get thinner than {FINEST_STRIDE} pixels by shrinking"
        yield settings, reason


def _queries(seen: _Set, config: Config) -> _Remedies:
    queries = config.model.queries
    most = int(np.minimum(seen.per_image, _places(seen, config)).max())
    if most > queries:
        reason = f"an image has {seen.per_image.max()} objects; what goes beyond {queries} queries is never found"
        yield f"model.queries={-(-most * 3 // 2 // 50) * 50}", reason


def _top_k(seen: _Set, config: Config) -> _Remedies:
    model, top_k = config.model, most_detections(config.eval, seen.index.protocol)
    detections = np.minimum(model.queries, _places(seen, config))
    if model.classification == "sigmoid":
        detections = detections * model.num_classes
    most = int(np.minimum(seen.per_image, detections).max())
    if most > top_k:
        reason = f"an image has {seen.per_image.max()} objects; predictions are cut at {top_k}"
        yield f"eval.top_k={most}", reason


def _batch_size(seen: _Set, config: Config) -> _Remedies:
    images, ranks, train = seen.index.num_samples, seen.ranks, config.train
    if train.batch_size <= images:
        return
    for accumulation in dict.fromkeys((train.accumulation, 1)):
        if size := images // (ranks * accumulation) * ranks * accumulation:
            settings = f"train.batch_size={size} train.accumulation={accumulation}"
            yield settings, f"or fewer: the set has {images} images"
            return
    if config.data.remainder == "drop":
        yield "data.remainder=pad", f"the set has {images} images, fewer than there are ranks"


def _remainder(seen: _Set, config: Config) -> _Remedies:
    images = seen.index.num_samples
    steps, left = divmod(images, config.train.batch_size)
    if config.data.remainder == "drop" and steps and left / images > 0.05:
        yield "data.remainder=pad", f"each epoch leaves out {left} of {images} images, as many as fill no batch"


_CHECKS = (_num_classes, _sizes, _queries, _top_k, _batch_size, _remainder)


def _places(seen: _Set, config: Config) -> np.ndarray:
    """(images,) how many boxes the first stage can propose in each; infinite without a first stage."""
    model, rows = config.model, seen.index.samples
    if not model.two_stage:
        return np.full(len(rows), np.inf)
    sides = evaluation_sizes(rows["height"], rows["width"], config.data)
    strides = [FINEST_STRIDE << level for level in range(model.levels)]
    if model.levels == 1:
        strides = [16 if model.dilation else 32]
    return np.sum([(-(-sides // stride)).prod(-1) for stride in strides], axis=0)


def _in_eights(pixels: float) -> int:
    return min(max(8, -(-round(pixels) // 8) * 8), LONGEST_SIDE)


def _below(side: int) -> str:
    """Short sides for training up to one for evaluation, spaced like the published ones up to 800."""
    sides = dict.fromkeys(max(8, round(side * share / 800) * 8) for share in range(60, 101, 4))
    return f"[{','.join(map(str, sides))}]"


def _objects_of_images(index: ShardIndex, objects: np.ndarray) -> np.ndarray:
    return np.bincount(objects["sample"][~objects["iscrowd"]], minlength=index.num_samples)


def _short_sides(index: ShardIndex) -> np.ndarray:
    return np.minimum(index.samples["height"], index.samples["width"])


def _seen_short_sides(index: ShardIndex, objects: np.ndarray, data: DataConfig) -> np.ndarray:
    """The short side of each object that is no crowd, in pixels at evaluation."""
    single = objects[~objects["iscrowd"]]
    rows = index.samples[single["sample"]]
    scale = evaluation_sizes(rows["height"], rows["width"], data) / np.stack((rows["height"], rows["width"]), -1)
    return np.minimum(single["height"] * scale[:, 0], single["width"] * scale[:, 1])
