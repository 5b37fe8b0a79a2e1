"""Two nodes, a run directory with small detectors of random weights, shards on which their AP is neither 0 nor 1."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.launch.nodes import joined
from tests.launch.strangers import rewritten

SMALL = (
    "model.backbone=test_resnet.r160_in1k",
    "model.hidden_dim=64",
    "model.queries=30",
    "model.encoder_layers=1",
    "model.decoder_layers=2",
    "model.feedforward_dim=64",
    "data.validation_short_side=96",
    "train.device=cpu",
    "eval.top_k=30",
)


@pytest.fixture
def nodes() -> Iterator[dict[str, str]]:
    with joined() as namespaces:
        yield namespaces


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """make_run(folder, shards, steps, *overrides): a run directory with one checkpoint of random weights per step."""
    import torch
    from ddetr.core.checkpoint.weights import WEIGHTS, save_weights, step_directory
    from ddetr.core.config import load
    from ddetr.core.model.detector import DeformableDetr
    from ddetr.data.index import ShardIndex

    def make(folder: Path, shards: Path, steps: tuple[int, ...], *overrides: str) -> Path:
        categories = ShardIndex.load(shards).categories
        given = [f"model.num_classes={len(categories)}", f"data.train={shards}", f"data.validation={shards}"]
        config = load("tiny", [*SMALL, *given, *overrides])
        for step in steps:
            torch.manual_seed(step)
            model = DeformableDetr(config.model)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                        parameter.normal_(std=0.1)  # as initialised, they are zero
                    if name.startswith("bbox_embed") and name.endswith("layers.2.weight"):
                        parameter.normal_(std=0.1)
                    if name.startswith("class_embed") and name.endswith("weight"):
                        parameter.normal_(std=0.5)
            directory = step_directory(folder, step)
            directory.mkdir(parents=True)
            save_weights(directory / WEIGHTS, model.state_dict(), config, categories, step, step // 10)
        return folder

    return make


@pytest.fixture(scope="session")
def run_directory(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., Path]) -> Path:
    """Two checkpoints, steps 10 and 20. The objects in the shards are some of what step 20 detects, moved a little."""
    from ddetr.core.checkpoint.trained import load_detector
    from ddetr.core.evaluation.columns import to_coco
    from ddetr.core.evaluation.evaluator import evaluate_shards
    from ddetr.data.index import ShardIndex
    from ddetr.data.shards import pack
    from ddetr.data.synthetic import draw_set

    folder = tmp_path_factory.mktemp("evaluated")
    draw_set(folder / "coco", images=18, size=96, classes=3, seed=11, workers=1)
    images, annotations = folder / "coco/images", folder / "coco/annotations.json"
    pack(annotations, images, folder / "drawn", workers=1)
    detector = load_detector(make_run(folder / "first", folder / "drawn", (20,)))
    index = ShardIndex.load(folder / "drawn")
    shards = evaluate_shards(detector, index, range(len(index.shards)), "cpu")
    found = [row for shard in shards for row in to_coco(shard.detections)]

    coco = json.loads(annotations.read_text())
    sizes = {image["id"]: (image["width"], image["height"]) for image in coco["images"]}
    coco["annotations"] = []
    for number, row in enumerate(found):
        width, height = sizes[row["image_id"]]
        x, y, w, h = row["bbox"]
        x, y = x + number % 5 * w / 40, y + number % 3 * h / 40
        x, y, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if number % 3 == 0 and right - x > 2 and bottom - y > 2:
            box = [x, y, right - x, bottom - y]
            coco["annotations"].append(
                {"id": number + 1, "image_id": row["image_id"], "category_id": row["category_id"], "bbox": box}
                | {"area": box[2] * box[3], "iscrowd": 0}
            )
    (folder / "chosen.json").write_text(json.dumps(coco))
    pack(folder / "chosen.json", images, folder / "shards", workers=1, shard_bytes=16 << 10)
    assert len(ShardIndex.load(folder / "shards").shards) >= 4
    return make_run(folder / "run", folder / "shards", (10, 20))


@pytest.fixture
def stranger(run_directory: Path, tmp_path: Path) -> Callable[..., Path]:
    """As `Stranger` of tests/launch/strangers.py says."""
    from ddetr.core.checkpoint.trained import load_detector
    from ddetr.core.config import changed, dump

    def make(*overrides: str) -> Path:
        config = changed(load_detector(run_directory).config, overrides, "a stranger")
        return rewritten(run_directory, tmp_path / "stranger", config=dump(config))

    return make
