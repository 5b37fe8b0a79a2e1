"""Every property twice: a few examples, always the same, and new ones for some seconds. A small checkpoint."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint.codec import Checkpoint
from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.config import Config, dump, load
from ddetr.core.evaluation import result
from ddetr.core.model.detector import build
from ddetr.core.progress import Position

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
    checkpoint = Checkpoint(
        folder=run / STEP,
        position=Position(step=20, epochs=2, step_in_epoch=0, steps_per_epoch=10),
        config=config,
        categories=CATEGORIES,
        weights=weights,
        averaged=False,
        slots={slot: {name: torch.ones_like(weights[name]) for name in trained} for slot in ("exp_avg", "exp_avg_sq")},
        trained=dict.fromkeys(trained, 20),
        loss_scale={},
        ranks=1,
        zero_stage=1,
    )
    checkpoint.write()
    scores = {"AP": 0.25, "AP50": 0.5, "AP75": 0.125}
    measure, digest = result.Measure("0" * 64, "1" * 64), result.weights_digest(run / STEP / WEIGHTS)
    result.write(run / STEP, result.Result(scores, "AP", 24, 0, 1.5, 1796045817.5, 20, 2, digest, measure))
    (run / "config.yaml").write_text(dump(config))
    return run


@pytest.fixture
def run_directory(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))
