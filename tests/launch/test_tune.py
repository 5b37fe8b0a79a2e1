"""`ddetr tune`: sweep files are checked as a whole; trials are real training runs with the values they were given."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from ddetr.core.checkpoint.weights import find_checkpoint
from ddetr.core.config import ConfigError, load
from ddetr.launch.sweep import Sweep, read_sweep
from ddetr.launch.tune import tune

from tests.launch.conftest import SMALL


@pytest.fixture
def sweep(run_directory: Path, tmp_path: Path) -> dict:
    """A valid sweep: two short trainings of a small model on one CPU each."""
    shards = str(run_directory.parent / "shards")
    overrides = [
        f"data.train={shards}", f"data.validation={shards}", "data.short_sides=[64]", "data.validation_short_side=64",
        "data.long_side=96", "model.hidden_dim=64", "model.encoder_layers=1", "model.decoder_layers=1", "model.heads=4",
        "model.feedforward_dim=64", "train.batch_size=6", "train.epochs=3", "train.device=cpu", "train.zero_stage=0",
        "monitor.enabled=false", "eval.top_k=30",
    ]  # fmt: skip
    return {
        "base": "tiny",
        "overrides": overrides,
        "samples": 3,
        "search": {
            "optim.learning_rate": {"loguniform": [1e-5, 1e-3]},
            "model.queries": {"integer": [10, 20]},
            "optim.clip_norm": {"choice": [0.1, 0.5]},
        },
        "output": str(tmp_path / "out"),
    }


def mistakes(sweep: dict, tmp_path: Path) -> list[str]:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    with pytest.raises(ConfigError) as raised:
        read_sweep(path)
    head, *lines = str(raised.value).splitlines()
    assert head == f"{len(lines)} mistake(s) in {path}:"
    return [line.strip() for line in lines]


def test_a_valid_sweep_is_read(sweep: dict, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(sweep))
    read, base = read_sweep(path)
    assert (read.metric, read.mode, read.concurrent) == ("AP", "max", 1)
    assert base.model.hidden_dim == 64


def test_misspelt_keys_are_all_listed_with_the_near_ones(sweep: dict, tmp_path: Path) -> None:
    del sweep["samples"]
    sweep |= {"sample": 3, "metric": "mAP", "gpus_per_trial": 2}
    sweep["search"]["optim.learning_rate"] = {"logunifrom": [1e-5, 1e-3]}
    sweep["scheduler"] = {"asha": {"grace_epoch": 1}}
    found = mistakes(sweep, tmp_path)
    assert "samples: Field required" in found
    assert "sample: no such key. Did you mean samples?" in found
    assert any(line.startswith("metric: expected one of AP, AP50") and "got 'mAP'" in line for line in found)
    assert any(line.startswith("gpus_per_trial:") and "got 2" in line for line in found)
    assert "search.optim.learning_rate.logunifrom: no such key. Did you mean loguniform?" in found
    assert "scheduler.asha.grace_epoch: no such key. Did you mean grace_epochs?" in found


def test_searched_keys_and_values_are_tried_on_the_configuration(sweep: dict, tmp_path: Path) -> None:
    sweep["search"] = {
        "optim.learning_rat": {"uniform": [0.1, 0.2]},
        "model.queries": {"choice": [20, -5]},
        "optim.clip_norm": {"uniform": [-1.0, 1.0]},
        "train.output": {"choice": ["elsewhere"]},
        "train.epochs": {"choice": [2, 3]},
    }
    sweep["scheduler"] = {"asha": {}}
    sweep["overrides"].append("data.validation=null")
    found = mistakes(sweep, tmp_path)
    assert "optim.learning_rat: no such key. Did you mean optim.learning_rate?" in found
    assert any(line.startswith("model.queries:") and "got -5" in line for line in found)
    assert any(line.startswith("optim.clip_norm:") and "got -1.0" in line for line in found)
    assert any(line.startswith("search.train.output: the sweep sets it") for line in found)
    assert any("asha decides how many epochs" in line for line in found)
    assert any("set data.train and data.validation" in line for line in found)
    assert len(found) == 6


def test_a_file_without_keys_and_a_sweep_without_scores_are_refused(sweep: dict, tmp_path: Path) -> None:
    path = tmp_path / "list.yaml"
    path.write_text("- base: tiny\n")
    with pytest.raises(ConfigError, match=rf"^{path}: expected keys \(base, .*\), got list$"):
        read_sweep(path)
    sweep["overrides"].append("train.evaluate_every_epochs=0")
    assert mistakes(sweep, tmp_path) == [
        "overrides: train.evaluate_every_epochs must be at least 1; a trial is judged by its evaluations"
    ]


@pytest.mark.parametrize(
    ("distribution", "message"),
    [
        ({}, "give one of choice, uniform, loguniform, integer, got none"),
        ({"choice": [1], "uniform": [0, 1]}, "got ['choice', 'uniform']"),
        ({"uniform": [2.0, 1.0]}, "the lower end must be below the upper one, got [2.0, 1.0]"),
        ({"loguniform": [0.0, 1.0]}, "both ends must be positive, got [0.0, 1.0]"),
    ],
)
def test_distributions_are_checked(sweep: dict, tmp_path: Path, distribution: dict, message: str) -> None:
    sweep["search"] = {"optim.learning_rate": distribution}
    (found,) = mistakes(sweep, tmp_path)
    assert found.startswith("search.optim.learning_rate: ")
    assert message in found


def test_values_that_fit_only_together_are_not_refused(sweep: dict, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    sweep["search"] = {"model.hidden_dim": {"choice": [64, 96]}, "model.heads": {"choice": [4, 3]}}
    path.write_text(yaml.safe_dump(sweep))
    read_sweep(path)  # 3 heads do not fit the base's 64 channels, but 96
    sweep["search"]["model.heads"]["choice"].append(5)
    (found,) = mistakes(sweep, tmp_path)
    assert found.startswith("model: hidden_dim must be a multiple of heads and of 32")
    assert found.endswith("got 64 with heads=5; nearest: 160")


def test_what_trials_would_trip_over_is_told_before_the_first(
    sweep: dict, run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run's model has 2 decoder layers and its shards 18 images of 3 categories."""
    monkeypatch.chdir(run_directory.parent)
    given = [*SMALL, "data.train=shards", "data.validation=shards", "train.initial_weights=run"]
    sweep["overrides"] = given
    rates = {"optim.learning_rate": {"uniform": [1e-5, 1e-4]}}
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**sweep, "search": rates}))
    read_sweep(path)

    def told(*overrides: str, **search: dict) -> str:
        searched = {key.replace("__", "."): value for key, value in search.items()}
        path.write_text(yaml.safe_dump({**sweep, "overrides": given + list(overrides), "search": searched or rates}))
        with pytest.raises(ConfigError, match=r"^1 mistake\(s\) in ") as raised:
            read_sweep(path)
        return str(raised.value)

    assert (
        "model.decoder_layers=3: run/checkpoints/step_00000020/model.safetensors: holds another architecture"
        in told(model__decoder_layers={"choice": [2, 3]})
    )
    assert "train.initial_weights=absent: absent: no checkpoint here" in told(
        train__initial_weights={"choice": ["run", "absent"]}
    )
    assert "data.train=absent: absent: no such folder" in told(data__train={"choice": ["absent", "shards"]})
    assert "model.num_classes=5, but shards has 3 categories" in told(
        "model.num_classes=5", "train.new_class_head=true", data__flip_probability={"uniform": [0.1, 0.5]}
    )
    assert "train.batch_size=19" in told(train__batch_size={"integer": [1, 19]})
    assert "gpus_per_trial: is 0, but train.device=cuda" in told("train.device=cuda")


def test_the_sweep_in_the_docstring_is_valid(tmp_path: Path) -> None:
    import ddetr.launch.sweep

    example = str(ddetr.launch.sweep.__doc__).split("\n\n", 2)[2]
    assert Sweep.model_validate(yaml.safe_load(example)).scheduler.asha is not None


@pytest.mark.slow
def test_too_large_a_trial_is_refused_at_once(sweep: dict, tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "cpus_per_trial": 5000}))
    with pytest.raises(ValueError, match=r"cpus_per_trial=5000 .*no node of the Ray cluster has that much"):
        tune(tmp_path / "sweep.yaml")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sweep_of_which_no_trial_succeeds_tells_the_error(sweep: dict, tmp_path: Path) -> None:
    sweep["search"] = {"optim.learning_rate": {"choice": [1e30]}, "optim.clip_norm": {"choice": [0.0]}}
    sweep["overrides"].append("train.most_skipped_steps=2")
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**sweep, "samples": 1}))
    with pytest.raises(ValueError, match="no trial succeeded; the first error: FloatingPointError: skipped 2 steps"):
        tune(tmp_path / "sweep.yaml")
    assert json.loads((tmp_path / "out/results.json").read_text())["trials"][0]["best"] is None


@pytest.mark.slow
def test_trials_train_with_the_values_they_were_given(sweep: dict, tmp_path: Path) -> None:
    sweep["scheduler"] = {"asha": {"grace_epochs": 1, "reduction_factor": 2}}
    # 64 channels do not divide among 3 heads: such a trial fails, the others go on.
    sweep["search"]["model.hidden_dim"] = {"choice": [64, 96]}
    sweep["search"]["model.heads"] = {"choice": [4, 3]}
    sweep |= {"samples": 4, "concurrent": 2, "seed": 4, "metric": "AR100"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    results = json.loads(tune(tmp_path / "sweep.yaml").read_text())
    trials = results["trials"]
    assert len(trials) == 4
    succeeded = [trial for trial in trials if trial["error"] is None]
    failed = [trial for trial in trials if trial["error"] is not None]
    assert succeeded
    assert failed
    for trial in succeeded:
        config = load(Path(trial["run_directory"]) / "config.yaml").model_dump()
        for key, value in trial["parameters"].items():
            section, name = key.split(".")
            assert config[section][name] == value, key
        lines = (Path(trial["run_directory"]) / "metrics.jsonl").read_text().splitlines()
        evaluations = [row for row in map(json.loads, lines) if row["kind"] == "evaluation"]
        reported = evaluations[: trial["epochs"]]  # a stopped trial may have begun the next epoch
        assert max(row["metrics"]["AR100"] for row in reported) == pytest.approx(trial["best"])
        assert trial["stopped_early"] == (trial["epochs"] < 3)
    assert len({trial["parameters"]["optim.learning_rate"] for trial in trials}) == 4
    assert any(trial["epochs"] == 3 for trial in succeeded)
    assert all("heads" in trial["error"] for trial in failed)
    bests = [trial["best"] for trial in succeeded]
    assert bests == sorted(bests, reverse=True)
    with (tmp_path / "out/results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [trial["trial"] for trial in trials]
    assert float(rows[0]["optim.learning_rate"]) == trials[0]["parameters"]["optim.learning_rate"]


@pytest.mark.slow
def test_a_search_whose_driver_is_killed_leaves_its_table(sweep: dict, run_directory: Path, tmp_path: Path) -> None:
    """Trials one after the other, with paths and a command that mean the folder in which the search was started."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "shards").symlink_to(run_directory.parent / "shards")
    shutil.copyfile(find_checkpoint(run_directory) / "model.safetensors", work / "first.safetensors")
    given = ["data.train=pipe:cat shards/{}", "data.validation=shards", "data.cache=cache", "train.batch_size=6"]
    given += ["train.epochs=1", "monitor.enabled=false", "train.zero_stage=0"]
    search = {
        "optim.learning_rate": {"loguniform": [1e-5, 1e-3]},
        "train.initial_weights": {"choice": ["first.safetensors"]},
    }
    values = {**sweep, "overrides": [*SMALL, *given], "samples": 5, "concurrent": 1, "search": search, "output": "out"}
    (work / "sweep.yaml").write_text(yaml.safe_dump(values))
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "ddetr.launch.cli", "tune", "sweep.yaml"],
            cwd=work,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    children: list[psutil.Process] = []

    def events(trial: str) -> dict[str, float]:
        file = work / "out/trials" / trial / "events.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return {event["event"]: event["time"] for event in map(json.loads, lines)}

    try:
        deadline = time.monotonic() + 600
        while "start" not in events("trial_00001"):
            assert time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
            assert process.poll() is None, (tmp_path / "output.txt").read_text()
            time.sleep(0.2)
        children = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
        for child in children:  # Ray's processes, those that do not end by themselves
            if child.is_running():
                child.kill()
    assert events("trial_00000")["stop"] <= events("trial_00001")["start"]
    assert not (work / "out/trials/trial_00002").exists()
    results = json.loads((work / "out/results.json").read_text())
    assert [(row["trial"], row["state"]) for row in results["trials"]] == [
        ("trial_00000", "ended"),
        ("trial_00001", "running"),
    ]
    lines = (work / "out/trials/trial_00000/metrics.jsonl").read_text().splitlines()
    (evaluation,) = [row for row in map(json.loads, lines) if row["kind"] == "evaluation"]
    assert results["trials"][0]["best"] == evaluation["metrics"]["AP"]
    with (work / "out/results.csv").open() as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["ended", "running"]
    assert f"The table so far is in {work}/out/results.json" in (tmp_path / "output.txt").read_text()
    assert f"weights of {work}/first.safetensors" in (work / "out/trials/trial_00000/log.txt").read_text()
    assert os.listdir(work / "cache") == ["ddetr-shards"]
