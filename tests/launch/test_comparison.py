"""`ddetr eval A B` in a real process."""

import json
import re
from pathlib import Path

import pytest
from ddetr.core.evaluation import result
from ddetr.data.shards import pack

from tests.processes import finished

pytestmark = pytest.mark.integration


def test_two_checkpoints_are_compared_on_the_same_shards(run_directory: Path, tmp_path: Path) -> None:
    first, second = run_directory / "checkpoints/step_00000010", run_directory
    done = finished("eval", first, second, "--output", tmp_path / "out", "eval.top_k=20")
    assert done.returncode == 0, done.stderr
    (comparison,) = json.loads((tmp_path / "out/comparison.json").read_text())
    (one,), (two,) = (result.read(tmp_path / "out" / number) for number in ("1", "2"))
    for name, row in comparison["scores"].items():
        assert (row["first"], row["second"]) == pytest.approx((one.metrics[name], two.metrics[name]), abs=1e-9)
        assert row["difference"] == pytest.approx(two.metrics[name] - one.metrics[name], abs=1e-9)
    assert (comparison["first"], comparison["second"]) == (str(first), str(second))
    assert (comparison["images"], comparison["resamples"], comparison["confidence"]) == (18, 1000, 0.95)
    assert {row["name"] for row in comparison["classes"]} == {"disc", "cross"}
    ap = comparison["scores"]["AP"]
    assert 0 < ap["low"] < ap["difference"] < ap["high"]
    words = re.sub(r"\s+", " ", done.stdout)
    assert f"AP differs by {ap['difference']:+.4f}, in 95 % of 1000 draws of the images by {ap['low']:+.4f} to" in words
    assert "0 lies outside: 2 is better on images like these." in words
    assert "│ cross " in done.stdout


def test_a_detector_against_itself_is_noise(run_directory: Path, tmp_path: Path) -> None:
    done = finished("eval", run_directory, run_directory, "--output", tmp_path, "eval.top_k=20")
    words = re.sub(r"\s+", " ", done.stdout)
    assert "0 lies inside: this set does not tell them apart." in words, done.stderr
    assert "by +0.0000 to +0.0000" in words


def test_mistakes_are_told_before_the_work(run_directory: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ([run_directory, tmp_path / "missing"], str(tmp_path / "missing")),
        ([run_directory, run_directory, "--all"], "--all takes one run"),
        (["eval.top_k=3"], "name a checkpoint or a run directory"),
    ):
        done = finished("eval", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert "images of" not in done.stdout


def test_a_set_without_objects_is_told_after_the_first_detector(run_directory: Path, tmp_path: Path) -> None:
    coco = json.loads((run_directory.parent / "chosen.json").read_text())
    (tmp_path / "none.json").write_text(json.dumps({**coco, "annotations": []}))
    pack(tmp_path / "none.json", run_directory.parent / "coco/images", tmp_path / "none", workers=1)
    done = finished("eval", run_directory, run_directory, "--data", tmp_path / "none", "--output", tmp_path / "out")
    assert done.returncode == 2
    assert f"{tmp_path / 'none'}: there is no object in it" in done.stderr
    assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["1"]
