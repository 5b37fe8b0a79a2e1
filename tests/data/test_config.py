"""Bounds of settings that a stranger's configuration could inflate."""

import pytest
from ddetr.data.config import DataConfig
from pydantic import ValidationError

LARGE = {
    "workers": (1024, 1025),
    "validation_short_side": (16384, 16385),
    "long_side": (16384, 16385),
    "short_sides": ((16384,), (800, 16385)),
    "crop_resize_short_sides": ((16384,), (16385,)),
    "crop_sizes": ((384, 16384), (384, 16385)),
    "fetch_attempts": (1000, 1001),
    "fetch_timeout_seconds": (3600, float("inf")),
    "shuffle_window": (1 << 32, 1 << 33),
    "most_pixels": (2_000_000_000, 2_000_000_001),
    "cache_bytes": (1 << 60, 1 << 61),
}


@pytest.mark.parametrize("name", LARGE)
def test_numbers_have_an_upper_bound(name):
    taken, refused = LARGE[name]
    DataConfig.model_validate({name: taken})
    with pytest.raises(ValidationError, match=name):
        DataConfig.model_validate({name: refused})


def test_lists_of_sizes_are_short():
    with pytest.raises(ValidationError, match="must hold 1 to 1000 sizes"):
        DataConfig(short_sides=(800,) * 1001)
