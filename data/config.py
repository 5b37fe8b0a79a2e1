"""The `data` section of the configuration."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .location import Location

MOST_PIXELS = 250_000_000  # of an image; the largest real photograph tried has 182 million
LONGEST_SIDE = 16384  # that a setting can ask for: the upper bounds below are for configurations of strangers


class DataConfig(BaseModel):
    """Where the shards are and how images become batches.

    Sizes are pixels. `train` and `validation` are folders written by `ddetr data pack`, on a disk or where they were
    copied to: http(s)://host/folder, s3://bucket/prefix, or pipe:COMMAND with {} in place of a file's name.
    The defaults are the published augmentation (Deformable DETR inherits it from DETR, appendix A.4).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    train: Location | None = None
    validation: Location | None = None
    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    validation_short_side: int = Field(default=800, gt=0, le=LONGEST_SIDE)
    long_side: int = Field(
        default=1333, gt=0, le=LONGEST_SIDE, description="most that a side of an image as the model sees it measures"
    )
    crop: bool = Field(
        default=True, description="half of the time resize to crop_resize_short_sides, crop, then resize"
    )
    crop_resize_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_sizes: tuple[int, int] = (384, 600)
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    workers: int = Field(
        default=2, ge=0, le=1024, description="loader processes per rank; 0 loads in the training process"
    )
    shuffle_window: int = Field(
        default=8192, gt=0, le=1 << 32, description="samples shuffled together; bounds how far a sample moves"
    )
    similar_sizes: bool = Field(
        default=True, description="images of one step have about the same size, so that little is padded"
    )
    remainder: Literal["drop", "pad"] = Field(
        default="drop",
        description="images left over at an epoch's end: left out, or a step filled up with empty ones",
    )
    most_bad_samples: float = Field(
        default=0.001, ge=0, le=1, description="share of the images that may be damaged before a run stops"
    )
    most_pixels: int = Field(
        default=MOST_PIXELS,
        gt=0,
        le=2_000_000_000,
        description="of an image as stored; one that states more is bad, before any of it is decoded",
    )
    fetch: Literal["shards", "samples"] = Field(
        default="shards",
        description="from a remote source: whole shards into the cache; or each time the samples that a rank needs",
    )
    cache: Location = Field(
        default=Location("~/.cache/ddetr/shards"), description="folder for shards that are not on a disk"
    )
    cache_bytes: int = Field(default=100 << 30, gt=0, le=1 << 60, description="most that folder holds")
    fetch_attempts: int = Field(
        default=8, gt=0, le=1000, description="in a row that bring nothing, before a source is given up"
    )
    fetch_timeout_seconds: float = Field(default=30.0, gt=0, le=3600, description="how long a source may be silent")

    @model_validator(mode="after")
    def _sizes_are_positive_and_ordered(self) -> "DataConfig":
        for name in ("short_sides", "crop_resize_short_sides", "crop_sizes"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) <= 0:
                raise ValueError(f"{name} must hold positive sizes in pixels, got {list(sizes)}")
            if max(sizes) > LONGEST_SIDE or len(sizes) > 1000:
                raise ValueError(f"{name} must hold at most 1000 sizes of at most {LONGEST_SIDE} pixels")
        if self.crop_sizes[0] > self.crop_sizes[1]:
            raise ValueError(f"crop_sizes must be (smallest, largest), got {list(self.crop_sizes)}")
        return self
