"""A small procedural set in COCO format, to be packed, broken and repaired."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddetr.data.synthetic import draw_set


@pytest.fixture
def coco_folder(tmp_path: Path) -> Path:
    """A fresh folder with annotations.json and images/: 20 images of 64 pixels, 3 classes."""
    draw_set(tmp_path / "coco", images=20, size=64, classes=3, seed=5, workers=1)
    return tmp_path / "coco"


@pytest.fixture
def edit(coco_folder: Path) -> Callable[[Callable[[dict[str, Any]], None]], Path]:
    """Change the json of `coco_folder` in place; returns its path."""

    def edit_json(change: Callable[[dict[str, Any]], None]) -> Path:
        path = coco_folder / "annotations.json"
        coco = json.loads(path.read_text())
        change(coco)
        path.write_text(json.dumps(coco))
        return path

    return edit_json
