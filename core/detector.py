"""The detector under the name by which other programs import it."""

from .model.detector import DeformableDetr

__all__ = ["DeformableDetr"]
