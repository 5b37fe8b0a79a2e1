"""What evaluation, prediction and explanation begin with: a detector with overrides applied."""

from dataclasses import replace
from pathlib import Path

from ..core.checkpoint import TrainedDetector, load_detector
from ..core.config import changed


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
