"""Numbers that are not finite: who made them, and that no rank takes the step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddetr.core.config import ModelConfig
from ddetr.core.detector import build
from ddetr.core.guard import finite_or_poison, first_not_finite
from safetensors.torch import load_file

from tests.core.runs import SMALL, Train, collect, succeeded

POISONED_RUN = Path(__file__).with_name("poisoned_run.py")


@pytest.mark.parametrize(
    "name",
    [
        "backbone.body.layer2.0.conv2",
        "input_proj.1.0",
        "transformer.encoder.layers.0.self_attn.value_proj",
        "transformer.decoder.layers.1.linear2",
        "bbox_embed.0.layers.1",
    ],
)
def test_the_innermost_first_module_is_named(name: str) -> None:
    settings = {"backbone": "resnet18.tv_in1k", "pretrained_backbone": False, "hidden_dim": 64, "queries": 5}
    settings |= {"encoder_layers": 1, "decoder_layers": 2, "feedforward_dim": 32, "box_refine": True}
    model = build(ModelConfig.model_validate(settings))
    images, padding_mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    with torch.no_grad(), first_not_finite(model) as found:
        model(images, padding_mask)
        assert found == []
        model.get_submodule(name).weight.view(-1)[3] = torch.inf  # pyright: ignore
        model(images, padding_mask)
    assert len(found) == 1
    assert found[0].startswith(f"{name} (")


@pytest.mark.parametrize("loss", [1.5, float("inf"), float("nan")])
def test_gradients_of_a_loss_that_is_not_finite_are_not_numbers(loss: float) -> None:
    weight = torch.tensor([0.5, -2.0], requires_grad=True)
    guarded = finite_or_poison((weight * 2).sum() * 0 + weight.sum() + loss)
    guarded.backward()
    assert weight.grad is not None
    assert weight.grad.isnan().all() == (not torch.tensor(loss).isfinite())


@pytest.mark.parametrize(
    ("ranks", "stage", "precision"),
    [
        (1, 0, "fp32"),
        (2, 1, "bf16"),  # the defaults
        pytest.param(2, 3, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 0, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 1, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 2, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 3, "fp32", marks=pytest.mark.slow),
        pytest.param(2, 0, "bf16", marks=pytest.mark.slow),
        pytest.param(2, 2, "bf16", marks=pytest.mark.slow),
    ],
)
def test_a_poisoned_image_costs_one_step_on_every_rank(
    synthetic_shards: Path, tmp_path: Path, ranks: int, stage: int, precision: str
) -> None:
    poisoned = 7
    arguments = ["tiny", *SMALL, f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.name=run"]
    arguments += [f"train.zero_stage={stage}", f"train.precision={precision}", "train.max_steps=6"]
    arguments += ["train.checkpoint_every_steps=1", "train.checkpoint_every_epochs=1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    words = [sys.executable, *launcher, str(POISONED_RUN), "train", *arguments]
    environment = os.environ | {"POISONED_IMAGE": str(poisoned)}
    finished = subprocess.run(words, capture_output=True, text=True, timeout=600, env=environment)
    run = succeeded(collect(tmp_path / "run", finished.stdout + finished.stderr, finished.returncode))

    (skipped,) = [step for step in run.steps if step["skipped"]]  # 24 images, 6 steps: each image once
    assert len(run.steps) == 6
    assert skipped["not_finite"].startswith("first in backbone.body.")
    assert f"{poisoned}" in skipped["not_finite"]
    assert f"step {skipped['step']} skipped: first in backbone.body." in run.output
    events = [event for event in run.events if event["event"] == "skipped"]
    assert [(event["step"], event["reason"]) for event in events] == [(skipped["step"], skipped["not_finite"])]
    files = sorted((run.directory / "checkpoints").glob("step_*/model.safetensors"))
    weights = [load_file(file) for file in files]
    assert len(weights) == 6
    for number in range(2, 7):
        before, after = weights[number - 2], weights[number - 1]
        same = all(torch.equal(before[name], after[name]) for name in before)
        assert same == (number == skipped["step"])
        assert all(tensor.isfinite().all() for tensor in after.values())


def test_a_run_that_only_skips_stops_with_its_state_saved(train: Train) -> None:
    run = train(1, "optim.learning_rate=1e30", "optim.clip_norm=0", "train.most_skipped_steps=3", steps=20)
    assert run.exit_status == 2
    assert "Traceback" not in run.output
    assert "ddetr: skipped 3 steps in a row, the last one step" in run.output
    assert "The weights from before them are saved. Lower optim.learning_rate" in run.output
    last = run.steps[-1]
    assert [step["skipped"] for step in run.steps[-3:]] == [True] * 3
    assert (run.directory / f"checkpoints/step_{last['step']:08d}/model.safetensors").is_file()
    assert [event["event"] for event in run.events].count("skipped") == 3
