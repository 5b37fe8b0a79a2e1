"""Numbers that are not finite: who made them, and that no rank takes the step."""

import math
import re
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.trained import load_detector, load_weights
from ddetr.core.checkpoint.weights import WEIGHTS, save_weights
from ddetr.core.config import ModelConfig, load
from ddetr.core.model.detector import build
from ddetr.core.model.finite import finite_or_poison, first_not_finite
from ddetr.data.categories import Categories
from safetensors.torch import load_file

from tests.core.runs import SMALL, Train, succeeded, trained

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


@pytest.mark.integration
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
    environment = {"POISONED_IMAGE": str(poisoned)}
    settings = {"ranks": ranks, "environment": environment, "program": POISONED_RUN}
    run = succeeded(trained(tmp_path / "run", *arguments, **settings))

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


@pytest.mark.integration
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


@pytest.mark.integration
@pytest.mark.parametrize("overrides", [(), ("train.ema_decay=0.5", "train.zero_stage=2")])
def test_weights_that_are_not_finite_are_not_saved(train: Train, overrides: tuple[str, ...]) -> None:
    """A weight of 1 decays by 3e38 times itself and steps by as much: the first step leaves float32's range."""
    run = train(1, "optim.learning_rate=3e38", "optim.weight_decay=1", "optim.clip_norm=0", *overrides, steps=1)
    assert run.exit_status == 2
    assert "Traceback" not in run.output
    last = run.output.splitlines()[-1]
    assert re.match(r"ddetr: step 1: the weights of \S+ is not finite, so it is not saved", last), last
    assert not list((run.directory / "checkpoints").glob("*"))
    assert run.events[-1]["event"] == "error"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    config = load("tiny", SMALL)
    model = build(config.model.model_copy(update={"pretrained_backbone": False}))
    weights = dict(model.state_dict())
    spoiled = "transformer.decoder.layers.1.linear1.weight"
    weights[spoiled] = weights[spoiled].clone()
    weights[spoiled][3, 5] = value
    path = tmp_path / WEIGHTS
    save_weights(path, weights, config, Categories(ids=(1, 2, 3), names=("a", "b", "c")), step=1, epochs=0)
    message = f"{spoiled} has 1 of 4096 values that are infinite or not a number"
    before = model.state_dict()[spoiled].clone()
    with torch.device("meta"):  # as it is checked before a run
        empty = build(config.model.model_copy(update={"pretrained_backbone": False}))
    for use in (lambda: load_detector(path), lambda: load_weights(model, path), lambda: load_weights(empty, path)):
        with pytest.raises(ValueError, match=re.escape(message)):
            use()
    assert torch.equal(model.state_dict()[spoiled], before)
