"""Every property twice: a few examples, always the same, and new ones for some seconds. A small checkpoint."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.manifest import write_checkpoint
from ddetr.core.checkpoint.weights import (
    TRAINING,
    WEIGHTS,
    save_weights,
)
from ddetr.core.config import Config, dump, load
from ddetr.core.evaluation import result
from ddetr.core.model.detector import build
from safetensors.torch import save_file

from tests.core.runs import SMALL
from tests.fuzz.checkpoint_files import CATEGORIES, STEP
from tests.fuzz.strategies import Effort

SECONDS = float(os.environ.get("DDETR_FUZZ_SECONDS", "10"))  # of each property in `make test-all`


@pytest.fixture(
    params=[Effort(examples=12), pytest.param(Effort(seconds=SECONDS), marks=pytest.mark.slow)], ids=["quick", "long"]
)
def effort(request: pytest.FixtureRequest) -> Effort:
    return request.param


@pytest.fixture(scope="session")
def config() -> Config:
    return load("tiny", [*SMALL, "model.hidden_dim=32", "model.num_classes=2", "model.pretrained_backbone=false"])


@pytest.fixture(scope="session")
def written(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with one checkpoint, its scores and config.yaml."""
    run = tmp_path_factory.mktemp("written") / "run"
    torch.manual_seed(0)
    weights = build(config.model).state_dict()
    trained = [name for name in weights if name.startswith("class_embed")]
    kept = {f"{kind}/{name}": torch.ones_like(weights[name]) for kind in ("exp_avg", "exp_avg_sq") for name in trained}
    values = {"step": 20, "epoch": 2, "step_in_epoch": 0, "steps_per_epoch": 10, "order": "", "ranks": 1}
    values |= {
        "zero_stage": 1,
        "optimizer_steps": dict.fromkeys(trained, 20),
        "loss_scale": {},
        "moving_average": False,
    }

    def write(folder: Path) -> None:
        save_weights(folder / WEIGHTS, weights, config, CATEGORIES, 20, 2)
        save_file(kept, folder / TRAINING)

    write_checkpoint(run / STEP, 0, write, values)
    scores = {"AP": 0.25, "AP50": 0.5, "AP75": 0.125}
    measure, weights = result.Measure("0" * 64, "1" * 64), result.weights_digest(run / STEP / WEIGHTS)
    result.write(run / STEP, result.Result(scores, "AP", 24, 0, 1.5, 1796045817.5, weights, measure))
    (run / "config.yaml").write_text(dump(config))
    return run


@pytest.fixture
def run_directory(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))
