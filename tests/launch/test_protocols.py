"""Sets of LVIS and Open Images from the json to the score: `ddetr data`, training with two ranks, `ddetr eval`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ddetr.core.evaluation import result
from ddetr.core.evaluation.lvis import MEANINGS
from ddetr.data.index import ShardIndex
from ddetr.launch.evaluate import evaluate
from ddetr.launch.report import report

from tests.core.runs import succeeded, trained
from tests.launch.conftest import SMALL
from tests.processes import finished

pytestmark = pytest.mark.integration


def said(*arguments: str | Path) -> str:
    done = finished(*arguments, environment={"COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def lvis_json(run_directory: Path) -> Path:
    """The objects of `run_directory`, some of which it detects, as LVIS v1 writes them."""
    values = json.loads((run_directory.parent / "chosen.json").read_text())
    ids = [category["id"] for category in values["categories"]]
    for category, frequency in zip(values["categories"], "rcf", strict=True):
        category["frequency"] = frequency
    for number, image in enumerate(values["images"]):
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
        image["neg_category_ids"] = ids[: number % 3]
        image["not_exhaustive_category_ids"] = ids[2:] if number % 2 else []
    path = run_directory.parent / "lvis.json"
    path.write_text(json.dumps(values))
    return path


@pytest.fixture(scope="module")
def lvis_shards(lvis_json: Path) -> Path:
    images, shards = lvis_json.parent / "coco/images", lvis_json.parent / "lvis_shards"
    assert "scored by the protocol of LVIS" in said("data", "check", lvis_json, images)
    assert "scored by the protocol of LVIS" in said("data", "pack", lvis_json, images, shards)
    assert re.search("protocol of LVIS.*0 error", said("data", "check", shards), re.DOTALL)
    return shards


def test_lvis_is_scored_as_lvis_api_does(run_directory: Path, lvis_shards: Path, lvis_api: Any, tmp_path: Path) -> None:
    text = said("eval", run_directory, "--data", lvis_shards, "--output", tmp_path, "eval.top_k=null")
    (found,) = result.read(tmp_path)
    assert (found.headline, found.protocol, found.top_k, found.departure) == ("AP", "lvis", 300, "")
    assert all(name in text for name in MEANINGS)
    assert "where LVIS counts" not in text
    judge = lvis_api.LVISEval(str(tmp_path / "ground_truth.json"), str(tmp_path / "detections.json"), "bbox")
    judge.run()
    assert list(found.metrics) == list(MEANINGS)
    assert list(found.metrics.values()) == list(judge.get_results().values())
    assert 0.05 < found.metrics["AP"] < 0.95


def test_another_number_of_detections_stands_beside_the_score(
    run_directory: Path, lvis_shards: Path, tmp_path: Path
) -> None:
    beside = "with at most 20 detections an image, where LVIS counts 300"
    assert beside in said("eval", run_directory, "--data", lvis_shards, "--output", tmp_path, "eval.top_k=20")
    own = tmp_path / "own"
    assert "with at most 30 detections an image, where COCO counts 100" in said("eval", run_directory, "--output", own)
    (found,) = result.read(own)
    assert (found.protocol, found.top_k) == ("coco", 30)


def test_two_ranks_give_the_score_of_the_command(run_directory: Path, lvis_shards: Path, tmp_path: Path) -> None:
    arguments = [f"train.output={tmp_path}", "train.name=run", f"train.initial_weights={run_directory}"]
    arguments += [f"data.train={lvis_shards}", f"data.validation={lvis_shards}", "train.max_steps=2"]
    arguments += ["train.batch_size=4", "train.evaluate_every_epochs=1", "optim.learning_rate=1e-9", "monitor.port=0"]
    arguments += ["train.bandwidth_test_seconds=0", "eval.scorer=hotcoco"]
    run = succeeded(trained(tmp_path / "run", "tiny", *SMALL, *arguments, ranks=2))
    beside = "with at most 30 detections an image, where LVIS counts 300"
    assert re.search(rf"evaluated step 2 on 18 images .*: AP [\d.]+, AP_rare [\d.]+, .* \({beside}\)", run.output)
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step_*")
    (own,) = result.read(checkpoint)
    again = evaluate(tmp_path / "run", [], output=tmp_path / "again")
    assert again == own.metrics
    assert list(own.metrics) == list(MEANINGS)
    assert 0.05 < own.metrics["AP"] < 0.95
    page = re.sub(r"<[^>]*>", " ", report(tmp_path / "run").read_text())
    assert re.search(rf"AP_rare\s+{re.escape(MEANINGS['AP_rare'])}\s+[\d.]+ %", page)
    assert f"All are {beside}." in page


def test_open_images_is_scored_by_its_own_protocol(run_directory: Path, tmp_path: Path) -> None:
    folder = run_directory.parent
    shards = tmp_path / "shards"
    said("data", "pack", folder / "chosen.json", folder / "coco/images", shards, "--protocol", "openimages")
    assert ShardIndex.load(shards).protocol == "openimages"
    metrics = evaluate(run_directory, ["eval.top_k=null"], data=[shards], output=tmp_path / "found")
    assert list(metrics) == ["AP"]
    assert 0.05 < metrics["AP"] < 1
    with pytest.raises(ValueError, match=r"eval\.scorer=pycocotools scores by COCO's protocol alone"):
        evaluate(run_directory, ["eval.scorer=pycocotools"], data=[shards], output=tmp_path / "found")


def test_a_search_by_a_score_that_the_set_does_not_have_is_refused(run_directory: Path, tmp_path: Path) -> None:
    from ddetr.launch.sweep import read_sweep

    shards = run_directory.parent / "shards"
    overrides = [*SMALL, f"data.train={shards}", f"data.validation={shards}", "train.evaluate_every_epochs=1"]
    sweep = {"base": "tiny", "samples": 1, "metric": "AP_rare", "overrides": [*overrides, "train.batch_size=4"]}
    sweep["search"] = {"optim.learning_rate": {"choice": [1e-4]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    with pytest.raises(ValueError, match=r"metric: .* has no AP_rare; its scores are AP, AP50"):
        read_sweep(tmp_path / "sweep.yaml")
