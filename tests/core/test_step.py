"""What is said of a step that was skipped, without its forward pass; with it: test_guard.py."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ddetr.core.config import Config
from ddetr.core.training import trial
from ddetr.core.training.step import diagnosis
from ddetr.core.training.world import World

WORLD = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize(("scale", "of_it"), [(1.0, ""), (65536.0, " (the loss scale)")])
def test_a_gradient_alone_that_is_not_finite_is_said(scale: float, of_it: str) -> None:
    engine: Any = SimpleNamespace(loss_scale=scale)
    assert diagnosis(engine, [], [1.0, 2.0], 1, Config(), WORLD) == f"every loss is finite, a gradient is not{of_it}"


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_trial_step_that_is_skipped_is_refused_but_while_a_scale_is_looked_for(precision: str, monkeypatch) -> None:
    skipped = SimpleNamespace(losses=torch.tensor([float("inf")]), taken=False)
    monkeypatch.setattr(trial, "build", lambda config: torch.nn.Linear(1, 1))
    monkeypatch.setattr(trial, "freeze_without_rate", lambda model, optim: None)
    monkeypatch.setattr(trial, "Engine", lambda *of: SimpleNamespace(set_learning_rate=lambda rate: None))
    monkeypatch.setattr(trial, "train_step", lambda *of, **more: skipped)
    monkeypatch.setattr(World, "sum", lambda self, values: values)
    config = Config().model_copy(update={"train": Config().train.model_copy(update={"precision": precision})})
    if precision == "fp16":
        assert trial.try_step(config, WORLD).loss == float("inf")
    else:
        with pytest.raises(FloatingPointError, match="a step on one small image is not finite: its loss is inf"):
            trial.try_step(config, WORLD)
