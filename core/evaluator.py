"""The twelve numbers of COCO under the name by which other programs import them."""

from .evaluation.coco import coco_metrics

__all__ = ["coco_metrics"]
