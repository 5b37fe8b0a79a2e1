"""Ranks, images and batches without boxes, and an image with 400: the same steps on one rank and on two."""

import json
from pathlib import Path

import pytest
from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set

from tests.core.runs import Train, succeeded

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module", params=["uneven", "empty"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 images: half of them without a box and one with 400 of them; or one box in all, as none is refused."""
    folder = tmp_path_factory.mktemp(request.param)
    draw_set(folder / "coco", images=24, size=96, classes=3, seed=7, workers=1)
    file = folder / "coco/annotations.json"
    coco = json.loads(file.read_text())
    kept = coco["annotations"][:1]
    if request.param == "uneven":
        kept = [row for row in coco["annotations"] if row["image_id"] % 2]
        crowded = next(row for row in kept)
        for number in range(400):
            x, y = 4 * (number % 20), 4 * (number // 20)
            kept.append({**crowded, "id": 10_000 + number, "bbox": [x, y, 12, 9], "area": 108})
    file.write_text(json.dumps({**coco, "annotations": kept}))
    pack(file, folder / "coco/images", folder / "shards", workers=1, shard_bytes=64 << 10)
    return folder / "shards"


@pytest.mark.parametrize(
    ("stage", "architecture"),
    [
        (3, ()),
        pytest.param(0, (), marks=pytest.mark.slow),
        pytest.param(2, (), marks=pytest.mark.slow),
        pytest.param(
            3, ("model.architecture=detr", "model.classification=softmax", "model.levels=1"), marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_take_the_steps_of_one(train: Train, shards: Path, stage: int, architecture: tuple[str, ...]) -> None:
    settings = (f"data.train={shards}", "model.dropout=0", "train.zero_stage=0", *architecture)
    if architecture:
        settings += ("model.box_refine=false", "model.two_stage=false")
    one = succeeded(train(1, *settings, steps=6))
    two = succeeded(train(2, *settings, f"train.zero_stage={stage}", steps=6))
    assert len(one.losses) == 6
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    assert not any(step["skipped"] for step in one.steps + two.steps)
    boxes = [step["losses"]["l1"] for step in one.steps]
    assert (sum(loss != 0 for loss in boxes) == 1) == shards.parent.name.startswith("empty")
