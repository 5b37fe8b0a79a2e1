"""A real training run of two ranks, watched by a real Prometheus, then written up by `ddetr report`."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ddetr.launch.identity import identify
from ddetr.launch.report import report

pytestmark = pytest.mark.slow

MODEL = "model.hidden_dim=32 model.feedforward_dim=32 model.encoder_layers=1 model.decoder_layers=2 model.queries=30"
SETTINGS = "data.short_sides=[96] data.validation_short_side=96 train.batch_size=4 train.log_every_steps=1"


@pytest.fixture
def training(synthetic_shards: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """The launcher's process and the run directory. 24 images, so an epoch and its evaluation come every six steps."""
    command = "-m ddetr.launch.torchrun --standalone --nproc-per-node 2 -- train tiny"
    command += f" {MODEL} {SETTINGS} train.output=runs train.name=watched train.epochs=100000 monitor.port=0"
    folders = [f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}"]
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *command.split(), *folders],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    yield process, tmp_path / "runs" / "watched"
    process.terminate()
    process.wait(timeout=120)


def wait_for_targets(targets: Path, process: subprocess.Popen[bytes], seconds: float) -> list[dict[str, Any]]:
    """The groups of targets.json, once the run has written them."""
    deadline = time.monotonic() + seconds
    output = targets.parents[2] / "output.txt"
    while not targets.exists():
        assert process.poll() is None, f"training ended with {process.returncode}:\n{output.read_text()}"
        assert time.monotonic() < deadline, f"no {targets} within {seconds} s:\n{output.read_text()}"
        time.sleep(0.5)
    return json.loads(targets.read_text())


def test_every_dashboard_expression_has_data_of_a_real_run(training, prometheus, dashboard_expressions):
    process, run_directory = training
    targets = run_directory / "targets.json"
    groups = wait_for_targets(targets, process, seconds=300)
    label = identify(run_directory).label
    assert label.startswith("watched@")
    assert [group["labels"] for group in groups] == [{"run": label, "rank": "0"}, {"run": label, "rank": "1"}]

    server = prometheus(targets)
    for title, expressions in dashboard_expressions.items():
        for expression in expressions:
            server.wait_for(
                lambda expression=expression: server.query(expression), f"data for {title}: {expression}", seconds=200
            )
    for group in server.get("rules")["groups"]:
        for rule in group["rules"]:
            assert (rule["health"], rule.get("lastError")) == ("ok", None), rule["name"]
            server.get("query", query=rule["query"])
            if rule["type"] == "recording":
                assert server.query(rule["name"]), rule["name"]

    assert {(s["metric"]["rank"], s["value"]) for s in server.query("up")} == {("0", 1.0), ("1", 1.0)}
    assert {s["value"] for s in server.query("ddetr_images_total / ddetr_steps_total")} == {4.0}
    losses = {s["metric"]["part"]: s["value"] for s in server.query('ddetr_train_loss{rank="0"}')}
    assert losses["total"] == pytest.approx(losses["class"] + losses["l1"] + losses["giou"], rel=1e-4)
    # every wait is a part of its step
    assert all(0 <= s["value"] < 1 for s in server.query("run_rank:ddetr_data_wait:share5m"))

    process.terminate()
    process.wait(timeout=120)
    records = [json.loads(line) for line in (run_directory / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["kind"] == "step"][-1]
    (seen,) = server.query('max_over_time(ddetr_current_step{rank="0"}[10m])')
    assert 6 <= seen["value"] <= last["step"]
    assert json.loads(targets.read_text()) == []  # it ended in order: nothing is missing
    server.wait_for(lambda: not server.query("up"), "the ended run's ranks are forgotten")
    assert report(run_directory).read_text().count("<svg") == 8


def test_two_runs_of_one_name_are_two_and_a_resumed_one_stays_itself(
    synthetic_shards: Path, tmp_path: Path, prometheus
) -> None:
    settings = f"{MODEL} {SETTINGS} train.name=same train.epochs=100000 monitor.port=0".split()
    settings += [f"data.train={synthetic_shards}", "train.evaluate_every_epochs=0"]

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        with (tmp_path / "output.txt").open("a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "ddetr.launch.cli", "train", *arguments],
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    started = {name: start("tiny", *settings, f"train.output={name}") for name in ("mine", "theirs")}
    try:
        groups = {
            name: wait_for_targets(tmp_path / name / "same/targets.json", process, seconds=300)
            for name, process in started.items()
        }
        (mine, theirs) = (group["labels"]["run"] for (group,) in groups.values())
        (tmp_path / "targets.json").write_text(json.dumps([*groups["mine"], *groups["theirs"]]))
        server = prometheus(tmp_path / "targets.json")
        rate = "run:ddetr_images:rate5m"
        server.wait_for(lambda: len(server.query(rate)) == 2, "the speed of both", seconds=200)
        assert {s["metric"]["run"] for s in server.query(rate)} == {mine, theirs}
        assert {s["metric"]["run"]: s["value"] for s in server.query("run:ddetr_ranks:count")} == {mine: 1, theirs: 1}
        started["theirs"].kill()
        alert = server.wait_for(
            lambda: [a for a in server.get("alerts")["alerts"] if a["labels"]["alertname"] == "DdetrRankMissing"],
            "an alert about the killed run",
        )
        assert [a["labels"]["run"] for a in alert] == [theirs]
        started["mine"].terminate()
        assert started["mine"].wait(timeout=120) == 0
        (tmp_path / "mine/same/targets.json").unlink()
        started["mine"] = start("--resume", "mine/same")
        (group,) = wait_for_targets(tmp_path / "mine/same/targets.json", started["mine"], seconds=300)
        assert group["labels"]["run"] == mine
    finally:
        for process in started.values():
            process.kill()
            process.wait()
