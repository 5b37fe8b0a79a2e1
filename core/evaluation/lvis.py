"""LVIS' thirteen numbers for boxes (Gupta et al., arXiv 1908.03195): COCO's matching on federated annotations.

An image is labelled for some categories only: those of its objects and those of its list `neg_category_ids`. Detections
of others do not count. Of the categories in `not_exhaustive_category_ids` an unmatched detection is no false positive.
"""

from typing import Any

import numpy as np

from ...data.protocols import IMAGE_LISTS
from ...data.truth import GroundTruth
from .coco import MEANINGS as COCO_MEANINGS
from .coco import CocoTally

# In the order of lvis-api's results.
MEANINGS = {
    **{name: COCO_MEANINGS[name] for name in ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")},
    "AP_rare": "precision, categories on 1 to 10 training images",
    "AP_common": "precision, categories on 11 to 100 training images",
    "AP_frequent": "precision, categories on more than 100 training images",
    "AR300": "recall, 300 boxes per image",
    "AR300_small": "recall, area under 32² px",
    "AR300_medium": "recall, 32² to 96² px",
    "AR300_large": "recall, over 96² px",
}


class LvisTally(CocoTally):
    """LVIS' protocol by hotcoco. The frequencies are those of the categories."""

    federated = True
    names = tuple(MEANINGS)

    def _images(self, truth: GroundTruth) -> list[dict[str, Any]]:
        return [
            entry | {name: self._listed(image.get(name, ())) for name in IMAGE_LISTS}
            for entry, image in zip(super()._images(truth), truth.images, strict=True)
        ]

    def _listed(self, category_ids: list[int]) -> list[int]:
        known = np.array([id_ for id_ in category_ids if id_ in self._categories], dtype=np.int64)
        return self._category(known).tolist()
