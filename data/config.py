"""The `data` section of the configuration."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class DataConfig(BaseModel):
    """Where the shards are and how images become batches.

    Sizes are pixels. `train` and `validation` are folders written by `ddetr data pack`.
    The defaults are the published augmentation (Deformable DETR inherits it from DETR, appendix A.4).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str | None = None
    validation: str | None = None
    short_sides: tuple[int, ...] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)
    validation_short_side: int = Field(default=800, gt=0)
    long_side: int = Field(default=1333, gt=0)
    crop: bool = Field(
        default=True, description="half of the time resize to crop_resize_short_sides, crop, then resize"
    )
    crop_resize_short_sides: tuple[int, ...] = (400, 500, 600)
    crop_sizes: tuple[int, int] = (384, 600)
    flip_probability: float = Field(default=0.5, ge=0, le=1)
    workers: int = Field(default=2, ge=0, description="loader processes per rank; 0 loads in the training process")
    shuffle_window: int = Field(
        default=8192, gt=0, description="samples shuffled together; bounds how far a sample moves"
    )

    @model_validator(mode="after")
    def _sizes_are_positive_and_ordered(self) -> "DataConfig":
        for name in ("short_sides", "crop_resize_short_sides", "crop_sizes"):
            sizes = getattr(self, name)
            if not sizes or min(sizes) <= 0:
                raise ValueError(f"{name} must hold positive sizes in pixels, got {list(sizes)}")
        if self.crop_sizes[0] > self.crop_sizes[1]:
            raise ValueError(f"crop_sizes must be (smallest, largest), got {list(self.crop_sizes)}")
        return self
