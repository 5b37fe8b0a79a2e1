"""Validation sets that list fewer or other categories than training, and sets without objects."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ddetr.core.config import Config, load
from ddetr.core.evaluation.coco import MEANINGS
from ddetr.data.index import ShardIndex
from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set
from ddetr.launch.evaluate import evaluate
from ddetr.launch.sweep import read_sweep
from ddetr.launch.train import check_beforehand
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.core.runs import SMALL, succeeded, trained
from tests.processes import finished

Json = dict[str, Any]
MakeSet = Callable[..., Path]


@pytest.fixture(scope="module")
def make_set(tmp_path_factory: pytest.TempPathFactory) -> MakeSet:
    """make_set(name, change): the shards of a drawn set whose json is changed before."""
    folder = tmp_path_factory.mktemp("sets")
    draw_set(folder / "coco", images=24, size=96, classes=3, seed=7, workers=1)

    def make(name: str, change: Callable[[Json], None] = lambda coco: None) -> Path:
        coco = json.loads((folder / "coco/annotations.json").read_text())
        change(coco)
        (folder / f"{name}.json").write_text(json.dumps(coco))
        return Path(pack(folder / f"{name}.json", folder / "coco/images", folder / name, workers=1).location)

    return make


@pytest.fixture(scope="module")
def whole(make_set: MakeSet) -> Path:
    shards = make_set("whole")
    assert ShardIndex.load(shards).categories.to_json() == [
        {"id": 1, "name": "disc"},
        {"id": 23, "name": "triangle"},
        {"id": 56, "name": "cross"},
    ]
    return shards


@pytest.fixture(scope="module")
def empty(make_set: MakeSet) -> Path:
    return make_set("empty", lambda coco: coco.update(annotations=[]))


def with_crowds(shards: Path, crowds: int) -> Path:
    """The same shards, their index saying that so many of the boxes are crowds."""
    values = json.loads((shards / "index.json").read_text())
    values["source"]["crowds"] = crowds
    (shards / "index.json").write_text(json.dumps(values))
    return shards


def without_triangles(coco: Json) -> None:
    coco["categories"] = [category for category in coco["categories"] if category["id"] != 23]
    coco["annotations"] = [annotation for annotation in coco["annotations"] if annotation["category_id"] != 23]


def settings(train: Path, validation: Path | None, *more: str) -> list[str]:
    paths = [f"data.train={train}"] + ([f"data.validation={validation}"] if validation else [])
    return [*SMALL, *paths, "train.evaluate_every_epochs=1", *more]


def configuration(train: Path, validation: Path | None, *more: str) -> Config:
    return load("tiny", settings(train, validation, *more))


def by_hand(truth: Path, detections: list[Json], category_ids: list[int]) -> dict[str, float]:
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(truth))
        scored = COCOeval(coco, coco.loadRes(detections), "bbox")
        scored.params.catIds = category_ids
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
    return dict(zip(MEANINGS, scored.stats.tolist(), strict=True))


@pytest.mark.integration
def test_a_validation_set_with_fewer_categories_is_scored_over_its_own(
    make_set: MakeSet, whole: Path, tmp_path: Path
) -> None:
    """By the run itself, and by `ddetr eval`; on the whole set with pycocotools' catIds."""
    few = make_set("few", without_triangles)
    arguments = settings(whole, few, f"train.output={tmp_path}", "train.name=run", "train.max_steps=2")
    run = succeeded(trained(tmp_path / "run", "tiny", *arguments))
    assert f"{few} lists 2 of the 3 categories of training: AP is of these alone" in run.output
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    (while_training,) = [row["metrics"] for row in rows if row["kind"] == "evaluation"]
    evaluated = evaluate(run.directory, ["train.threads=1"], output=tmp_path / "eval")
    detections = json.loads((tmp_path / "eval/detections.json").read_text())
    assert {row["category_id"] for row in detections} == {1, 23, 56}
    expected = by_hand(few.with_name("whole.json"), detections, [1, 56])
    assert expected["AP"] > 0
    assert evaluated == expected
    assert while_training == pytest.approx(expected, abs=1e-6)
    assert by_hand(few.with_name("whole.json"), detections, [1, 23, 56]) != expected


def renamed(coco: Json) -> None:
    coco["categories"][1]["name"] = "squ\x1bare"


def renumbered(coco: Json) -> None:
    coco["categories"][2]["id"] = 57
    for annotation in coco["annotations"]:
        annotation["category_id"] += annotation["category_id"] == 56


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (renamed, r"'squ\\x1bare' (id 23) is 'triangle' in the training shards"),
        (renumbered, "'cross' (id 57) is not in the training shards"),
        (
            lambda coco: coco["categories"].append({"id": 90, "name": "brush"}),
            "'brush' (id 90) is not in the training shards",
        ),
    ],
)
def test_other_categories_are_named_with_the_side_that_has_them(
    make_set: MakeSet, whole: Path, change: Callable[[Json], None], told: str
) -> None:
    other = make_set(f"other {change.__name__}", change)
    with pytest.raises(ValueError, match="do not correspond") as error:
        check_beforehand(configuration(whole, other))
    message = str(error.value)
    head = f"the categories of the shards {other} and of the training shards {whole} do not correspond: {told}; there"
    assert message.startswith(head)
    assert "'disc' (id 1), 'triangle' (id 23), 'cross' (id 56)" in message
    assert message.isprintable()


@pytest.mark.integration
def test_a_set_without_objects_is_not_trained_on(make_set: MakeSet, whole: Path, empty: Path, tmp_path: Path) -> None:
    crowds = make_set("crowds", lambda coco: [annotation.update(iscrowd=1) for annotation in coco["annotations"]])
    boxes = int(ShardIndex.load(crowds).samples["num_boxes"].sum())
    check_beforehand(configuration(with_crowds(crowds, boxes - 1), None))
    for shards, why in ((empty, "there is no box in it"), (with_crowds(crowds, boxes), "every box in it is a crowd")):
        with pytest.raises(ValueError, match=rf"^data.train={shards}: {why}, so there is nothing to train on"):
            check_beforehand(configuration(shards, whole, "model.num_classes=7"))
    arguments = settings(empty, whole, f"train.output={tmp_path}", "train.name=run")
    refused = finished("train", "tiny", *arguments, "--dry-run")
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"ddetr: data.train={empty}: there is no box in it")
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.integration
def test_a_validation_set_without_objects_is_told_of_and_the_run_goes_on(
    whole: Path, empty: Path, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warning = f"{empty}: there is no box in it, so evaluations on it give no AP (-1)"
    arguments = settings(whole, empty, f"train.output={tmp_path}", "train.name=run", "train.max_steps=1")
    run = succeeded(trained(tmp_path / "run", "tiny", *arguments))
    assert warning in run.output.splitlines()
    assert set(evaluate(run_directory, [], data=[empty], output=tmp_path / "eval").values()) == {-1.0}
    assert capsys.readouterr().out.count(warning) == 1


def test_a_search_is_not_judged_by_a_set_without_objects(whole: Path, empty: Path, tmp_path: Path) -> None:
    sweep = {"base": "tiny", "overrides": settings(whole, empty), "samples": 2, "output": str(tmp_path / "out")}
    sweep["search"] = {"optim.clip_norm": {"choice": [0.1, 0.5]}}
    (tmp_path / "sweep.yaml").write_text(json.dumps(sweep))
    with pytest.raises(ValueError, match="there is no box in it, so evaluations on it give no AP"):
        read_sweep(tmp_path / "sweep.yaml")
