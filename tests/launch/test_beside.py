"""The process beside rank 0, with a Ray of its own; and a run whose checkpoints it evaluates."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ddetr.core.checkpoint import contents
from ddetr.core.config import Config, load
from ddetr.core.evaluation import result
from ddetr.core.training.evaluator_process import Answer, EvaluatorProcess
from ddetr.launch import history, lifeline, train
from ddetr.launch.evaluate import evaluate
from ddetr.launch.follow import claimed
from ddetr.launch.train import check_beforehand

from tests.core.runs import SMALL, collect
from tests.launch.nodes import two_ray_nodes
from tests.processes import finished

pytestmark = pytest.mark.integration


class Process:
    """The process, and one order after another."""

    def __init__(self, config: Config, printed: Path) -> None:
        self.process = EvaluatorProcess(lifeline.command("beside", "local"), config, printed)

    def evaluate(self, checkpoint: Path) -> tuple[Answer, list[str]]:
        """How it ended, and what was said on the way."""
        self.process.order(checkpoint)
        said: list[str] = []
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline:
            for answer in self.process.answers():
                if answer.kind != "said":
                    return answer, said
                said.append(answer.text)
            time.sleep(0.05)
        raise AssertionError("no answer")


@pytest.fixture
def process(run_directory: Path, tmp_path: Path) -> Iterator[Process]:
    started = Process(contents(run_directory).config, tmp_path / "eval/log.txt")
    yield started
    started.process.drop()


def test_each_checkpoint_gets_an_answer(process: Process, run_directory: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_directory / "checkpoints", run / "checkpoints")
    first, second = (run / f"checkpoints/step_000000{step}" for step in (10, 20))
    damaged = run / "checkpoints/step_00000030"
    shutil.copytree(second, damaged)
    with (damaged / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    answer, _ = process.evaluate(damaged)
    assert (answer.kind, answer.again) == ("failed", False)
    assert "step_00000030/model.safetensors" in answer.text
    answer, _ = process.evaluate(run / "checkpoints/step_00000040")
    assert answer == Answer("failed", f"{run}/checkpoints/step_00000040 was deleted meanwhile", again=False)
    answer, said = process.evaluate(second)
    assert answer == Answer("done")
    assert said
    assert said[0].startswith("Ray: 1 worker(s) for ")
    with claimed(first) as is_free:  # a follower is at it
        assert is_free
        assert process.evaluate(first) == (Answer("busy"), [])
    assert process.evaluate(first)[0].kind == "done"
    for checkpoint in (first, second):
        expected = tmp_path / checkpoint.name
        assert evaluate(run_directory / "checkpoints" / checkpoint.name, [], output=expected)
        (found,) = result.read(checkpoint)
        assert (found.by, len(found.hosts)) == ("train", 1)
        assert found.metrics == result.read(expected)[0].metrics
        for name in ("detections.json", "ground_truth.json"):
            assert (run / "eval" / checkpoint.name / name).read_bytes() == (expected / name).read_bytes()
    before = (first / "evaluation.json").read_bytes()
    assert process.evaluate(first) == (Answer("done"), []), "it has a result"
    assert (first / "evaluation.json").read_bytes() == before
    process.process.end(at_work=False)
    assert process.process.status == 0


@pytest.mark.slow
def test_a_run_has_its_checkpoints_evaluated_and_no_ray_in_a_rank(synthetic_shards: Path, tmp_path: Path) -> None:
    """Two ranks; the program that is run in their place looks at what is imported in the end."""
    looking = tmp_path / "looking.py"
    looking.write_text(
        "import sys\n"
        "from ddetr.launch.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print('modules of ray:', [name for name in sys.modules if name == 'ray'], flush=True)\n"
    )
    settings = [f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", f"train.output={tmp_path}"]
    settings += ["train.name=run", "train.epochs=6", "train.evaluate_every_epochs=1", "train.keep_checkpoints=1"]
    line = ["train", "tiny", *SMALL, *settings, "eval.required=all", "eval.most_waiting=9", "--eval-ray", "local"]
    done = finished(*line, ranks=2, program=looking)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("modules of ray: []") == 2, done.stdout
    run = collect(tmp_path / "run", done.stdout, 0)
    found = {entry["step"]: entry for entry in history.read(tmp_path / "run").evaluations}
    assert sorted(found) == [6, 12, 18, 24, 30, 36]
    assert not [event for event in run.events if event["event"] == "evaluation_missed"]
    assert run.events[-1]["event"] == "stop"
    # The checkpoints that waited were kept until then; what is left are the newest and perhaps the best.
    assert found[36]["by"] == "train"
    for step, entry in found.items():
        assert entry["epoch"] == step // 6 - 1
    again = finished("train", "--resume", tmp_path / "run", program=looking)
    assert "nothing is left to do" in again.stdout, again.stdout + again.stderr


@pytest.mark.slow
def test_training_and_evaluation_on_one_ray_cluster(synthetic_shards: Path, tmp_path: Path) -> None:
    """A rank is a child of a Ray worker there, and the process beside it has its variables."""
    settings = [f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", f"train.output={tmp_path}"]
    settings += ["train.name=run", "train.epochs=4", "train.evaluate_every_epochs=2", "eval.required=all"]
    with two_ray_nodes() as address:
        line = ["train", "tiny", *SMALL, *settings, "--ray", address, "--ranks", "1", "--eval-ray", address]
        done = finished(*line)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [entry["step"] for entry in history.read(tmp_path / "run").evaluations] == [12, 24]
    assert not [event for event in collect(tmp_path / "run", "", 0).events if event["event"] == "evaluation_missed"]


def test_what_leaves_nothing_to_evaluate_is_named(synthetic_shards: Path, tmp_path: Path) -> None:
    settings = [f"data.train={synthetic_shards}", f"train.output={tmp_path}"]
    done = finished("train", "tiny", *SMALL, *settings, "--eval-ray", "127.0.0.1:1")
    assert done.returncode == 2
    assert "eval.ray=127.0.0.1:1: there is nothing to evaluate: data.validation is not set and train." in done.stderr
    done = finished("train", "tiny", *SMALL, *settings, "--eval-ray", "elsewhere")
    assert "eval.ray: expected HOST:PORT, ray://HOST:PORT, auto or local, got 'elsewhere'" in done.stderr


def test_a_sweep_evaluates_within_its_trials(synthetic_shards: Path) -> None:
    shards = [f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}"]
    with pytest.raises(ValueError, match=r"^eval\.ray=auto: a sweep goes by each evaluation as it comes"):
        check_beforehand(load("tiny", [*SMALL, *shards, "train.evaluate_every_epochs=1", "eval.ray=auto"]))


def test_who_asked_to_stop_does_not_wait_at_the_end() -> None:
    """Also if it was while the last checkpoint was saved, after which the run is finished all the same."""

    def finish(stop: Callable[[], bool]) -> list[int]:
        return [] if stop() else [24]

    def signalled(stop: Callable[[], bool]) -> list[int]:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while not stop():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return [24]

    def missing(asked: bool, finish: Callable[[Callable[[], bool]], list[int]]) -> list[int]:
        trainer: Any = SimpleNamespace(beside=SimpleNamespace(finish=finish), watch=SimpleNamespace(asked=asked))
        return train._missing_beside(trainer)

    assert missing(False, finish) == [24]
    assert missing(True, finish) == []
    assert missing(False, signalled) == []


@pytest.mark.slow
def test_a_run_whose_cluster_never_answers_is_trained_and_says_so(synthetic_shards: Path, tmp_path: Path) -> None:
    settings = [f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", f"train.output={tmp_path}"]
    settings += ["train.name=run", "train.epochs=4", "train.evaluate_every_epochs=2", "eval.wait_minutes=0.2"]
    line = ["train", "tiny", *SMALL, *settings, "--eval-ray", "127.0.0.1:1"]
    done = finished(*line)
    assert done.returncode == 2
    assert "is trained, but the evaluation of step 24 is missing (eval.required=last)" in done.stderr
    assert f"ddetr eval {tmp_path}/run --follow" in done.stderr
    events = collect(tmp_path / "run", "", 0).events
    missed = [(event["step"], event["kind"]) for event in events if event["event"] == "evaluation_missed"]
    assert (24, "unreachable") in missed
    assert missed[-2:] == [(12, "left_out"), (24, "left_out")]
    assert events[-1]["event"] == "stop"
    assert events[-1]["reason"] == "finished"
    evaluate(tmp_path / "run", [])  # the newest one
    more = ["train", "--resume", tmp_path / "run", "eval.ray=local", "eval.required=all", "eval.wait_minutes=5"]
    again = finished(*more)
    assert again.returncode == 0, again.stdout + again.stderr
    assert [entry["step"] for entry in history.read(tmp_path / "run").evaluations] == [12, 24]
