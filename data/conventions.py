"""Detects sets whose boxes are not in COCO's convention: corners, or shares of the image."""

from typing import Any

from .findings import Finding
from .values import is_number

_NEARLY_ALL = 0.9
_FAR = 1.1  # of an image's side: further out than anybody draws by hand


class Conventions:
    """Looks at every box of a set, (x, y, width, height) in pixels as COCO has it; `findings` when all are seen."""

    def __init__(self) -> None:
        self._boxes = 0
        self._fit_as_corners = 0
        self._fit_as_shares = 0
        self._images: set[int] = set()
        self._overhung_images: set[int] = set()

    def see(self, image_id: int, bbox: Any, stated: Any, height: int, width: int) -> None:
        """A box in pixels, its four numbers as stated (also in pixels), and the size of its image in pixels."""
        if not all(isinstance(four, list) and len(four) == 4 and all(map(is_number, four)) for four in (bbox, stated)):
            return
        x, y, third, fourth = bbox
        if not (third and fourth):
            return
        left, top, right, bottom = stated
        self._boxes += 1
        self._images.add(image_id)
        self._fit_as_corners += 0 <= left < right <= width + 1 and 0 <= top < bottom <= height + 1
        self._fit_as_shares += all(-0.5 <= value <= 1.5 for value in stated) and min(height, width) > 2
        if x + third > _FAR * width or y + fourth > _FAR * height:
            self._overhung_images.add(image_id)

    def findings(self) -> list[Finding]:
        if not self._boxes:
            return []
        where = f"{self._boxes} boxes"
        if self._fit_as_shares >= _NEARLY_ALL * self._boxes:
            what = f"the numbers of {self._fit_as_shares} are from 0 to 1, as shares of the image would be"
            return [Finding("shares as box", where, what)]
        if 2 * len(self._overhung_images) > len(self._images) and self._fit_as_corners >= _NEARLY_ALL * self._boxes:
            what = (
                f"they leave {len(self._overhung_images)} of {len(self._images)} images as (x, y, width, height), "
                "and fit as corners (x1, y1, x2, y2)"
            )
            return [Finding("corners as box", where, what)]
        return []
