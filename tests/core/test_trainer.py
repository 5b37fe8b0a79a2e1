"""Real training runs in real processes: ranks, ZeRO stages, accumulation, killing and resuming."""

import json
import math
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.checkpoint.weights import find_checkpoint
from ddetr.core.model.detector import DeformableDetr
from safetensors.torch import load_file

from tests.core.runs import SMALL, Run, Train, collect, succeeded, trained, wait_for
from tests.processes import Command, finished
from tests.truth import coco_truth

pytestmark = pytest.mark.integration


def assert_same_losses(run: Run, reference: Run, rel: float) -> None:
    assert len(run.losses) == len(reference.losses) > 0
    assert run.losses == pytest.approx(reference.losses, rel=rel)
    norms = [step["gradient_norm"] for step in run.steps]
    assert norms == pytest.approx([step["gradient_norm"] for step in reference.steps], rel=10 * rel)


def test_two_ranks_take_the_same_steps_as_one(train: Train) -> None:
    one = succeeded(train(1, "train.zero_stage=0", "model.dropout=0"))
    two = succeeded(train(2, "train.zero_stage=0", "model.dropout=0"))
    assert_same_losses(two, one, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_take_the_same_steps(train: Train, stage: int) -> None:
    reference = succeeded(train(2, "train.zero_stage=0", "model.dropout=0"))
    run = succeeded(train(2, f"train.zero_stage={stage}", "model.dropout=0"))
    assert_same_losses(run, reference, rel=1e-4)
    # Adam magnifies rounding where a gradient is nearly zero, so parameters are compared by how far they moved.
    detector = load_detector(reference.directory)
    torch.manual_seed(detector.config.train.seed)
    initial = DeformableDetr(detector.config.model).state_dict()
    expected, weights = detector.model.state_dict(), load_detector(run.directory).model.state_dict()
    moved = torch.stack([(expected[name] - initial[name]).norm() for name in initial]).norm()
    apart = torch.stack([(expected[name] - weights[name]).norm() for name in initial]).norm()
    assert apart < 0.02 * moved


def test_offloading_the_optimizer_takes_the_same_steps(train: Train) -> None:
    reference = succeeded(train(2, "train.zero_stage=2", "model.dropout=0"))
    offload = "train.deepspeed_extra={zero_optimization: {offload_optimizer: {device: cpu}}}"
    assert_same_losses(succeeded(train(2, "train.zero_stage=2", "model.dropout=0", offload)), reference, rel=1e-4)


def test_accumulation_takes_the_same_steps(train: Train) -> None:
    whole = succeeded(train(1, "train.zero_stage=0", "model.dropout=0"))
    halves = succeeded(train(1, "train.zero_stage=0", "model.dropout=0", "train.accumulation=2"))
    assert_same_losses(halves, whole, rel=1e-4)


def test_bfloat16_stays_near_float32(train: Train) -> None:
    exact = succeeded(train(2, "train.zero_stage=0", "model.dropout=0"))
    half = succeeded(train(2, "train.zero_stage=2", "model.dropout=0", "train.precision=bf16"))
    # Untrained proposals are nearly tied: rounding chooses others, whose loss differs by percents.
    assert half.losses[0] == pytest.approx(exact.losses[0], rel=0.03)
    assert half.losses == pytest.approx(exact.losses, rel=0.1)
    assert half.losses != exact.losses


def test_the_run_directory_tells_everything(train: Train) -> None:
    run = succeeded(train(2, "train.zero_stage=2", "model.dropout=0"))
    assert [step["step"] for step in run.steps] == [1, 2, 3, 4]
    for step in run.steps:
        losses = step["losses"]
        assert losses["total"] == pytest.approx(losses["class"] + losses["l1"] + losses["giou"])
        assert losses["class"] == pytest.approx(losses["class_0"] + losses["class_1"] + losses["class_proposals"])
        assert step["images"] == 4
        assert 0 <= step["data_wait_seconds"] <= step["step_seconds"]
        assert step["memory_bytes"] > 100 << 20
    assert [event["event"] for event in run.events] == ["start", "checkpoint", "stop"]
    assert json.loads((run.directory / "targets.json").read_text()) == []  # the run is over
    assert "images/s" in (run.directory / "log.txt").read_text()
    detector = load_detector(run.directory)
    assert detector.step == 4
    assert detector.categories is not None
    assert detector.categories.ids == (1, 23, 56)
    assert detector.config.model.queries == 12


def test_warm_up_and_drop_are_followed(train: Train) -> None:
    run = succeeded(train(1, "optim.warmup_steps=2", "optim.drop_epochs=[1]", "optim.learning_rate=1e-4", steps=8))
    rates = [step["learning_rate"] for step in run.steps]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-4, 1e-5, 1e-5])  # 24 images: 6 steps an epoch


@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), pytest.param(1, 0, marks=pytest.mark.slow)])
def test_killed_and_resumed_run_repeats_the_uninterrupted_one(
    train: Train, synthetic_shards: Path, tmp_path: Path, ranks: int, stage: int
) -> None:
    """SIGKILL somewhere after the checkpoint of step 4; dropout is on, so the random numbers must agree as well."""
    uninterrupted = succeeded(train(ranks, f"train.zero_stage={stage}", "train.checkpoint_every_steps=4", steps=24))
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=killed"]
    arguments += ["train.max_steps=24", f"train.zero_stage={stage}", "train.checkpoint_every_steps=4"]
    process = Command("train", *arguments, ranks=ranks)
    directory = tmp_path / "killed"
    wait_for(directory / "checkpoints/step_00000004", process)
    process.kill()
    before = collect(directory, "", 0)
    assert before.steps[-1]["step"] < 24, "the run ended before it could be killed"

    after = succeeded(trained(directory, "--resume", directory, ranks=ranks))
    last = {step["step"]: step for step in after.steps}  # a step taken twice: the second time counts
    assert sorted(last) == list(range(1, 25))
    for expected in uninterrupted.steps:
        assert last[expected["step"]]["losses"] == expected["losses"]
    expected_weights = load_file(find_checkpoint(uninterrupted.directory) / "model.safetensors")
    for name, tensor in load_file(find_checkpoint(directory) / "model.safetensors").items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=0)


def test_auto_resume_starts_anew_what_died_before_its_first_checkpoint(synthetic_shards: Path, tmp_path: Path) -> None:
    directory = tmp_path / "again"
    directory.mkdir()
    (directory / "config.yaml").write_text("left by the run that died")
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=again"]

    def attempt(*more: str) -> Run:
        return trained(directory, *arguments, *more)

    refused = attempt("train.max_steps=2")
    assert refused.exit_status == 2
    assert "exists already" in refused.output
    started = succeeded(attempt("train.max_steps=2", "train.auto_resume=true"))
    assert [step["step"] for step in started.steps] == [1, 2]
    resumed = succeeded(attempt("train.max_steps=3", "train.auto_resume=true"))
    assert [step["step"] for step in resumed.steps] == [1, 2, 3]
    assert [event["event"] for event in resumed.events if "ranks" in event] == ["start", "resume"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_cleanly(synthetic_shards: Path, tmp_path: Path, number: signal.Signals) -> None:
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=stopped"]
    arguments += ["train.epochs=1000", "train.checkpoint_every_epochs=0", "train.log_every_steps=7"]
    process = Command("train", *arguments)
    wait_for(tmp_path / "stopped/metrics.jsonl", process, lines=3)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-3000:]
    assert f"{number.name}: saving after this step" in output
    assert "Traceback" not in output
    run = collect(tmp_path / "stopped", output, 0)
    last = load_detector(run.directory).step
    assert run.steps[-1]["step"] == last
    assert sum(step["since_last_line"]["steps"] for step in run.steps) == last
    assert sum(step["since_last_line"]["images"] for step in run.steps) == 4 * last
    assert [event["event"] for event in run.events] == ["start", "checkpoint", "stop"]


def test_evaluates_each_epoch_with_the_weights_just_saved(train: Train, synthetic_shards: Path) -> None:
    from ddetr.core.evaluation.coco import coco_metrics
    from ddetr.core.evaluation.columns import to_coco
    from ddetr.core.evaluation.evaluator import evaluate_shards
    from ddetr.data.index import ShardIndex

    run = succeeded(train(2, f"data.validation={synthetic_shards}", "train.evaluate_every_epochs=1", steps=6))
    rows = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [row for row in rows if row["kind"] == "evaluation"]
    assert (evaluation["step"], evaluation["images"]) == (6, 24)
    index, detector = ShardIndex.load(synthetic_shards), load_detector(run.directory)
    torch.set_num_threads(1)
    found = [part.detections for part in evaluate_shards(detector, index, range(len(index.shards)), "cpu")]
    truth = coco_truth(index)
    assert evaluation["metrics"] == coco_metrics(truth, to_coco(np.concatenate(found)), "pycocotools")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.precision=fp16"], "train.precision=fp16 needs a GPU"),
        (["model.num_classes=4"], "set model.num_classes=3"),
        (["train.batch_size=25"], "batch_size"),
        (["train.deepspeed_extra={fp16: {enabled: true}}"], "set train.precision instead"),
        (["data.train=nowhere"], "nowhere: no such folder"),
        (["model.backbone=resnet5000"], "model.backbone='resnet5000'"),
    ],
)
def test_mistakes_are_one_clear_message(train: Train, overrides: list[str], message: str) -> None:
    if message.startswith("train.precision=fp16") and torch.ops.mkldnn._is_mkldnn_fp16_supported():
        pytest.skip("this CPU computes in float16")
    run = train(1, *overrides)
    assert run.exit_status == 2, run.output[-3000:]
    assert message in run.output
    assert "Traceback" not in run.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_gpu_asked_for_but_absent(train: Train) -> None:
    run = train(1, "train.device=cuda")
    assert run.exit_status == 2
    assert "train.device=cuda needs a GPU" in run.output
    assert "set train.device=cpu" in run.output
    assert "Traceback" not in run.output
    assert not run.directory.exists()


def test_port_that_is_taken_is_found_before_anything_is_written(train: Train) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        run = train(1, f"monitor.port={port}")
    assert run.exit_status == 2
    assert f"port {port} of 127.0.0.1 is taken by another process" in run.output
    assert "monitor.port=0" in run.output
    assert "Traceback" not in run.output
    assert not run.directory.exists()


def test_resuming_with_another_architecture_is_refused(train: Train) -> None:
    run = succeeded(train(1, "train.zero_stage=0", "model.dropout=0"))
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    refused = finished("train", "--resume", run.directory, "model.feedforward_dim=32", "train.max_steps=6")
    assert refused.returncode == 2
    assert "holds another architecture than the configuration describes" in refused.stderr
    assert "linear1.weight is (64, 64) in the file, (32, 64) in the model" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()} == before


def test_learning_makes_the_loss_smaller(train: Train) -> None:
    run = succeeded(train(1, "optim.learning_rate=1e-3", "model.dropout=0", steps=24))
    assert all(math.isfinite(loss) for loss in run.losses)
    assert sum(run.losses[-6:]) < 0.8 * sum(run.losses[:6])
