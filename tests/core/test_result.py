"""Results of evaluations beside their checkpoints: which are read, which can be compared."""

import fcntl
import hashlib
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ddetr.core.checkpoint.manifest import write_checkpoint
from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.config import changed, load
from ddetr.core.evaluation import result
from ddetr.core.evaluation.result import EVALUATION, Measure, Result
from ddetr.core.training.saving import prune
from ddetr.data.index import ShardIndex
from ddetr.launch import history
from ddetr.launch.report import report

OURS, OTHERS = Measure("a" * 64, "b" * 64), Measure("c" * 64, "b" * 64)


def saved(run: Path, step: int) -> Path:
    path = run / f"checkpoints/step_{step:08d}"
    write_checkpoint(path, 1, lambda folder: (folder / WEIGHTS).write_text(f"weights of {step}"), {"step": step})
    return path


def found(checkpoint: Path, score: float, measure: Measure = OURS, **others: object) -> Result:
    values = {"metrics": {"AP": score, "AP50": 0.5}, "headline": "AP", "images": 24, "num_not_finite": 0}
    step = int(checkpoint.name.removeprefix("step_"))
    values |= {
        "seconds": 1.5,
        "time": 1.79e9,
        "step": step,
        "epochs": step,
        "weights": result.weights_digest(checkpoint / WEIGHTS),
    }
    return Result(**{**values, "measure": measure, **others})  # pyright: ignore[reportArgumentType]


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1)
    first, second = found(checkpoint, 0.25), found(checkpoint, math.nan, OTHERS, num_not_finite=3)
    result.write(checkpoint, first)
    result.write(checkpoint, second)
    one, other = result.read(checkpoint)
    assert one == first
    assert math.isnan(other.metrics["AP"])
    assert (other.measure, other.num_not_finite) == (OTHERS, 3)
    assert "NaN" not in (checkpoint / EVALUATION).read_text()
    written = json.loads((checkpoint / EVALUATION).read_text())["results"][0]
    assert (written["shards"], written["settings"], "measure" in written) == (OURS.shards, OURS.settings, False)
    again = found(checkpoint, 0.5)
    result.write(checkpoint, again)
    assert [item.measure for item in result.read(checkpoint)] == [OTHERS, OURS]
    assert result.read(checkpoint)[-1] == again


def test_scores_that_a_later_evaluation_does_not_compute_stay(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1)
    result.write(checkpoint, found(checkpoint, 0.25, metrics={"AP": 0.25, "hits": 0.5}))
    result.write(checkpoint, found(checkpoint, 0.125))
    assert result.read(checkpoint)[0].metrics == {"AP": 0.125, "AP50": 0.5, "hits": 0.5}


def test_a_result_of_other_weights_is_none(tmp_path: Path) -> None:
    """As after a resume from an earlier step, which saves the step anew."""
    checkpoint = saved(tmp_path, 1)
    result.write(checkpoint, found(checkpoint, 0.25, weights="0" * 64))
    assert result.read(checkpoint) == []
    assert not result.is_evaluated(checkpoint, OURS)


def test_only_results_of_one_measure_are_compared(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step) for step in range(1, 5)]
    for path, score, measure in zip(paths, (0.3, 0.9, 0.4, 0.2), (OURS, OTHERS, OURS, OURS), strict=True):
        result.write(path, found(path, score, measure))
    results = {path: result.read(path) for path in paths}
    assert {path: item.score("AP") for path, item in result.comparable(results, OURS).items()} == {
        paths[0]: 0.3,
        paths[2]: 0.4,
        paths[3]: 0.2,
    }
    assert result.comparable(results) == result.comparable(results, OURS)  # the most have it
    assert list(result.comparable(results, OTHERS)) == [paths[1]]
    # What scores 0.9 on another, perhaps easier set is not the best of the run.
    assert prune(paths, 1, OURS) == [paths[0], paths[1]]


def test_the_best_by_an_evaluation_of_the_command_stays(tmp_path: Path) -> None:
    """A run that does not evaluate itself: `ddetr eval --all` says which of its checkpoints is the best."""
    paths = [saved(tmp_path, step) for step in range(1, 5)]
    for path, score in zip(paths, (0.3, 0.9, 0.4, 0.2), strict=True):
        result.write(path, found(path, score))
    assert prune(paths, 1) == [paths[0], paths[2]]


def test_settings_and_shards_make_the_measure(synthetic_shards: Path) -> None:
    index = ShardIndex.load(synthetic_shards)
    measure = Measure.of(load("tiny"), index)
    assert Measure.of(load("tiny", ["eval.batch_size=1", "train.seed=7", "eval.score_threshold=0.1"]), index) == measure
    for override in ("eval.top_k=50", "data.validation_short_side=64", "data.long_side=99"):
        assert Measure.of(load("tiny", [override]), index).settings != measure.settings
        assert Measure.of(load("tiny", [override]), index).shards == measure.shards


def test_the_settings_of_earlier_results_are_those_of_now(synthetic_shards: Path) -> None:
    """They stated COCO's 100 detections, which the protocol of the set counts; another protocol's are others."""
    coco, lvis = ShardIndex.load(synthetic_shards), ShardIndex.load(synthetic_shards)
    stated = '{"long_side": 128, "top_k": 100, "validation_short_side": 96}'
    own = load("tiny", ["data.long_side=128", "data.validation_short_side=96"])
    digest = hashlib.sha256(stated.encode()).hexdigest()
    assert Measure.of(own, coco).settings == digest
    assert Measure.of(changed(own, ["eval.top_k=100"], "test"), coco).settings == digest
    lvis.protocol = "lvis"
    settings = {Measure.of(changed(own, [f"eval.top_k={k}"], "test"), lvis).settings for k in ("null", 300, 100)}
    assert len(settings) == 2
    assert digest not in settings


def test_the_number_of_detections_stands_beside_scores_of_another_protocol(tmp_path: Path) -> None:
    own = found(saved(tmp_path, 1), 0.5, protocol="lvis", top_k=300)
    assert own.departure == ""
    assert replace(own, top_k=None).departure == ""
    assert replace(own, protocol="coco").departure == "with at most 300 detections an image, where COCO counts 100"


@pytest.mark.parametrize(("name", "value"), [("protocol", "voc"), ("protocol", 3), ("top_k", 0), ("top_k", "many")])
def test_a_protocol_or_number_that_cannot_be_is_named(name: str, value: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, 1)
    result.write(path, found(path, 0.5, protocol="lvis", top_k=300))
    (again,) = result.read(path)
    assert (again.protocol, again.top_k) == ("lvis", 300)
    file = path / EVALUATION
    values = json.loads(file.read_text())
    values["results"][0][name] = value
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=name):
        result.read(path)


@pytest.mark.parametrize("text", ["{", "[]", '{"version": 3}', '{"version": 2, "results": [{}]}', '{"AP": "x"}'])
def test_what_cannot_be_read_is_named_and_not_overwritten(tmp_path: Path, text: str) -> None:
    checkpoint = saved(tmp_path, 1)
    (checkpoint / EVALUATION).write_text(text)
    with pytest.raises(ValueError, match=r"step_00000001/evaluation\.json cannot be read"):
        result.read(checkpoint)
    with pytest.raises(ValueError, match="cannot be read"):
        result.write(checkpoint, found(checkpoint, 0.5))
    assert (checkpoint / EVALUATION).read_text() == text
    assert result.is_evaluated(checkpoint, OURS)


def test_another_measure_of_a_resumed_run_costs_not_the_best(tmp_path: Path) -> None:
    """Until it has evaluated itself, what was measured before says which checkpoint is the best."""
    paths = [saved(tmp_path, step) for step in range(1, 4)]
    for path, score in zip(paths, (0.5, 0.3, 0.2), strict=True):
        result.write(path, found(path, score))
    assert prune(paths, 1, OTHERS) == [paths[1]]
    result.write(paths[2], found(paths[2], 0.1, OTHERS))
    assert prune([paths[0], paths[2]], 1, OTHERS) == [paths[0]]


def test_checkpoints_are_compared_by_one_score(tmp_path: Path) -> None:
    """Whatever else a program with other protocols has called the headline."""
    paths = [saved(tmp_path, step) for step in range(1, 4)]
    for path, score in zip(paths, (0.5, 0.3, 0.2), strict=True):
        metrics = {"AP": score, "recall": 1 - score}
        result.write(path, found(path, score, metrics=metrics, headline="recall" if score == 0.3 else "AP"))
    assert prune(paths, 1, OURS) == [paths[1]]


def test_what_the_command_of_the_first_release_wrote_decides_nothing(tmp_path: Path) -> None:
    """It may be of any set: it is shown where there is nothing else."""
    paths = [saved(tmp_path, step) for step in range(1, 4)]
    for path, score in zip(paths, (0.1, 0.9, 0.2), strict=True):
        folder = result.folder_of(path / WEIGHTS)
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text(json.dumps({"AP": score}))
    assert not result.is_evaluated(paths[0], OURS)
    assert [item.measure for item in result.known(paths[0] / WEIGHTS)] == [result.UNKNOWN]
    assert scores_of(tmp_path) == {1: 0.1, 2: 0.9, 3: 0.2}
    result.write(paths[0], found(paths[0], 0.3))
    assert prune(paths, 1, OURS) == [paths[1]]
    (tmp_path / "metrics.jsonl").write_text(line(1, 0.3, OURS) + line(3, 0.4, OURS))
    assert scores_of(tmp_path) == {1: 0.3, 3: 0.4}


@pytest.mark.integration
def test_two_programs_lose_no_result_of_each_other(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1)
    digest = result.weights_digest(checkpoint / WEIGHTS)
    script = (
        "import sys; from pathlib import Path; from ddetr.core.evaluation.result import Measure, Result, write\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "for n in range(20):\n"
        "    measure = Measure(sys.argv[1] * 64, f'{n:064d}')\n"
        f"    found = Result({{'AP': 0.5}}, 'AP', 1, 0, 1.0, 1.0, 1, 1, {digest!r}, measure)\n"
        f"    write(Path({str(checkpoint)!r}), found)\n"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    writers = [subprocess.Popen([sys.executable, "-c", script, name], **pipes) for name in "ab"]
    for writer in writers:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        assert writer.stdin
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait(timeout=300) for writer in writers] == [0, 0]
    assert len(result.read(checkpoint)) == 40


def test_a_lock_that_another_program_keeps_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may read a checkpoint may lock it: that must not hold up a run for ever."""
    checkpoint = saved(tmp_path, 1)
    monkeypatch.setattr(result, "_LOCK_SECONDS", 0.2)
    with (checkpoint / "checkpoint.json").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError, match=r"another program holds its lock: '.*/checkpoint\.json'"):
            result.write(checkpoint, found(checkpoint, 0.5))
    result.write(checkpoint, found(checkpoint, 0.5))
    assert len(result.read(checkpoint)) == 1


def test_a_result_outlives_its_checkpoint(tmp_path: Path) -> None:
    paths = [saved(tmp_path, step) for step in (1, 2)]
    for path in paths:
        folder = result.folder_of(path / WEIGHTS)
        folder.mkdir(parents=True)
        for place in (path, folder):
            result.write(place, found(path, 0.25))
    shutil.rmtree(paths[0])
    assert scores_of(tmp_path) == {1: 0.25, 2: 0.25}
    assert [entry["epoch"] for entry in history.read(tmp_path).evaluations] == [0, 1]


def test_a_file_of_weights_has_no_result_of_another(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("a")
    (tmp_path / "b.safetensors").write_text("b")
    of_a = replace(found(saved(tmp_path, 1), 0.5), weights=result.weights_digest(tmp_path / "a.safetensors"))
    result.write(tmp_path, of_a)
    assert result.known(tmp_path / "a.safetensors") == [of_a]
    assert result.known(tmp_path / "b.safetensors") == []


def line(step: int, score: float, measure: Measure | None) -> str:
    digests = {"shards": measure.shards, "settings": measure.settings} if measure else {}
    counts = {"kind": "evaluation", "time": 1.79e9 + step, "step": step, "epoch": step - 1, "images": 24}
    return json.dumps({**counts, **digests, "metrics": {"AP": score}, "seconds": 1.0}) + "\n"


def scores_of(run: Path) -> dict[int, float]:
    return {record["step"]: record["metrics"]["AP"] for record in history.read(run).evaluations}


def test_the_history_has_the_results_beside_the_checkpoints(tmp_path: Path) -> None:
    """Lines of what is deleted meanwhile, and results that another program made later."""
    paths = {step: saved(tmp_path, step) for step in (2, 3)}
    (tmp_path / "metrics.jsonl").write_text(line(1, 0.1, OURS) + line(2, 0.2, OURS) + '{"kind": "eval')
    result.write(paths[2], found(paths[2], 0.25))
    result.write(paths[3], found(paths[3], 0.3))
    result.write(paths[3], found(paths[3], 0.9, OTHERS))
    assert scores_of(tmp_path) == {1: 0.1, 2: 0.25, 3: 0.3}
    assert history.read(tmp_path).others == 1
    assert history.read(tmp_path).unreadable == ["metrics.jsonl line 3"]


def test_a_run_that_did_not_evaluate_itself_has_the_results_of_others(tmp_path: Path) -> None:
    for step in (1, 2):
        path = saved(tmp_path, step)
        result.write(path, found(path, step / 10))
    assert scores_of(tmp_path) == {1: 0.1, 2: 0.2}


def test_the_lines_of_the_first_release_do_not_say_on_what(tmp_path: Path) -> None:
    """They are the run's own, and not mixed with results of a set that may be another one."""
    (tmp_path / "metrics.jsonl").write_text("".join(line(step, step / 10, None) for step in (1, 2, 3)))
    path = saved(tmp_path, 3)
    result.write(path, found(path, 0.9))
    assert scores_of(tmp_path) == {1: 0.1, 2: 0.2, 3: 0.3}
    assert history.read(tmp_path).others == 1


def test_a_run_of_the_first_release_that_goes_on_keeps_its_evaluations(tmp_path: Path) -> None:
    lines = [line(step, step / 10, None) for step in (1, 2)] + [line(3, 0.3, OURS)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    old = saved(tmp_path, 2)
    (old / EVALUATION).write_text('{"AP": 0.2}')
    assert scores_of(tmp_path) == {1: 0.1, 2: 0.2, 3: 0.3}
    assert history.read(tmp_path).evaluations[1]["images"] == 24  # of the line, which says more


STEP = {
    "kind": "step",
    "time": 1.79e9,
    "step": 1,
    "epoch": 0,
    "images": 8,
    "step_seconds": 1.0,
    "data_wait_seconds": 0.1,
}
STEP |= {"learning_rate": 1e-4, "gradient_norm": 1.0, "loss_scale": 1.0, "memory_bytes": 1, "skipped": False}
STEP |= {"parts": ["class"], "losses": {"total": 1.0, "class": 1.0}}
EVALUATION_LINE = json.loads(line(1, 0.5, OURS))


@pytest.mark.parametrize(
    "entry",
    [
        {**EVALUATION_LINE, "headline": ["AP"]},
        {**EVALUATION_LINE, "headline": "mAP"},
        {**EVALUATION_LINE, "metrics": {"AP": "x"}},
        {**EVALUATION_LINE, "metrics": [1]},
        {**EVALUATION_LINE, "metrics": {f"score {number}": 0.5 for number in range(101)} | {"AP": 0.5}},
        {**EVALUATION_LINE, "metrics": {"AP": 0.5, "x" * 61: 0.5}},
        {**STEP, "parts": "class"},
        {**STEP, "parts": ["class", 1]},
        {**STEP, "parts": ["class", "l1"]},
        {**STEP, "parts": [f"part {number}" for number in range(33)]},
        {**STEP, "losses": {**STEP["losses"], "l1": "x"}},
        {**STEP, "losses": {**STEP["losses"], "x" * 61: 1.0}},
        {**STEP, "losses": None},
    ],
)
def test_a_line_that_nobody_can_work_with_is_left_out_and_named(entry: dict[str, Any], tmp_path: Path) -> None:
    good = [json.dumps(STEP), json.dumps(EVALUATION_LINE)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*good, json.dumps(entry)]) + "\n")
    (tmp_path / "config.yaml").write_text("{}")
    found = history.read(tmp_path)
    assert (len(found.steps), len(found.evaluations)) == (1, 1)
    assert found.unreadable == ["metrics.jsonl line 3"]
    report(tmp_path)


@pytest.mark.parametrize("scores", [{f"score {number}": 0.5 for number in range(101)}, {"x" * 61: 0.5}])
def test_a_result_with_more_than_can_be_shown_is_refused(scores: dict[str, float], tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, 1)
    result.write(checkpoint, found(checkpoint, 0.5, metrics={"AP": 0.5, **scores}))
    with pytest.raises(ValueError, match="at most 100 of 60 characters are read"):
        result.read(checkpoint)
