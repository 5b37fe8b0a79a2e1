"""What the numbers of a whole set say about the convention that they were written in, where it is not COCO's."""

from collections.abc import Sequence
from typing import Any

from .findings import Finding
from .values import is_number

_NEARLY_ALL = 0.99


class Conventions:
    """Looks at every box of a set, (x, y, width, height) in pixels as COCO has it; `findings` when all are seen."""

    def __init__(self) -> None:
        self._boxes = 0
        self._fit_as_corners = 0
        self._fit_as_shares = 0
        self._images: set[int] = set()
        self._overhung_images: set[int] = set()

    def see(self, image_id: int, bbox: Any, height: int, width: int) -> None:
        """A box as annotated, and the size of its image in pixels."""
        if not (isinstance(bbox, Sequence) and len(bbox) == 4 and all(map(is_number, bbox))):
            return
        x, y, third, fourth = bbox
        if not (third and fourth):
            return
        self._boxes += 1
        self._images.add(image_id)
        self._fit_as_corners += 0 <= x < third <= width + 1 and 0 <= y < fourth <= height + 1
        self._fit_as_shares += all(0 <= value <= 1 for value in bbox) and min(height, width) > 1
        if x + third > width + 1 or y + fourth > height + 1:
            self._overhung_images.add(image_id)

    def findings(self) -> list[Finding]:
        if not self._boxes:
            return []
        where = f"{self._boxes} boxes"
        if self._fit_as_shares == self._boxes:
            return [Finding("shares as box", where, "all numbers are from 0 to 1, as shares of the image would be")]
        if 2 * len(self._overhung_images) > len(self._images) and self._fit_as_corners >= _NEARLY_ALL * self._boxes:
            what = (
                f"they leave {len(self._overhung_images)} of {len(self._images)} images as (x, y, width, height), "
                "and fit as corners (x1, y1, x2, y2)"
            )
            return [Finding("corners as box", where, what)]
        return []
