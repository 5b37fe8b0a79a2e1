"""Average precision of every class at once, from detections of which it is known whether they are true.

D detections by class and, in a class, by score; K classes. COCO's definition: precision is made monotone, then read at
101 recalls.
"""

from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True, eq=False)
class Steps:
    """Where the precision-recall curves change: S true detections.

    label: (S) the class. precision: (S) the monotone precision. first, last: (S) recalls RECALLS[first:last] are
    reached there and not before.
    """

    label: np.ndarray
    precision: np.ndarray
    first: np.ndarray
    last: np.ndarray

    def average(self, num_objects: np.ndarray) -> np.ndarray:
        """(K) average precision; NaN without objects."""
        areas = np.bincount(self.label, self.precision * (self.last - self.first), minlength=len(num_objects))
        return np.where(num_objects > 0, areas / len(RECALLS), np.nan)

    def curves(self, num_objects: np.ndarray) -> np.ndarray:
        """(K, 101) precision at RECALLS; NaN without objects."""
        found = np.zeros((len(num_objects), len(RECALLS)))
        length = self.last - self.first
        column = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length) + np.repeat(self.first, length)
        found[np.repeat(self.label, length), column] = np.repeat(self.precision, length)
        found[num_objects == 0] = np.nan
        return found


class Ranking:
    """Detections of all classes at one IoU threshold, to be counted with any weights.

    label: (D), rising. true, ignored: (D) bool.
    """

    def __init__(self, label: np.ndarray, true: np.ndarray, ignored: np.ndarray, num_classes: int) -> None:
        self._length = len(label)
        self._true = np.flatnonzero(true)
        self._ignored = np.flatnonzero(ignored)
        self.label = label[self._true]
        self._before = np.searchsorted(label, np.arange(num_classes))[self.label]  # detections of lower classes
        self._true_before = np.searchsorted(self.label, self.label)
        self._ignored_until = np.searchsorted(self._ignored, self._true)
        self._ignored_before = np.searchsorted(self._ignored, self._before)
        self._lift = 2.0 * (num_classes - self.label)  # keeps the classes apart where the precision is made monotone

    def steps(self, num_objects: np.ndarray, weights: np.ndarray | None = None) -> Steps:
        """The curves, where (D) `weights` say how often each detection counts.

        num_objects: (K), counted in the same way.
        """
        weights = np.ones(self._length, dtype=np.int64) if weights is None else weights
        return self.steps_of(num_objects, weights, summed(weights))

    def steps_of(self, num_objects: np.ndarray, weights: np.ndarray, sums: np.ndarray) -> Steps:
        """As `steps`, with `summed(weights)`, which the rankings of several thresholds have in common."""
        true = summed(weights[self._true])
        found = true[1:] - true[self._true_before]
        counted = sums[self._true + 1] - sums[self._before]
        if len(self._ignored):
            left_out = summed(weights[self._ignored])
            counted = counted - (left_out[self._ignored_until] - left_out[self._ignored_before])
        precision = found / np.maximum(counted, 1)
        monotone = np.maximum.accumulate((precision + self._lift)[::-1])[::-1] - self._lift
        last = reached(found / np.maximum(num_objects[self.label], 1))
        first = np.empty_like(last)
        first[1:] = last[:-1]
        first[self._true_before == np.arange(len(first))] = 0
        return Steps(self.label, monotone, first, last)


def summed(weights: np.ndarray) -> np.ndarray:
    """(N + 1) sums of the first 0 to N weights."""
    return np.concatenate([[0], np.cumsum(weights)])


def reached(recall: np.ndarray) -> np.ndarray:
    """How many of RECALLS are at most `recall`, which lies in [0, 1]."""
    place = np.minimum((recall * 100).astype(np.int64), 100)  # at most one too few or too many
    place = place - (RECALLS[place] > recall)
    return place + 1 + (RECALLS[np.minimum(place + 1, 100)] <= recall) * (place < 100)
