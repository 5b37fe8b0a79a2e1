"""A part of the loss, scores and an observer that no product file knows: they appear wherever numbers are shown.

A `sitecustomize` module adds them in every process, as a program of the user's own would: commands and Ray's workers
are the real ones.
"""

import json
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ddetr.core.config import load
from ddetr.core.evaluation import scores
from ddetr.core.model import criterion
from ddetr.core.training.reports import EndReport, EvaluationReport, Report, StartReport, StepReport
from ddetr.launch.sweep import read_sweep
from ddetr.launch.train import run

from tests.core.runs import SMALL
from tests.processes import finished

ADDED = """
def add():
    from ddetr.core.evaluation import scores
    from ddetr.core.model import criterion

    def sides(pairs):
        return (pairs.boxes[:, 2:] - pairs.targets[:, 2:]).abs().sum(-1)

    def images_with_detections(ground_truth, detections):
        return {"hits": len({row["image_id"] for row in detections}) / len(ground_truth["images"]), "constant": 0.125}

    criterion.BOX_LOSSES["sides"] = criterion.BoxLoss(sides, lambda config: 0.5)
    meanings = {"hits": "share of the images with a detection", "constant": "an eighth"}
    scores.PROTOCOLS.append(scores.Protocol.of(meanings, ("hits",), images_with_detections))
"""
# Where a program of ours begins: not in every Python that starts.
CUSTOMIZED = (
    ADDED
    + '''

import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    """Adds to the lists when the training or a sweep is imported."""

    def find_spec(self, name, path, target=None):
        if name in ("ddetr.launch.train", "ddetr.launch.sweep", "ddetr.launch.report"):
            sys.meta_path.remove(self)
            add()
        return None

sys.meta_path.insert(0, Finder())
'''
)


@pytest.fixture
def ddetr(tmp_path: Path) -> Callable[..., str]:
    """Runs the command line in processes that have the additions; returns what it prints."""
    program = tmp_path / "program.py"
    program.write_text(f"{ADDED}\nadd()\nfrom ddetr.launch.cli import main\nmain()\n")

    def command(*arguments: str | Path) -> str:
        done = finished(*arguments, environment={"COLUMNS": "200"}, program=program)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return command


@pytest.mark.integration
def test_in_a_run_its_records_and_its_report(ddetr: Callable[..., str], synthetic_shards: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = [*SMALL, f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", "train.max_steps=6"]
    said = ddetr(
        "train", "tiny", *settings, f"train.output={tmp_path}", "train.name=run", "train.evaluate_every_epochs=1"
    )
    assert re.search(r"loss [\d.]+ \(class [\d.]+ l1 [\d.]+ giou [\d.]+ sides [\d.]+\)", said), said
    shares = r"decoding \d+ %, model \d+ %, scoring \d+ %"
    line = rf"evaluated step 6 on 24 images in [\d.]+ s \({shares}\): AP [\d.]+, .*, hits 1.000"
    assert re.search(line, said), said
    *steps, evaluation = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    for step in steps:
        losses, layers = step["losses"], ("0", "1", "proposals")
        assert step["parts"] == ["class", "l1", "giou", "sides"]
        assert losses["sides"] == pytest.approx(sum(losses[f"sides_{layer}"] for layer in layers)) != 0
        assert losses["total"] == pytest.approx(sum(losses[part] for part in step["parts"]))
    assert (evaluation["metrics"]["hits"], evaluation["metrics"]["constant"]) == (1.0, 0.125)
    ddetr("report", folder)
    page = re.sub(r"<[^>]*>", " ", (folder / "report.html").read_text())
    assert re.search(r"hits\s+share of the images with a detection\s+100.0 %", page)
    assert re.search(r"constant\s+an eighth\s+12.5 %", page)
    assert re.search(r"class\s+l1\s+giou\s+sides\s+learning rate", page)
    assert "hits 1.000" in ddetr("checkpoint", "inspect", folder)


@pytest.mark.slow
def test_in_a_search(synthetic_shards: Path, tmp_path: Path) -> None:
    """Also Ray's workers have the additions."""
    (tmp_path / "added").mkdir()
    (tmp_path / "added/sitecustomize.py").write_text(CUSTOMIZED)
    overrides = [*SMALL, f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", "train.max_steps=4"]
    sweep = {
        "base": "tiny",
        "overrides": [*overrides, "train.evaluate_every_epochs=1", "train.device=cpu", "monitor.enabled=false"],
        "metric": "constant",
        "samples": 1,
        "search": {"optim.learning_rate": {"choice": [1e-4]}},
        "output": str(tmp_path / "out"),
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    line = [sys.executable, "-m", "ddetr.launch.cli", "tune", tmp_path / "sweep.yaml"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "added"), "COLUMNS": "200"}
    done = subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "constant 0.1250" in said
    (trial,) = json.loads((tmp_path / "out/results.json").read_text())["trials"]
    assert trial["best"] == 0.125


def test_in_prometheus_and_to_an_observer(
    synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: the exporter is asked while the run goes on, by an observer of ours."""
    names: dict[str, object] = {}
    exec(ADDED, names)  # the same lines as above
    monkeypatch.setattr(criterion, "BOX_LOSSES", dict(criterion.BOX_LOSSES))
    monkeypatch.setattr(scores, "PROTOCOLS", list(scores.PROTOCOLS))
    names["add"]()  # type: ignore[operator]
    told: list[type] = []
    scraped: list[str] = []

    def observer(report: Report) -> None:
        told.append(type(report))
        if isinstance(report, EvaluationReport):
            (target,) = json.loads((tmp_path / "run/targets.json").read_text())
            with urllib.request.urlopen(f"http://{target['targets'][0]}/metrics", timeout=30) as answer:
                scraped.append(answer.read().decode())

    settings = [*SMALL, f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", "train.max_steps=6"]
    settings += [f"train.output={tmp_path}", "train.name=run", "train.evaluate_every_epochs=1", "data.workers=0"]
    run(load("tiny", settings), observers=[observer])
    assert told[0] is StartReport
    assert told[-1] is EndReport
    assert told.count(StepReport) == 6
    (page,) = scraped
    assert re.search(r'^ddetr_train_loss\{part="sides",rank="0",run=.*\} [\d.]+$', page, flags=re.MULTILINE)
    assert re.search(r'^ddetr_evaluation_score_ratio\{metric="constant",rank="0",run=.*\} 0.125$', page, re.MULTILINE)

    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": "tiny", "samples": 1, "search": {}, "metric": "hit"}))
    with pytest.raises(ValueError, match=r"metric: expected one of AP, .*, AR_large, .*, hits, constant, got 'hit'"):
        read_sweep(tmp_path / "sweep.yaml")
