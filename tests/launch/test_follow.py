"""`ddetr eval --follow`: checkpoints that come and go, followers that share them, end and start again."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.config import ConfigError
from ddetr.core.evaluation import result
from ddetr.launch import follow as follower
from ddetr.launch.evaluate import evaluate
from ddetr.launch.follow import follow
from ddetr.launch.history import event_line

from tests.core.runs import SMALL
from tests.processes import Command

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follower, "POLL_SECONDS", 0.05)


@pytest.fixture
def add(run_directory: Path, tmp_path: Path) -> Callable[[int], Path]:
    """Adds a checkpoint of this step to the run `tmp_path`/run, as training does: at once, and with other weights."""

    def add(step: int) -> Path:
        checkpoint = tmp_path / f"run/checkpoints/step_{step:08d}"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        half = checkpoint.with_name(f".{checkpoint.name}")
        shutil.copytree(run_directory / f"checkpoints/step_000000{10 if step % 20 else 20}", half)
        (half / "evaluation.json").unlink(missing_ok=True)
        os.utime(half / "model.safetensors", (step, step))
        half.rename(checkpoint)
        return checkpoint

    return add


def ends(run: Path, reason: str = "finished") -> None:
    with (run / "events.jsonl").open("a") as file:
        file.write(event_line("stop", reason=reason) + "\n")


def scores(checkpoint: Path) -> dict[str, float]:
    """Of the one result of a checkpoint."""
    (found,) = result.read(checkpoint)
    return found.metrics


def evaluated(said: str) -> list[int]:
    """The steps in the order in which they were evaluated."""
    return [int(step) for step in re.findall(r"step_(\d+)/model.safetensors on \d+ images", said)]


def test_the_newest_first_and_each_once(
    add: Callable[[int], Path], run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    first, second = add(10), add(20)
    ends(run)
    follow([run], [])
    assert evaluated(capsys.readouterr().out) == [20, 10]
    for checkpoint in (first, second):
        expected = evaluate(run_directory / "checkpoints" / checkpoint.name, [], output=tmp_path / checkpoint.name)
        assert scores(checkpoint) == expected
        assert (run / "eval" / checkpoint.name / "detections.json").is_file()
    assert not list(run.glob("eval/.*"))
    capsys.readouterr()
    follow([run], [])
    assert not evaluated(capsys.readouterr().out)
    follow([run], ["eval.top_k=5"])  # other settings: other results, beside the first ones
    assert evaluated(capsys.readouterr().out) == [20, 10]
    assert len(result.read(second)) == 2


def test_checkpoints_of_several_runs_until_all_have_finished(
    add: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, other = tmp_path / "run", tmp_path / "other"
    add(10)
    shutil.copytree(run, other)
    ends(other)

    def train() -> None:
        for step in (20, 30):
            time.sleep(0.5)
            add(step)
        ends(run, "asked to stop")  # it may be resumed
        time.sleep(0.5)
        add(40)
        ends(run)

    training = threading.Thread(target=train)
    training.start()
    follow([run, other], [])
    training.join()
    assert sorted(evaluated(capsys.readouterr().out)) == [10, 10, 20, 30, 40]


def test_a_run_that_says_nothing_is_left_after_the_idle_time(
    add: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(10)
    began = time.monotonic()
    follow([tmp_path / "run"], [], idle_minutes=0.02)
    assert time.monotonic() - began > 1.2
    said = capsys.readouterr().out
    assert said.count("waiting for new checkpoints") == 1
    assert "no new checkpoint for 0.02 min" in said


def test_what_cannot_be_evaluated_is_named_and_the_others_go_on(
    add: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    good, damaged, unread = add(10), add(20), add(30)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (unread / "evaluation.json").write_text("{")
    (add(40) / "model.safetensors").unlink()
    ends(run)
    with pytest.raises(ValueError, match=r"^3 checkpoint\(s\) could not be evaluated:") as refusal:
        follow([run], [])
    for step, reason in ((20, "not a readable"), (30, "move it away"), (40, "no checkpoint here")):
        assert re.search(rf"step_{step:08d}.*{reason}", str(refusal.value)), refusal.value
    assert evaluated(capsys.readouterr().out) == [10]
    assert scores(good)["AP"] >= 0


def test_shards_that_cannot_be_reached_are_tried_again(
    add: Callable[[int], Path],
    run_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, shards = tmp_path / "run", tmp_path / "shards"
    checkpoint = add(10)
    ends(run)
    with pytest.raises(ValueError, match=r"(?s)^1 checkpoint.*step_00000010: .*shards: no such folder"):
        follow([run], [], data=[shards])
    assert capsys.readouterr().out.count("is tried again") == follower.TRIES - 1
    there = load_detector(run_directory).config.data.validation
    come = SimpleNamespace(sleep=lambda seconds: shutil.copytree(there, shards), monotonic=time.monotonic)
    monkeypatch.setattr(follower, "time", come)
    follow([run], [], data=[shards])
    assert scores(checkpoint)["AP"] >= 0


def test_mistakes_are_told_before_anything_is_evaluated(add: Callable[[int], Path], tmp_path: Path) -> None:
    checkpoint = add(10)
    with pytest.raises(FileNotFoundError, match="missing/run: the folder that it is to be in is missing"):
        follow([tmp_path / "run", tmp_path / "missing/run"], [])
    with pytest.raises(ConfigError, match=r"eval\.topk: no such key"):
        follow([tmp_path / "run"], ["eval.topk=3"])
    assert not result.read(checkpoint)


@pytest.fixture
def start() -> Iterator[Callable[..., Command]]:
    """Starts `ddetr eval --follow`; what still runs in the end is killed."""
    started: list[Command] = []

    def start(*arguments: str | Path) -> Command:
        started.append(Command("eval", "--follow", *arguments))
        return started[-1]

    yield start
    for command in started:
        for process in command.processes:
            process.kill()


def test_what_another_follower_works_on_is_left_to_it(
    add: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoint = tmp_path / "run", add(20)
    add(10)
    ends(run)
    with ExitStack() as other:
        assert other.enter_context(follower.claimed(checkpoint))
        pauses = SimpleNamespace(
            sleep=lambda seconds: other.close(), monotonic=time.monotonic
        )  # it ends without a result
        monkeypatch.setattr(follower, "time", pauses)
        follow([run], [])
    assert evaluated(capsys.readouterr().out) == [10, 20]


def test_a_model_that_is_not_finite_ends_as_an_error(
    add: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(10)
    ends(tmp_path / "run")
    found = SimpleNamespace(result=SimpleNamespace(num_not_finite=3))
    monkeypatch.setattr(follower, "evaluate_detector", lambda *of: found)
    with pytest.raises(FloatingPointError, match=r"step_00000010.*: 3 queries gave infinities or NaN"):
        follow([tmp_path / "run"], [])


def test_followers_share_the_work_and_one_that_is_killed_is_replaced(
    add: Callable[[int], Path], start: Callable[..., Command], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    added = [add(step) for step in range(10, 90, 10)]
    killed = start(run)
    deadline = time.monotonic() + 120
    while not list(run.glob("eval/.*.claim")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(killed.processes[0].pid, signal.SIGKILL)
    followers = [start(run) for _ in range(2)]
    ends(run)
    said = [follower.communicate(timeout=300)[0] for follower in followers]
    assert [follower.returncode for follower in followers] == [0, 0], said
    steps = sorted(evaluated("".join(said)))
    before = evaluated(killed.communicate(timeout=60)[0])
    assert sorted([*steps, *before]) == [int(checkpoint.name[5:]) for checkpoint in added]
    assert not list(run.glob("eval/.*.claim"))
    for checkpoint in added:
        assert scores(checkpoint)


@pytest.mark.slow
def test_on_ray_whose_workers_are_given_back_meanwhile(
    add: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, waits = tmp_path / "run", []
    first = add(10)

    def wait(seconds: float) -> None:
        waits.append(ray.is_initialized())
        if len(waits) == 1:
            add(20)
            ends(run)

    monkeypatch.setattr(follower, "time", SimpleNamespace(sleep=wait, monotonic=time.monotonic))
    follow([run], [], ray_address="local")
    assert waits == [False]
    assert evaluated(capsys.readouterr().out) == [10, 20]
    expected = evaluate(first, [], output=tmp_path / "here")
    assert scores(first) == expected


def test_beside_a_training_run(start: Callable[..., Command], synthetic_shards: Path, tmp_path: Path) -> None:
    """Every checkpoint that the run keeps has its result, and the best one is kept for it."""
    run = tmp_path / "run"
    following = start(run, "--data", synthetic_shards, "train.device=cpu")
    settings = [f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=run"]
    training = Command("train", "tiny", *SMALL, *settings, "train.epochs=3", "train.checkpoint_every_epochs=1")
    told = training.communicate(timeout=300)
    assert training.returncode == 0, told
    said = following.communicate(timeout=300)
    assert following.returncode == 0, said
    assert f"{run} is not there yet" in said[0].replace("\n", "")
    assert sorted(evaluated(said[0])) == [6, 12, 18]
    assert [json.loads(line)["event"] for line in (run / "events.jsonl").read_text().splitlines()][-1] == "stop"
    for step in (6, 12, 18):
        assert scores(run / f"checkpoints/step_{step:08d}")["AP"] >= 0
