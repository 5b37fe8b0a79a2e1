"""Places of a batch that no image is left for, at an epoch's end or because one is damaged: they carry no loss."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.config import OptimConfig
from ddetr.core.evaluation import result
from ddetr.core.model.criterion import criterion
from ddetr.core.model.outputs import Predictions
from ddetr.data.batch import Batch, Sample, collate, nothing
from ddetr.data.index import ShardIndex

from tests.core.runs import Train, succeeded
from tests.truth import coco_truth

QUERIES, CLASSES = 9, 4


def _batch(places: list[bool]) -> Batch:
    """An image with two objects in each place, or nothing."""
    torch.manual_seed(4)
    samples = []
    for number, real in enumerate(places):
        boxes = torch.rand(2, 4) * 0.4 + 0.2
        labels = torch.randint(CLASSES - 1, (2,))
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        samples.append(Sample(image, boxes, labels, number, (8, 8)) if real else nothing())
    return collate(samples).batch()


@pytest.mark.parametrize("softmax", [False, True])
def test_losses_are_those_of_the_images_alone(softmax: bool) -> None:
    places = [True, False, True]
    batch, config = _batch(places), OptimConfig()
    logits, boxes = torch.randn(2, 3, QUERIES, CLASSES), torch.rand(2, 3, QUERIES, 4) * 0.5 + 0.2
    proposals = None if softmax else (torch.randn(3, 20, 1), torch.rand(3, 20, 4) * 0.5 + 0.2)
    kept = torch.tensor(places)
    alone = replace(
        batch,
        **{name: getattr(batch, name)[kept] for name in ("images", "sizes", "num_boxes", "image_ids", "is_real")},
    )
    results = []
    for given, rows in ((batch, slice(None)), (alone, kept)):
        leaves = [logits.clone().requires_grad_(), boxes.clone().requires_grad_()]
        layers = [(leaves[0][d, rows], leaves[1][d, rows]) for d in range(2)]
        own = None if proposals is None else (proposals[0][rows], proposals[1][rows])
        predictions = Predictions.of(layers, own, softmax=softmax)
        losses = criterion(predictions, given, config, 4.0)
        losses.weighted(config).sum().backward()
        results.append([losses.values, losses.class_error, losses.cardinality_error, *(x.grad for x in leaves)])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert not results[0][-1][:, 1].any()
    assert not results[0][-2][:, 1].any()


@pytest.mark.integration
@pytest.mark.parametrize(
    "architecture", [(), ("model.architecture=detr", "model.classification=softmax", "model.levels=1")]
)
def test_a_padded_epoch_is_the_same_on_one_rank_and_on_two(train: Train, architecture: tuple[str, ...]) -> None:
    """24 images in steps of 10: the last one has 4, all on the first rank."""
    settings = ("data.remainder=pad", "train.batch_size=10", "model.dropout=0", "train.zero_stage=0", *architecture)
    if architecture:
        settings += ("model.box_refine=false", "model.two_stage=false")
    one = succeeded(train(1, *settings, steps=6))
    two = succeeded(train(2, *settings, "train.zero_stage=2", steps=6))
    assert [step["images"] for step in one.steps] == [step["images"] for step in two.steps] == [10, 10, 4] * 2
    assert [step["epoch"] for step in one.steps] == [0, 0, 0, 1, 1, 1]
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


@pytest.fixture
def damaged(synthetic_shards: Path, tmp_path: Path) -> tuple[Path, str]:
    """A copy of the shards in which one image is damaged, and its key."""
    folder = Path(shutil.copytree(synthetic_shards, tmp_path / "shards"))
    shard = ShardIndex.load(folder).shards[1]
    with shard.path.open("r+b") as file:
        file.seek(int(shard.samples[2]["image_offset"]))
        file.write(bytes(100))
    return folder, f"{shard.name}: sample {shard.key(2)}"


@pytest.mark.integration
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_damaged_image_is_left_out_and_named(train: Train, damaged: tuple[Path, str], ranks: int) -> None:
    folder, key = damaged
    run = succeeded(train(ranks, f"data.train={folder}", "data.most_bad_samples=0.1", "train.zero_stage=1", steps=12))
    assert sum(step["images"] for step in run.steps) == 2 * 23
    messages = [message for step in run.steps for message in step["bad_samples"]]
    assert len(messages) == 2  # once an epoch
    assert all(key in message for message in messages)
    events = [event for event in run.events if event["event"] == "bad_sample"]
    assert [event["reason"] for event in events] == messages
    assert run.output.count(f"left out in step {events[0]['step']}: ") == 1


@pytest.mark.integration
def test_too_many_damaged_images_stop_a_run(train: Train, damaged: tuple[Path, str]) -> None:
    folder, key = damaged
    run = train(1, f"data.train={folder}", "data.most_bad_samples=0", steps=12)
    assert run.exit_status == 2
    assert "Traceback" not in run.output
    assert "1 of 24 images are damaged, more than data.most_bad_samples=0" in run.output
    assert key in run.output
    assert (run.directory / f"checkpoints/step_{len(run.steps):08d}/model.safetensors").is_file()


@pytest.mark.integration
def test_an_evaluation_leaves_out_a_damaged_image(
    train: Train, synthetic_shards: Path, damaged: tuple[Path, str]
) -> None:
    """It scores the others, as pycocotools does without that image; every rank's damaged images are named."""
    from ddetr.core.evaluation.coco import coco_metrics
    from ddetr.core.evaluation.columns import to_coco
    from ddetr.core.evaluation.evaluator import evaluate_shards

    folder, key = damaged
    settings = [f"data.validation={folder}", "train.evaluate_every_epochs=1", "data.most_bad_samples=0.05"]
    run = succeeded(train(2, *settings, steps=6))
    assert f"left out of the evaluation of step 6: {folder}/{key}: the image in the shard is damaged" in run.output
    (event,) = [event for event in run.events if event["event"] == "bad_sample"]
    assert key in event["reason"]
    checkpoint = run.directory / "checkpoints/step_00000006"
    (found,) = result.read(checkpoint)
    assert (found.images, found.num_bad) == (23, 1)

    whole, detector = ShardIndex.load(synthetic_shards), load_detector(checkpoint)
    left_out = int(key.rpartition(" ")[2])
    torch.set_num_threads(1)
    rows = list(evaluate_shards(detector, whole, range(len(whole.shards)), "cpu"))
    truth = coco_truth(whole)
    for name, of_image in (("images", "id"), ("annotations", "image_id")):
        truth[name] = [item for item in truth[name] if item[of_image] != left_out]
    detections = [row for shard in rows for row in to_coco(shard.detections) if row["image_id"] != left_out]
    assert found.metrics == coco_metrics(truth, detections, "pycocotools")


@pytest.mark.integration
def test_too_many_damaged_images_stop_an_evaluation_on_every_rank(train: Train, damaged: tuple[Path, str]) -> None:
    folder, key = damaged
    settings = [f"data.validation={folder}", "train.evaluate_every_epochs=1", "data.most_bad_samples=0"]
    run = train(2, *settings, steps=6)
    assert run.exit_status == 2
    assert "Traceback" not in run.output
    assert "1 of 24 images cannot be evaluated, more than data.most_bad_samples=0; the last one: " in run.output
    assert key in run.output
    assert (run.directory / "checkpoints/step_00000006/model.safetensors").is_file()
