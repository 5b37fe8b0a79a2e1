"""Checkpoints: weights and training state on disk, ours and the published ones."""

from .weights import (
    Contents,
    TrainedDetector,
    checkpoints,
    contents,
    export_published,
    find_checkpoint,
    load_detector,
    load_weights,
    read_newest,
    save_weights,
)

__all__ = [
    "Contents",
    "TrainedDetector",
    "checkpoints",
    "contents",
    "export_published",
    "find_checkpoint",
    "load_detector",
    "load_weights",
    "read_newest",
    "save_weights",
]
