"""Real COCO images through every stage: check, pack, train until the images are learnt by heart, evaluate, compare."""

import json
import subprocess
from pathlib import Path

import pytest
from ddetr.core.evaluation import result
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.processes import finished

pytestmark = pytest.mark.slow

# A small model and small images: minutes on two cores. No flips, as only these images are to be learnt.
SETTINGS = """
    model.num_classes=80 model.queries=50 data.short_sides=[160] data.validation_short_side=160 data.long_side=240
    data.flip_probability=0 train.batch_size=8 train.epochs=150 train.evaluate_every_epochs=0
    train.checkpoint_every_epochs=0 train.log_every_steps=50 optim.learning_rate=8e-4 optim.warmup_steps=20
    monitor.port=0
"""


def ddetr(*arguments: object) -> str:
    done = finished(*map(str, arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def eight_images(coco_free: Path, output: Path) -> Path:
    """The first eight training images with one to eight objects and no crowd."""
    coco = json.loads((coco_free / "annotations_train.json").read_text())
    objects = {
        image["id"]: [a for a in coco["annotations"] if a["image_id"] == image["id"]] for image in coco["images"]
    }
    chosen = [i for i, found in objects.items() if 1 <= len(found) <= 8 and not any(a["iscrowd"] for a in found)][:8]
    coco["images"] = [image for image in coco["images"] if image["id"] in chosen]
    coco["annotations"] = [annotation for image_id in chosen for annotation in objects[image_id]]
    output.write_text(json.dumps(coco))
    return output


def test_a_small_model_learns_eight_images_by_heart(coco_free: Path, tmp_path: Path) -> None:
    annotations = eight_images(coco_free, tmp_path / "eight.json")
    shards = tmp_path / "shards"
    ddetr("data", "check", annotations, coco_free / "images")
    ddetr("data", "pack", annotations, coco_free / "images", shards, "--shard-megabytes", 1)
    ddetr("data", "check", shards)
    run = tmp_path / "runs/eight"
    paths = [
        f"data.train={shards}",
        f"data.validation={shards}",
        f"train.output={run.parent}",
        f"train.name={run.name}",
    ]
    local = Path(__file__).resolve().parents[2] / "launch/local.sh"
    subprocess.run([local, "--ranks", "2", "tiny", *SETTINGS.split(), *paths], check=True)
    ddetr("eval", run)

    results = run / "eval/step_00000150"
    metrics = result.read(results)[0].metrics
    assert metrics["AP50"] >= 0.5
    # By hand, with the published tool, on the original annotations rather than on what was packed.
    truth = COCO(annotations)
    evaluation = COCOeval(truth, truth.loadRes(str(results / "detections.json")), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert list(metrics.values())[:12] == pytest.approx(evaluation.stats.tolist(), abs=1e-12)
