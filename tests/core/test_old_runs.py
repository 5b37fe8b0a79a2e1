"""Runs of the first release go on as that release itself took them further: the losses and scores beside them."""

import json
import tarfile
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint import checkpoints
from ddetr.core.checkpoint.codec import TRAINING, Checkpoint
from ddetr.core.checkpoint.manifest import MANIFEST
from ddetr.core.evaluation import result
from ddetr.core.progress import Position
from ddetr.core.training.saving import prune
from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set
from safetensors.torch import load_file, save_file

from tests.core.runs import succeeded, trained
from tests.processes import finished

HERE = Path(__file__).parent
RESUMED = json.loads((HERE / "old_runs_resumed.json").read_text())


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs were trained on."""
    folder = tmp_path_factory.mktemp("old")
    draw_set(folder / "coco", images=16, size=64, classes=3, seed=7, workers=1)
    pack(folder / "coco/annotations.json", folder / "coco/images", folder / "shards", workers=1)
    return folder / "shards"


@pytest.fixture
def old_runs(tmp_path: Path) -> Path:
    with tarfile.open(HERE / "old_runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def ddetr(*words: str | Path) -> str:
    done = finished(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.integration
@pytest.mark.parametrize("name", ["plain", "average"])
def test_an_old_run_goes_on_as_its_release_took_it_on(name: str, old_runs: Path, shards: Path) -> None:
    directory, expected = old_runs / name, RESUMED[name]
    arguments = ["monitor.port=0", "train.epochs=3", "train.log_every_steps=1", "train.keep_checkpoints=0"]
    arguments += [f"data.train={shards}", f"data.validation={shards}"]
    run = succeeded(trained(directory, "--resume", directory, *arguments))
    losses = {str(step["step"]): step["losses"]["total"] for step in run.steps if step["step"] > 8}
    assert losses == pytest.approx(expected["losses"], rel=1e-4)
    evaluations = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    evaluated = [line for line in evaluations if line["kind"] == "evaluation"][-1]
    assert evaluated["step"] == 12
    assert evaluated["metrics"] == pytest.approx(expected["evaluation"], rel=1e-4)

    before, newest = checkpoints(directory)[:-1], checkpoints(directory)[-1]
    assert (newest.name, before[-1].name) == ("step_00000012", "step_00000008")
    scores = {path: result.read(path)[-1].score("AP") for path in (*before, newest)}
    best = max(scores, key=lambda path: scores[path])
    own = result.read(newest)[-1].measure
    assert prune(checkpoints(directory), 1, own) == [path for path in before if path != best]


@pytest.mark.parametrize("name", ["plain", "average"])
def test_an_old_checkpoint_is_read_as_its_files_say(name: str, old_runs: Path) -> None:
    folder = old_runs / name / "checkpoints/step_00000008"
    stored, kept = Checkpoint.read(folder), load_file(folder / TRAINING)
    assert stored.position == Position(8, 2, 0, 4, stored.position.order)
    assert stored.averaged == (name == "average")
    for kind in ("exp_avg", "exp_avg_sq", "weights") if stored.averaged else ("exp_avg", "exp_avg_sq"):
        expected = {key.removeprefix(f"{kind}/"): value for key, value in kept.items() if key.startswith(f"{kind}/")}
        found = dict(stored.beside(kind))
        assert found.keys() == expected.keys() == stored.trained.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("lost", ["order", "steps_per_epoch", "ranks", "zero_stage"])
def test_an_old_manifest_may_lack_what_a_resume_can_do_without(lost: str, old_runs: Path) -> None:
    folder = changed(old_runs, lost)
    position = Checkpoint.read(folder).position
    assert (position.step, position.epochs, position.steps_per_epoch) == (8, 2, 4)


@pytest.mark.parametrize("lost", ["step", "epoch", "step_in_epoch", "optimizer_steps", "moving_average", "loss_scale"])
def test_an_old_manifest_without_what_a_resume_needs_is_named(lost: str, old_runs: Path) -> None:
    folder = changed(old_runs, lost)
    with pytest.raises(ValueError, match=f"step_00000008 is damaged: checkpoint.json lacks .* \\('{lost}' is missing"):
        Checkpoint.read(folder)


def test_old_training_state_without_the_optimizer_is_damage(old_runs: Path) -> None:
    folder = changed(old_runs, "")
    save_file({}, folder / TRAINING)
    values = json.loads((folder / MANIFEST).read_text())
    values["files"][TRAINING]["bytes"] = (folder / TRAINING).stat().st_size
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"step_00000008 is damaged: .*{TRAINING} has no state of the optimizer"):
        Checkpoint.read(folder)


def changed(old_runs: Path, lost: str) -> Path:
    """The newest checkpoint, whose manifest lacks a member."""
    folder = old_runs / "plain/checkpoints/step_00000008"
    values = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({name: value for name, value in values.items() if name != lost}))
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("name", ["plain", "average"])
def test_an_old_run_is_shown_reported_and_evaluated(name: str, old_runs: Path, shards: Path) -> None:
    directory = old_runs / name
    shown = ddetr("checkpoint", "inspect", directory)
    assert "step 8, 2 epoch(s) done" in shown
    assert "checksums right; written by 1 rank(s), ZeRO " in shown
    ddetr("report", directory)
    assert "<html" in (directory / "report.html").read_text()
    checkpoint = directory / "checkpoints/step_00000008"
    recorded = json.loads((checkpoint / "evaluation.json").read_text())
    ddetr("eval", directory, "--data", shards)
    old, new = (found.metrics["AR100"] for found in result.read(checkpoint))  # the others depend on near-equal scores
    assert old == recorded["AR100"] == pytest.approx(new)
