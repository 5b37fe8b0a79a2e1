"""Checkpoints: weights and training state on disk, in our layout and the published ones."""

from .description import Contents, contents
from .published import export_published
from .trained import TrainedDetector, load_detector, load_weights
from .weights import checkpoints, find_checkpoint, read_newest, save_weights

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
