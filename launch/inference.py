"""What evaluation, prediction and explanation begin with: a detector with overrides applied, and its device."""

from dataclasses import replace
from pathlib import Path

import torch

from ..core.checkpoint import TrainedDetector, load_detector
from ..core.config import Config, changed


def configured_detector(path: Path, overrides: list[str]) -> TrainedDetector:
    """The checkpoint at `path` on the CPU, its configuration changed by `overrides`.

    Raises ValueError for overrides of the model, which the weights have fixed, and what `load_detector` raises.
    """
    detector = load_detector(path)
    config = changed(detector.config, overrides, str(path))
    fixed = [f"model.{name}" for name, value in detector.config.model if getattr(config.model, name) != value]
    if fixed:
        raise ValueError(f"{', '.join(fixed)}: the weights in {detector.path} fix the model; leave the override out")
    return replace(detector, config=config)


def inference_device(config: Config) -> torch.device:
    """The device that `train.device` names; `auto` is a GPU where there is one."""
    available = torch.cuda.is_available()
    if config.train.device == "cuda" and not available:
        raise ValueError("train.device=cuda, but torch finds no GPU here; set train.device=cpu or auto")
    return torch.device("cuda" if available and config.train.device != "cpu" else "cpu")
