"""Checkpoints in real runs: for any number of ranks and ZeRO stage, whole or not there, checked when used."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.codec import TRAINING, Checkpoint
from ddetr.core.checkpoint.manifest import (
    LATEST,
    MANIFEST,
    verify,
    write_checkpoint,
)
from ddetr.core.checkpoint.weights import WEIGHTS, checkpoints, find_checkpoint, step_directory
from ddetr.core.evaluation import result
from ddetr.core.evaluation.result import EVALUATION
from ddetr.core.training.saving import prune
from safetensors.torch import load_file

from tests.core.runs import SMALL, Run, Train, collect, strict_json, succeeded, trained, wait_for
from tests.processes import Command

EXACT = ("model.dropout=0", "train.checkpoint_every_steps=4")
STEPS = 8


def resume(directory: Path, ranks: int, *arguments: str) -> Run:
    return trained(directory, "--resume", directory, *arguments, ranks=ranks)


def half_of(run: Run, tmp_path: Path) -> Path:
    """A copy of a run whose newest checkpoint is that of step 4."""
    copy = Path(shutil.copytree(run.directory, tmp_path / "half"))
    for checkpoint in checkpoints(copy)[1:]:
        shutil.rmtree(checkpoint)
    return copy


@pytest.mark.integration
@pytest.mark.parametrize(
    ("written", "resumed"),
    [
        ((2, 1), (1, 3)),
        pytest.param((1, 0), (2, 2), marks=pytest.mark.slow),
        pytest.param((1, 0), (4, 1), marks=pytest.mark.slow),
        pytest.param((4, 3), (2, 1), marks=pytest.mark.slow),
        pytest.param((2, 1), (3, 3), marks=pytest.mark.slow),
        pytest.param((2, 3), (1, 0), marks=pytest.mark.slow),
    ],
)
def test_other_ranks_and_stages_go_on_as_those_that_wrote_it(
    train: Train, tmp_path: Path, written: tuple[int, int], resumed: tuple[int, int]
) -> None:
    batch = ("train.batch_size=12",) if 3 in (written[0], resumed[0]) else ()
    whole = succeeded(train(written[0], f"train.zero_stage={written[1]}", *EXACT, *batch, steps=STEPS))
    copy = half_of(whole, tmp_path)
    run = succeeded(resume(copy, resumed[0], f"train.zero_stage={resumed[1]}"))
    after = {step["step"]: step for step in run.steps}  # those taken twice count the second time
    assert sorted(after) == list(range(1, STEPS + 1))
    for expected in whole.steps[4:]:
        assert after[expected["step"]]["losses"]["total"] == pytest.approx(expected["losses"]["total"], rel=2e-4)
    expected, found = (load_file(find_checkpoint(path) / WEIGHTS) for path in (whole.directory, copy))
    before = load_file(step_directory(copy, 4) / WEIGHTS)
    moved = torch.stack([(expected[name] - before[name]).norm() for name in before]).norm()
    apart = torch.stack([(expected[name] - found[name]).norm() for name in before]).norm()
    assert apart < 0.02 * moved


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "ranks", "stage"),
    [
        (("train.precision=bf16", "train.ema_decay=0.9"), 2, 1),
        (("train.precision=bf16", "train.ema_decay=0.9"), 1, 0),
        (("train.precision=bf16", "train.ema_decay=0.9"), 2, 3),
        (("train.deepspeed_extra={zero_optimization: {offload_optimizer: {device: cpu}}}",), 2, 1),
    ],
    ids=["bf16 as it was", "bf16 on one rank", "bf16 divided", "optimizer offloaded"],
)
def test_what_ranks_keep_elsewhere_goes_on_too(
    train: Train, tmp_path: Path, settings: tuple[str, ...], ranks: int, stage: int
) -> None:
    """Float32 copies of half-precision weights, their moving average, an optimizer's state on the host."""
    whole = succeeded(train(2, "train.zero_stage=1", *EXACT, "optim.learning_rate=1e-3", *settings, steps=STEPS))
    copy = half_of(whole, tmp_path)
    taken = len(collect(copy, "", 0).steps)
    run = succeeded(resume(copy, ranks, f"train.zero_stage={stage}"))
    again = run.steps[taken:]
    assert [step["step"] for step in again] == [5, 6, 7, 8]
    if (ranks, stage) == (2, 1):
        assert [step["losses"] for step in again] == [step["losses"] for step in whole.steps[4:]]
    before = load_file(step_directory(copy, 4) / WEIGHTS)
    expected, found = (load_file(find_checkpoint(folder) / WEIGHTS) for folder in (whole.directory, copy))
    moved = torch.stack([(expected[name] - before[name]).norm() for name in before]).norm()
    apart = torch.stack([(expected[name] - found[name]).norm() for name in before]).norm()
    assert apart < (0.3 if "precision" in settings[0] else 0.02) * moved


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_stage_writes_what_stage_0_writes(train: Train, stage: int) -> None:
    """The same files with the same names; the same weights and averages but for rounding; and no pickle."""
    plain = succeeded(train(2, "train.zero_stage=0", *EXACT, steps=STEPS)).directory
    other = succeeded(train(2, f"train.zero_stage={stage}", *EXACT, steps=STEPS)).directory
    for folder in (plain, other):
        assert {path.name for path in find_checkpoint(folder).iterdir()} == {WEIGHTS, TRAINING, MANIFEST}
        assert (folder / "checkpoints" / LATEST).read_text() == "step_00000008\n"
    for name in (WEIGHTS, TRAINING):
        expected, found = (load_file(step_directory(folder, 4) / name) for folder in (plain, other))
        assert {key: value.shape for key, value in found.items()} == {key: v.shape for key, v in expected.items()}
        difference = sum(float((found[key] - expected[key]).square().sum()) for key in expected) ** 0.5
        size = sum(float(value.square().sum()) for value in expected.values()) ** 0.5
        assert difference < 1e-3 * size
    listed = [json.loads((find_checkpoint(folder) / MANIFEST).read_text()) for folder in (plain, other)]
    assert [values["slots"] for values in listed] == [["exp_avg", "exp_avg_sq"]] * 2
    assert listed[0]["trained"] == listed[1]["trained"]
    assert set(listed[0]["trained"].values()) == {STEPS}


@pytest.mark.integration
def test_a_damaged_checkpoint_is_named_with_the_way_on(train: Train, tmp_path: Path) -> None:
    whole = succeeded(train(2, "train.zero_stage=1", *EXACT, steps=STEPS))
    run = Path(shutil.copytree(whole.directory, tmp_path / "damaged"))
    file = find_checkpoint(run) / TRAINING
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused = resume(run, 1, "train.max_steps=10")
    assert refused.exit_status == 2
    assert f"the checksum of {TRAINING} is wrong" in refused.output
    file.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=f"{TRAINING} has {len(data) - 5} bytes instead of {len(data)}"):
        verify(file.parent)
    file.unlink()
    with pytest.raises(
        ValueError, match=f"{TRAINING} is missing. Move it away, to step_00000008.damaged, say; the run"
    ):
        verify(file.parent)
    (file.parent / WEIGHTS).rename(file.parent / "other")
    with pytest.raises(ValueError, match=f"step_00000008 is damaged: {WEIGHTS} is missing. Move it away"):
        find_checkpoint(run)
    file.parent.rename(file.parent.with_suffix(".damaged"))
    before = find_checkpoint(run)
    assert before is not None
    assert before.name < file.parent.name
    verify(before)


@pytest.mark.parametrize("damage", [b"", b"{}", b"[1]", b'{"step": 4}', None])
def test_a_manifest_without_what_a_resume_needs_is_named(tmp_path: Path, damage: bytes | None) -> None:
    path = step_directory(tmp_path, 4)
    write_checkpoint(path, 1, lambda folder: (folder / WEIGHTS).write_text("weights"), {"step": 4})
    if damage is not None:
        (path / MANIFEST).write_bytes(damage)
    with pytest.raises(ValueError, match="step_00000004"):
        Checkpoint.read(path)


@pytest.mark.parametrize("side", ["file", "folder"])
def test_an_unreadable_evaluation_prevents_no_save(tmp_path: Path, side: str) -> None:
    for step in (1, 2, 3):
        path = step_directory(tmp_path, step)
        write_checkpoint(path, 1, lambda folder: (folder / WEIGHTS).write_text("weights"), {"step": step})
        if side == "folder":
            (path / EVALUATION).mkdir()
        else:
            (path / EVALUATION).write_bytes(b"\xff\x00garbage")
        prune(checkpoints(tmp_path), 1)
    assert path in checkpoints(tmp_path)


@pytest.mark.integration
def test_another_batch_size_goes_on_with_the_next_epoch(train: Train, tmp_path: Path) -> None:
    """Two epochs of 3 steps, then one of 6: every image once more, at the rate of the third epoch."""
    settings = ("train.batch_size=8", "train.epochs=2", "optim.drop_epochs=[2]")
    whole = succeeded(train(1, *settings, steps=100))
    run = Path(shutil.copytree(whole.directory, tmp_path / "run"))
    before = (run / "config.yaml").read_bytes()
    finished = succeeded(resume(run, 1))
    line = "nothing is left to do: 2 epoch(s), 6 steps are done, and train.epochs=2 asks for no more"
    assert f"{line}; to go on, set a larger train.epochs" in finished.output
    assert (run / "config.yaml").read_bytes() == before

    told = succeeded(resume(run, 1, "train.batch_size=4", "train.epochs=3", "model.dropout=0", "train.name=other"))
    assert [(step["step"], step["epoch"]) for step in told.steps[6:]] == [(number, 2) for number in range(7, 13)]
    assert sum(step["images"] for step in told.steps[6:]) == 24
    assert [step["learning_rate"] for step in told.steps[6:]] == pytest.approx([1e-5] * 6)
    assert "an epoch has 6 steps now, and had 3 until step 6: 2 epoch(s) and 0 of 3 steps are done" in told.output
    assert "settings changed since step 6: model.dropout 0.1 -> 0.0, train.epochs 2 -> 3, train.batch_size 8 -> 4" in (
        told.output
    )
    assert "without effect, the run goes on with its weights in its folder: train.name" in told.output
    position = json.loads((find_checkpoint(run) / MANIFEST).read_text())
    assert [position[key] for key in ("step", "epochs", "step_in_epoch", "steps_per_epoch")] == [12, 3, 0, 6]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MiB: room for three checkpoints, not for four."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.integration
def test_a_full_disk_is_said_and_loses_nothing(synthetic_shards: Path, small_disk: Path) -> None:
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={small_disk}", "train.name=full"]
    arguments += ["train.max_steps=5", "train.zero_stage=0", "train.checkpoint_every_steps=1", "train.batch_size=6"]
    arguments += [f"data.validation={synthetic_shards}", "train.evaluate_every_epochs=1"]  # of four steps each
    run = trained(small_disk / "full", *arguments)
    kept = checkpoints(run.directory)
    assert 0 < len(kept) < 5
    for checkpoint in kept:
        verify(checkpoint)
    assert run.exit_status == 2
    assert len(run.steps) == 5  # it trained on, as room might have been made
    failed = [event for event in run.events if event["event"] == "checkpoint_failed"]
    assert [event["step"] for event in failed] == list(range(len(kept) + 1, 6))
    assert "no room for a checkpoint of" in failed[0]["reason"]
    assert "set train.keep_checkpoints" in run.output
    assert "step 4 is not evaluated either" in run.output
    assert succeeded(resume(run.directory, 1, "train.keep_checkpoints=1")).steps[-1]["step"] == 5


@pytest.mark.slow
def test_a_disk_without_a_byte_left(synthetic_shards: Path, small_disk: Path) -> None:
    """Nothing can begin; what has begun goes on without a line of its files until its last step."""
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={small_disk}", "train.name=full"]
    arguments += ["train.max_steps=5", "train.zero_stage=0"]
    run = succeeded(trained(small_disk / "full", *arguments))
    filler = small_disk / "filler"
    fill(filler)
    refused = resume(run.directory, 1, "train.max_steps=8")
    assert refused.exit_status == 2
    assert "config.yaml: No space left on device" in refused.output
    filler.unlink()
    process = Command("train", "--resume", run.directory, "train.max_steps=60", "train.log_every_steps=1")
    wait_for(run.directory / "metrics.jsonl", process, lines=len(run.steps) + 3)
    fill(filler)
    output = process.communicate()[0]
    assert process.returncode == 2, output[-2000:]
    assert "step 54 is not saved: no room for a checkpoint" in output
    assert "step 60/60" in output
    assert "no room for a checkpoint of" in output.splitlines()[-1]
    filler.unlink()
    assert succeeded(resume(run.directory, 1, "train.keep_checkpoints=1")).steps[-1]["step"] == 60


def fill(filler: Path) -> None:
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def record(checkpoint: Path, score: float) -> None:
    """An evaluation on some set."""
    weights, measure = result.weights_digest(checkpoint / WEIGHTS), result.Measure("0" * 64, "1" * 64)
    result.write(checkpoint, result.Result({"AP": score, "AP50": score}, "AP", 24, 0, 1.5, 1e9, 1, 1, weights, measure))


def test_a_diverged_checkpoint_is_never_the_best(tmp_path: Path) -> None:
    for step, score in ((1, 0.001), (2, math.nan), (3, math.nan)):
        path = step_directory(tmp_path, step)
        write_checkpoint(path, 10, lambda folder: (folder / WEIGHTS).write_text("weights"), {"step": step})
        record(path, score)
    (stored,) = strict_json((path / EVALUATION).read_text())["results"]
    assert stored["metrics"] == {"AP": None, "AP50": None}
    assert [path.name for path in prune(checkpoints(tmp_path), 1)] == ["step_00000002"]
    assert [path.name for path in checkpoints(tmp_path)] == ["step_00000001", "step_00000003"]


def test_only_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    def save(step: int, score: float | None = None) -> Path:
        path = step_directory(tmp_path, step)
        write_checkpoint(path, 10, lambda folder: (folder / WEIGHTS).write_text(str(step)), {"step": step})
        if score is not None:
            record(path, score)
        return path

    paths = [save(step, score) for step, score in ((1, 0.1), (2, 0.5), (3, 0.4), (4, 0.45), (5, None))]
    assert prune(checkpoints(tmp_path), 0) == []
    assert prune(checkpoints(tmp_path), 2) == [paths[0], paths[2]]
    assert checkpoints(tmp_path) == [paths[1], paths[3], paths[4]]
    for text in ('{"AP": "x"}', "[" * 5_000, "{"):  # nobody can say how good it is: it may be the best
        (paths[3] / EVALUATION).write_text(text)
        assert prune(checkpoints(tmp_path), 1) == []
    (paths[3] / EVALUATION).unlink()
    record(paths[3], 0.45)
    assert result.read(paths[1])[0].metrics["AP"] == 0.5
    assert (tmp_path / "checkpoints" / LATEST).read_text() == "step_00000005\n"
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        LATEST,
        *(path.name for path in checkpoints(tmp_path)),
    ]


ENDLESS_SAVING = Path(__file__).with_name("endless_saving.py")


@pytest.mark.integration
def test_killed_at_any_instant_of_saving_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    """30 times SIGKILL at a random instant of a process that does nothing but save."""
    instants, last = random.Random(0), 0
    for _ in range(30):
        process = Command(tmp_path / "checkpoints", str(last), program=ENDLESS_SAVING)
        while not process.stdout:
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        time.sleep(instants.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        said = process.stdout.split()
        last = int(said[-1]) if said else last
        found = checkpoints(tmp_path)
        assert found
        for checkpoint in found:
            values = verify(checkpoint)
            assert float(load_file(checkpoint / WEIGHTS)["7"][0, 0]) == values["step"]
        assert verify(found[-1])["step"] in (last, last + 1)
        last = verify(found[-1])["step"]
        assert len(found) <= 3


@pytest.mark.slow
def test_a_run_killed_while_saving_resumes(synthetic_shards: Path, tmp_path: Path) -> None:
    """Ten times: a run that saves after every step is killed at some instant, and goes on from a whole checkpoint."""
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=killed"]
    arguments += [
        "train.checkpoint_every_steps=1",
        "train.zero_stage=1",
        "train.keep_checkpoints=2",
        "train.auto_resume=true",
    ]
    directory, instants, reached = tmp_path / "killed", random.Random(1), 0
    for _ in range(10):
        process = Command("train", *arguments)
        wait_for(step_directory(directory, reached + 1), process)
        time.sleep(instants.uniform(0, 1))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        newest = find_checkpoint(directory)
        assert verify(newest)["step"] > reached
        reached = verify(newest)["step"]
    run = collect(directory, "", 0)
    steps = [step["step"] for step in run.steps]
    assert set(range(1, reached + 1)) <= set(steps)
