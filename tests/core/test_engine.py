"""The DeepSpeed JSON, devices, and what joining leaves undone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ddetr.core import config
from ddetr.core.training.engine import LOSS_SCALE, deepspeed_config
from ddetr.core.training.world import device_for


def test_deepspeed_json_follows_from_the_configuration() -> None:
    loaded = config.load(
        "r50",
        [
            "train.zero_stage=3",
            "train.precision=bf16",
            "train.batch_size=64",
            "train.accumulation=2",
            "optim.clip_norm=0.5",
            "train.deepspeed_extra={zero_optimization: {overlap_comm: true}, comms_logger: {enabled: true}}",
        ],
    )
    written = deepspeed_config(loaded)
    assert written["train_batch_size"] == 64
    assert written["gradient_accumulation_steps"] == 2
    assert written["gradient_clipping"] == 0.5
    zero = written["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"]) == (3, True)
    assert (written["bf16"]["enabled"], written["fp16"]["enabled"]) == (True, False)
    assert written["comms_logger"] == {"enabled": True}
    assert deepspeed_config(loaded) == written  # a pure function: the configuration was not changed
    assert deepspeed_config(config.load("r50", ["train.precision=fp16"]))["fp16"]["enabled"] is True


@pytest.mark.parametrize(
    ("extra", "instead"),
    [
        ("{bf16: {enabled: true}}", "set train.precision instead"),
        ("{train_batch_size: 3}", "set train.batch_size instead"),
        ("{zero_optimization: {stage: 1}}", "set train.zero_stage instead"),
        ("{zero_optimization: {offload_optimizer: {device: nvme}}}", "nvme: checkpoints cannot gather .* take cpu"),
        ("{zero_optimization: {mics_shard_size: 2}}", "mics_shard_size: checkpoints cannot gather"),
    ],
)
def test_what_the_configuration_decides_cannot_be_set_twice(extra: str, instead: str) -> None:
    loaded = config.load("r50", [f"train.deepspeed_extra={extra}"])
    with pytest.raises(ValueError, match=instead):
        deepspeed_config(loaded)


def test_the_loss_scale_is_kept_where_deepspeed_has_it() -> None:
    """The two objects between which fp16's ZeRO stages choose; fp16 itself needs a GPU."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaleConfig

    scaler = DynamicLossScaler(2.0**16, 1000, 1.0, 2, False)
    assert set(LOSS_SCALE) <= set(vars(scaler))
    at_stage_0 = LossScaleConfig(torch.float16, True, 0, None)
    assert set(LOSS_SCALE) - set(vars(at_stage_0)) == {"cur_hysteresis"}
    for kept in (scaler, at_stage_0):
        assert kept.cur_scale >= 2.0**16


def test_device_follows_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    auto, cuda = (config.load("tiny", [f"train.device={name}"]).train for name in ("auto", "cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_for(auto, 0).type == "cpu"
    with pytest.raises(ValueError, match="needs a GPU for local rank 0"):
        device_for(cuda, 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_for(auto, 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="at most one rank per GPU"):
        device_for(auto, 2)


@pytest.mark.integration
def test_nothing_is_compiled_on_first_use(tmp_path: Path) -> None:
    script = """
from ddetr.core.config import TrainConfig
from ddetr.core.training.world import join
print("ranks:", join(TrainConfig(device="cpu")).size)
"""
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    joined = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert joined.stdout.split("\n")[-2] == "ranks: 1", joined.stderr
    assert list(tmp_path.iterdir()) == []
