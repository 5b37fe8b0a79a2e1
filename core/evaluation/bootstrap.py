"""Whether a difference between two detectors on one set is noise: a bootstrap over its images.

Images are drawn anew, as many as there are and each as often as it is drawn, and both detectors are scored on the same
draw (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13: percentile intervals). What is drawn
depends on the seed alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...data.parallel import available_cores, threaded_map
from .matching import Matches
from .precision import Ranking, summed

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0
SCORES = ("AP", "AP50", "AP75")
_MOST_THREADS = 16  # each holds three numbers a detection: 200 MB of eight million


@dataclass(frozen=True)
class Difference:
    """A score of two detectors.

    low, high: between them lies second - first in the share CONFIDENCE of the draws.
    """

    first: float
    second: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        return self.second - self.first

    @property
    def is_noise(self) -> bool:
        """Whether the interval holds 0."""
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Comparison:
    """The scores of SCORES by name, and AP of every class with objects by category id, the lowest difference first."""

    images: int
    scores: dict[str, Difference]
    classes: dict[int, Difference]


class Scorer:
    """AP of a detector at all IoU thresholds, on any weights of the images.

    Only what stands before the last true detection of a class in its order can change its precision there.
    """

    def __init__(self, found: Matches) -> None:
        true, num_classes = found.true, len(found.category_ids)
        last = np.full(num_classes, -1)
        any_true = np.flatnonzero(true.any(axis=0))
        np.maximum.at(last, found.label[any_true], any_true)
        kept = np.arange(len(found.label)) <= last[found.label]
        self._image, label, ignored = found.image[kept], found.label[kept], found.ignored
        self._rankings = [
            Ranking(label, here[kept], aside[kept], num_classes) for here, aside in zip(true, ignored, strict=True)
        ]
        self._objects = found.object_image[found.is_object], found.object_label[found.is_object]
        self._num_classes = num_classes

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """(T, K) AP, NaN where no object is left. weights: (I) how often each image counts."""
        images, labels = self._objects
        num_objects = np.bincount(labels, weights[images], minlength=self._num_classes)
        counts = weights[self._image]
        sums = summed(counts)
        return np.stack(
            [ranking.steps_of(num_objects, counts, sums).average(num_objects) for ranking in self._rankings]
        )


def compare(
    first: Matches,
    second: Matches,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
    advance: Callable[[], None] = lambda: None,
) -> Comparison:
    """Compare two detectors on one set of at least one object. advance: is called after each draw.

    Raises ValueError for different images.
    """
    if not np.array_equal(first.image_ids, second.image_ids):
        apart = np.setxor1d(first.image_ids, second.image_ids)
        raise ValueError(
            f"they were evaluated on different images: {len(apart)} of them, such as {apart[0]}, by one alone. Repair "
            "those that were left out as damaged (`ddetr data check` lists them), then compare again"
        )
    number, scorers = len(first.image_ids), (Scorer(first), Scorer(second))
    listed = np.flatnonzero(first.num_objects)

    def scores(weights: np.ndarray) -> np.ndarray:
        """(2, 3 + K) AP, AP50, AP75 and AP of each class with objects."""
        tables = np.stack([scorer.scores(weights)[:, listed] for scorer in scorers])  # (2, T, K)
        ap = tables.mean(axis=1)
        means = [_mean(part) for part in (ap, tables[:, 0], tables[:, 5])]
        return np.column_stack([*means, ap])

    def drawn(sample: int) -> np.ndarray:
        chosen = np.random.default_rng((seed, sample)).integers(0, number, number)
        first, second = scores(np.bincount(chosen, minlength=number))
        return second - first

    draws, threads = [], min(available_cores(), _MOST_THREADS)
    for draw in threaded_map(drawn, range(resamples), threads=threads, ahead=2 * threads):
        draws.append(draw)
        advance()
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(np.stack(draws), (tail, 1 - tail), axis=0)  # a draw may leave a class no object
    columns = (*scores(np.ones(number, dtype=np.int64)), low, high)
    found = [Difference(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    classes = dict(zip(first.category_ids[listed].tolist(), found[3:], strict=True))
    ordered = dict(sorted(classes.items(), key=lambda item: item[1].difference))
    return Comparison(number, dict(zip(SCORES, found[:3], strict=True)), ordered)


def _mean(averages: np.ndarray) -> np.ndarray:
    """(2) mean over the classes (2, K) that have objects; NaN without any."""
    listed = ~np.isnan(averages[0])
    return averages[:, listed].mean(axis=1) if listed.any() else np.full(2, np.nan)
