"""Choices of how to train, each in a real run: recomputed activations, compilation, DETR, initial weights."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.codec import TRAINING, Checkpoint
from ddetr.core.checkpoint.published import export_published
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.checkpoint.weights import WEIGHTS, find_checkpoint, step_directory
from ddetr.core.config import load, preset_names
from ddetr.core.model.detector import build
from ddetr.core.training.optimizer import rate_advice
from safetensors.torch import load_file

from tests.core.runs import SMALL, Train, succeeded, trained
from tests.processes import finished

DETR = (
    *("model.architecture=detr", "model.classification=softmax", "model.levels=1"),
    *("model.box_refine=false", "model.two_stage=false"),
)


@pytest.mark.integration
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        (0, ()),
        pytest.param(3, (), marks=pytest.mark.slow),
        pytest.param(2, DETR, marks=pytest.mark.slow),
        pytest.param(1, ("train.precision=bf16",), marks=pytest.mark.slow),
    ],
)
def test_recomputed_activations_change_no_digit(train: Train, stage: int, more: tuple[str, ...]) -> None:
    """Dropout included: its random numbers are drawn again."""
    settings = (f"train.zero_stage={stage}", *more)
    kept = succeeded(train(1, *settings))
    recomputed = succeeded(train(1, *settings, "train.checkpoint_activations=true"))
    assert recomputed.losses == kept.losses


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "tolerance"), [(0.0, 1e-4), (0.1, 0.1)])
def test_compiled_model_takes_the_same_steps(train: Train, dropout: float, tolerance: float) -> None:
    """With dropout only nearly: a compiled layer draws other random numbers."""
    settings = ("train.zero_stage=1", f"model.dropout={dropout}", "data.short_sides=[64,96]")
    eager = succeeded(train(1, *settings))
    compiled = succeeded(train(1, *settings, "train.compile=true"))
    assert compiled.losses == pytest.approx(eager.losses, rel=tolerance)


@pytest.mark.integration
def test_compiling_under_stage_3_is_refused(train: Train) -> None:
    run = train(1, "train.compile=true", "train.zero_stage=3")
    assert run.exit_status == 2
    assert "compile does not work with zero_stage=3" in run.output


FROZEN = ("model.dropout=0", "optim.clip_norm=0", "optim.backbone_multiplier=0", "train.checkpoint_every_steps=2")


@pytest.mark.integration
def test_a_backbone_without_a_rate_has_no_share_in_the_gradient_norm(train: Train) -> None:
    """After one step AdamW's average is a tenth of the gradient: so the run that trains everything tells each part."""
    whole = succeeded(train(1, "train.zero_stage=1", *FROZEN[:2], steps=1))
    average = Checkpoint.read(find_checkpoint(whole.directory)).slots["exp_avg"]
    gradients = {name: 10 * value for name, value in average.items()}
    rest = [value.norm() for name, value in gradients.items() if not name.startswith("backbone.")]
    assert 0 < len(rest) < len(gradients)
    frozen = succeeded(train(1, "train.zero_stage=1", *FROZEN))
    assert frozen.losses[0] == whole.losses[0]
    assert frozen.steps[0]["gradient_norm"] == pytest.approx(float(torch.stack(rest).norm()), rel=1e-4)
    assert frozen.steps[0]["gradient_norm"] < 0.99 * whole.steps[0]["gradient_norm"]


@pytest.mark.integration
def test_another_choice_of_what_trains_is_refused_on_resume(train: Train) -> None:
    run = succeeded(train(1, "train.zero_stage=1", *FROZEN))
    before = {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()}
    refused = finished("train", "--resume", run.directory, "optim.backbone_multiplier=0.1", "train.max_steps=6")
    assert refused.returncode == 2
    assert "if optim.backbone_multiplier was changed to or from 0, change it back" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {path: path.read_bytes() for path in run.directory.rglob("*") if path.is_file()} == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "settings"),
    [
        (1, ("train.zero_stage=0",)),
        (2, ("train.zero_stage=1", "train.precision=bf16", "train.ema_decay=0.9")),
        (2, ("train.zero_stage=2",)),
        (2, ("train.zero_stage=3",)),
    ],
)
def test_a_frozen_backbone_is_kept_nowhere_but_in_the_weights(
    train: Train, tmp_path: Path, ranks: int, settings: tuple[str, ...]
) -> None:
    """And a run that is resumed goes on as one that was not interrupted."""
    run = succeeded(train(ranks, *FROZEN, *settings))
    first, last = (step_directory(run.directory, step) for step in (2, 4))
    assert not [name for name in load_file(last / TRAINING) if "backbone" in name]
    before, after = (load_file(folder / WEIGHTS) for folder in (first, last))
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in before if name.startswith("backbone.")} <= same
    assert len(same) < len(before)
    copy = Path(shutil.copytree(run.directory, tmp_path / "half"))
    shutil.rmtree(step_directory(copy, 4))
    again = succeeded(trained(copy, "--resume", copy, ranks=ranks))
    assert [step["step"] for step in again.steps] == [1, 2, 3, 4, 3, 4]
    assert again.losses[4:] == pytest.approx(run.losses[2:], rel=1e-5)


@pytest.mark.integration
@pytest.mark.parametrize(("multiplier", "frozen"), [("0.1", 0.025776), ("0", 0.370608)])
def test_a_dry_run_counts_what_trains(synthetic_shards: Path, multiplier: str, frozen: float) -> None:
    """Of test_resnet's 370608 parameters its stem and layer1 have 25776."""
    overrides = (*SMALL, f"data.train={synthetic_shards}", f"optim.backbone_multiplier={multiplier}")
    overrides += ("model.backbone_norm=frozen_batch", "model.pretrained_backbone=false", "model.num_classes=3")
    config = load("tiny", overrides)
    shown = finished("train", "tiny", *overrides, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    (said,) = re.findall(r"([\d.]+) M parameters trained, ([\d.]+) M frozen", shown.stdout)
    total = sum(parameter.numel() for parameter in build(config.model).parameters()) / 1e6
    assert said == (f"{total - frozen:.1f}", f"{frozen:.1f}")


@pytest.mark.integration
@pytest.mark.parametrize("dilation", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_detr_trains_on_two_ranks_as_on_one(train: Train, dilation: bool) -> None:
    settings = (*DETR, f"model.dilation={str(dilation).lower()}", "model.dropout=0", "optim.class_weight=1")
    one = succeeded(train(1, *settings, "train.zero_stage=0"))
    two = succeeded(train(2, *settings, "train.zero_stage=2"))
    assert two.losses == pytest.approx(one.losses, rel=1e-4)
    detector = load_detector(two.directory)
    assert detector.config.model.architecture == "detr"
    assert {"class_error", "cardinality_error"} <= set(two.steps[0])


@pytest.mark.integration
def test_run_starts_from_published_weights_and_says_what_starts_anew(
    train: Train, synthetic_shards: Path, tmp_path: Path
) -> None:
    settings = [setting for setting in SMALL if setting.startswith("model.")]
    config = load("tiny", [*settings, "model.num_classes=7"])
    torch.manual_seed(11)
    model = build(config.model)
    export_published(model, tmp_path / "published.pth")
    initial = f"train.initial_weights={tmp_path / 'published.pth'}"

    refused = train(1, initial)
    assert refused.exit_status == 2
    assert "re-shaped: class_embed.0.weight is (7, 64) in the file, (3, 64) in the model" in refused.output
    assert "start the class heads anew with train.new_class_head=true" in refused.output
    assert not refused.directory.exists()

    run = succeeded(train(1, initial, "train.new_class_head=true", "optim.learning_rate=1e-12", steps=1))
    assert "started anew: class_embed.0.weight, class_embed.0.bias, class_embed.1.weight" in run.output
    weights, given = load_detector(run.directory).model.state_dict(), model.state_dict()
    for name, tensor in weights.items():
        if name.startswith("class_embed."):
            assert tensor.shape[0] == 3
        else:
            torch.testing.assert_close(tensor, given[name], rtol=1e-4, atol=1e-6)


@pytest.mark.integration
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.gpu)])
def test_half_precision_begins_with_the_exact_weights(train: Train, tmp_path: Path, stage: int, precision: str) -> None:
    """A step of a rate of nothing leaves what the optimizer holds in float32, which a checkpoint keeps."""
    settings = [setting for setting in SMALL if setting.startswith("model.")]
    config = load("tiny", [*settings, "model.num_classes=3"])
    torch.manual_seed(11)
    model = build(config.model)
    export_published(model, tmp_path / "published.pth")
    overrides = (f"train.precision={precision}", f"train.zero_stage={stage}", "optim.weight_decay=0")
    initial = f"train.initial_weights={tmp_path / 'published.pth'}"
    run = succeeded(train(1, initial, *overrides, "optim.learning_rate=1e-30", steps=1))
    for name, tensor in load_detector(run.directory).model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=0, atol=1e-25)


@pytest.mark.integration
def test_initial_weights_that_are_not_there(train: Train) -> None:
    run = train(1, "train.initial_weights=nowhere.pth")
    assert run.exit_status == 2
    assert "nowhere.pth" in run.output
    assert "Traceback" not in run.output
    assert not run.directory.exists()


@pytest.mark.integration
def test_a_rate_for_another_batch_size_is_warned_about(synthetic_shards: Path) -> None:
    small = [setting for setting in SMALL if setting.startswith(("model.", "data."))]
    arguments = ["r50", *small, f"data.train={synthetic_shards}", "train.batch_size=8"]
    shown = finished("train", *arguments, "model.pretrained_backbone=false", "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert "optim.learning_rate=0.0002 with train.batch_size=8: published is 0.0002 for 32 images" in shown.stdout
    assert "set optim.learning_rate=5e-05" in shown.stdout


@pytest.mark.integration
def test_a_dry_run_promises_what_it_did(synthetic_shards: Path, tmp_path: Path) -> None:
    """24 images in steps of 7, the last one filled up: 4 an epoch, of which max_steps leaves 10."""
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={tmp_path}", "data.remainder=pad"]
    arguments += ["train.batch_size=7", "train.max_steps=10", "--dry-run"]
    shown = finished("train", *arguments)
    assert shown.returncode == 0, shown.stderr
    plan = "24 images: 4 steps of 7 images per epoch; 3 epochs, 10 steps in all; train.max_steps=10 ends it"
    assert f"# {plan}" in shown.stdout.splitlines()
    assert "one step on one image of 128 x 128 pixels a rank: loss" in shown.stdout
    assert list(tmp_path.iterdir()) == []
    arguments[arguments.index("data.remainder=pad")] = "train.batch_size=32"
    arguments.remove("train.batch_size=7")
    refused = finished("train", *arguments)
    assert refused.returncode == 2
    assert (
        "at most the number of images in the shards, 24, got 32; nearest: 24; or set data.remainder=pad"
        in refused.stderr
    )


@pytest.mark.parametrize("preset", preset_names())
def test_presets_have_rates_for_their_batch_sizes(preset: str) -> None:
    assert rate_advice(load(preset)) is None


def test_a_scaled_rate_is_not_warned_about() -> None:
    assert rate_advice(load("r50", ["train.batch_size=8", "optim.learning_rate=5e-5"])) is None
    assert rate_advice(load("r50", ["train.batch_size=256"])) is not None
