"""The `data` section of the configuration."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from .location import Location
from .setting import Section, setting

MOST_PIXELS = 250_000_000  # of an image; the largest real photograph tried has 182 million
LONGEST_SIDE = 16384  # that a setting can ask for: the upper bounds below are for untrusted configurations

MOST_SIDES = 1000  # to choose from

_Side = Annotated[int, Field(gt=0, le=LONGEST_SIDE)]


class DataConfig(Section):
    """Where the shards are and how images become batches.

    Sizes are pixels. `train` and `validation` are folders written by `ddetr data pack`, on a disk or where they were
    copied to: http(s)://host/folder, s3://bucket/prefix, or pipe:COMMAND with {} in place of a file's name.
    The defaults are the published augmentation (Deformable DETR inherits it from DETR, appendix A.4).
    """

    train: Location | None = setting(None, "shards to train on: a folder that `ddetr data pack` wrote, or its address")
    validation: Location | None = setting(None, "shards to evaluate on while training, and for `ddetr eval`")
    short_sides: tuple[_Side, ...] = setting(
        (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
        "multi-scale augmentation: a training image is resized so that its short side is one of these",
        unit="pixels",
    )
    validation_short_side: int = setting(
        800, "short side of an image in evaluation and prediction", unit="pixels", gt=0, le=LONGEST_SIDE
    )
    long_side: int = setting(
        1333,
        "upper limit of the long side of an image, in training and evaluation",
        unit="pixels",
        gt=0,
        le=LONGEST_SIDE,
    )
    crop: bool = setting(
        True, "random-crop augmentation: half of the time resize to crop_resize_short_sides, crop, then resize"
    )
    crop_resize_short_sides: tuple[_Side, ...] = setting(
        (400, 500, 600), "short sides, one of which an image has before a random crop", unit="pixels"
    )
    crop_sizes: tuple[_Side, _Side] = setting(
        (384, 600), "smallest and largest height and width of a random crop", unit="pixels"
    )
    flip_probability: float = setting(
        0.5, "horizontal-flip augmentation: how often an image is mirrored", unit="probability", ge=0, le=1
    )
    workers: int = setting(
        2,
        "data loader workers: processes that read and augment images; 0 does that in the training process",
        unit="processes per rank",
        ge=0,
        le=1024,
    )
    shuffle_window: int = setting(
        8192,
        "shuffle buffer: number of consecutive images that are shuffled together",
        unit="images",
        gt=0,
        le=1 << 32,
    )
    similar_sizes: bool = setting(
        True, "size bucketing: images of one step have about the same size, so that little is padded"
    )
    remainder: Literal["drop", "pad"] = setting(
        "drop", "images left over at an epoch's end: drop leaves them out; pad fills the last step up with empty images"
    )
    most_bad_samples: float = setting(
        0.001,
        "how many images may be damaged before a run or an evaluation stops",
        unit="share of the images of the set",
        ge=0,
        le=1,
    )
    most_pixels: int = setting(
        MOST_PIXELS,
        "size limit of an image as stored; one that states more is bad, before any of it is decoded",
        unit="pixels",
        gt=0,
        le=2_000_000_000,
    )
    fetch: Literal["shards", "samples"] = setting(
        "shards", "what is fetched from a remote source: whole shards, into the cache; or the samples that a rank needs"
    )
    cache: Location = setting(Location("~/.cache/ddetr/shards"), "folder for copies of shards that are not on a disk")
    cache_bytes: int = setting(100 << 30, "size limit of the cache", unit="bytes", gt=0, le=1 << 60)
    fetch_attempts: int = setting(
        8,
        "retries: consecutive failed attempts after which a remote source is given up",
        unit="attempts",
        gt=0,
        le=1000,
    )
    fetch_timeout_seconds: float = setting(
        30.0, "timeout: how long a remote source may be silent", unit="seconds", gt=0, le=3600
    )

    def misfits(self) -> Iterator[str]:
        for name in ("short_sides", "crop_resize_short_sides"):
            if not 1 <= len(sizes := getattr(self, name)) <= MOST_SIDES:
                yield f"{name} must hold 1 to {MOST_SIDES} sizes in pixels, got {len(sizes)}"
        if self.crop_sizes[0] > self.crop_sizes[1]:
            yield f"crop_sizes must be (smallest, largest), got {list(self.crop_sizes)}"
