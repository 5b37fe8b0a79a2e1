"""The moving average of the weights against one computed by hand from every step's own weights."""

from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.model.detector import build
from safetensors.torch import load_file

from tests.core.runs import Run, Train, succeeded, trained
from tests.processes import finished

pytestmark = pytest.mark.integration

EVERY_STEP = ("train.checkpoint_every_steps=1", "train.checkpoint_every_epochs=1")


def weights(run: Run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.directory / f"checkpoints/step_{step:08d}/model.safetensors")


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    [
        (1, 0, "fp32"),
        (2, 1, "bf16"),  # the defaults
        pytest.param(2, 2, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 1, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 3, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 0, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 3, "bf16", marks=pytest.mark.slow),
    ],
)
def test_average_is_that_of_the_weights_of_every_step(train: Train, ranks: int, stage: int, precision: str) -> None:
    settings = (f"train.zero_stage={stage}", f"train.precision={precision}", "optim.learning_rate=1e-3", *EVERY_STEP)
    plain = succeeded(train(ranks, *settings))
    run = succeeded(train(ranks, *settings, "train.ema_decay=0.3"))
    assert run.losses == plain.losses  # the average changes nothing of the training
    detector = load_detector(plain.directory)
    torch.manual_seed(detector.config.train.seed)
    average = build(detector.config.model).state_dict()
    trained = {name for name, parameter in build(detector.config.model).named_parameters() if parameter.requires_grad}
    for step in range(1, 5):
        decay = min(0.3, (1 + step) / (10 + step))
        new = weights(plain, step)
        average = {name: decay * average[name] + (1 - decay) * new[name] for name in trained}
        found = weights(run, step)
        for name, expected in average.items():
            torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_a_resumed_average_goes_on(train: Train, tmp_path: Path, stage: int) -> None:
    settings = (f"train.zero_stage={stage}", "train.ema_decay=0.9", *EVERY_STEP)
    whole = succeeded(train(1, *settings))
    half = succeeded(train(1, *settings, steps=2))
    resumed = succeeded(trained(half.directory, "--resume", half.directory, "train.max_steps=4"))
    assert resumed.losses == whole.losses
    expected, found = weights(whole, 4), weights(resumed, 4)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_average_cannot_begin_in_the_middle(train: Train) -> None:
    run = succeeded(train(1, "train.zero_stage=0", *EVERY_STEP, steps=2))
    refused = finished("train", "--resume", run.directory, "train.max_steps=4", "train.ema_decay=0.9")
    assert refused.returncode == 2
    assert "the run was trained without train.ema_decay" in refused.stderr
    again = finished("train", "--resume", run.directory)
    assert again.returncode == 0, again.stderr[-2000:]  # what was refused has changed nothing
