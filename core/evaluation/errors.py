"""The kinds of a detector's errors and what mending each would bring: TIDE (Bolya et al., ECCV 2020, section 2).

Each wrong detection is of one kind, the first that fits, at IoU 0.5 (and 0.1 for background):

- localisation: of the right class, IoU with an object 0.1 to 0.5;
- classification: IoU of at least 0.5 with an object of another class;
- duplicate: of the right class, IoU over 0.5, but the object is another detection;
- background: IoU of at most 0.1 with every object;
- both: any other, so of the wrong class and badly placed.

An object that is no detection, and that no localisation or classification error could become, is missed. Detections
in a crowd of their class are no errors.
"""

from dataclasses import dataclass

import numpy as np

from .matching import BACKGROUND, THRESHOLDS, Matches
from .precision import Ranking

KINDS = ("classification", "localisation", "both", "duplicate", "background")  # of a wrong detection
MISSED = "missed"


@dataclass(frozen=True, eq=False)
class Errors:
    """The errors of a set at IoU 0.5.

    kind: (D) place in KINDS, -1 for a detection that is no error. missed: (G) bool. gains: what mending a kind alone
    adds to AP50, by name; 0 where mending it, within the 101 recalls, takes something away.
    """

    kind: np.ndarray
    missed: np.ndarray
    gains: dict[str, float]

    @property
    def counts(self) -> dict[str, int]:
        """Errors of each kind, by name."""
        found = {name: int((self.kind == place).sum()) for place, name in enumerate(KINDS)}
        return {**found, MISSED: int(self.missed.sum())}


def errors_of(matches: Matches) -> Errors:
    """The errors in a set, which has objects of at least one class."""
    matched, true, wrong = matches.matched[0], matches.true[0], ~(matches.true[0] | matches.ignored[0])
    near, other = matches.same.iou, matches.other.iou
    rules = {
        "localisation": (near >= BACKGROUND) & (near <= THRESHOLDS[0]),
        "classification": other >= THRESHOLDS[0],
        "duplicate": near > THRESHOLDS[0],
        "background": np.maximum(near, other) <= BACKGROUND,
        "both": np.ones(len(wrong), dtype=bool),
    }
    kind = np.select([wrong & rule for rule in rules.values()], [KINDS.index(name) for name in rules], default=-1)

    free = matches.is_object
    free[matched[true]] = False
    # What a detection would be if it were mended, and whether that object has no better detection.
    is_placed, is_named = kind == KINDS.index("localisation"), kind == KINDS.index("classification")
    target = np.select([is_placed, is_named], [matches.same.object, matches.other.object], default=-1)
    target[(target >= 0) & ~free[target]] = -1
    best = _best(target, matches)
    missed = free.copy()
    missed[target[target >= 0]] = False
    return Errors(kind, missed, _gains(matches, kind, np.where(best, target, -1), missed))


def _best(target: np.ndarray, matches: Matches) -> np.ndarray:
    """(D) Of the detections that could become an object only the one with the highest score does."""
    rows = np.flatnonzero(target >= 0)
    rows = rows[np.lexsort((matches.label[rows], -matches.detections["score"][rows]))]
    best = np.zeros(len(target), dtype=bool)
    best[rows[np.unique(target[rows], return_index=True)[1]]] = True
    return best


def _gains(matches: Matches, kind: np.ndarray, becomes: np.ndarray, missed: np.ndarray) -> dict[str, float]:
    label, scores, num_objects = matches.label, matches.detections["score"], matches.num_objects
    true, counted = matches.true[0], ~matches.ignored[0]
    before = _mean(label, true, counted, num_objects)
    gains = {}
    for place, name in enumerate(KINDS):
        of_kind = kind == place
        mended = of_kind & (becomes >= 0)
        labels, order = label, slice(None)
        if name == "classification":
            labels = np.where(mended, matches.object_label[becomes], label)
            order = np.lexsort((-scores, labels))
        keeps = counted & (~of_kind | mended)
        gains[name] = _mean(labels[order], (true | mended)[order], keeps[order], num_objects) - before
    left = num_objects - np.bincount(matches.object_label[missed], minlength=len(num_objects))
    # A class without any objects left has no precision: it counts as 0, or not at all where nothing is detected of it.
    shown = (left > 0) | (np.bincount(label[counted], minlength=len(left)) > 0)
    gains[MISSED] = _mean(label, true, counted, np.where(shown, np.maximum(left, num_objects > 0), 0)) - before
    return {name: max(gain, 0.0) for name, gain in gains.items()}


def _mean(label: np.ndarray, true: np.ndarray, counted: np.ndarray, num_objects: np.ndarray) -> float:
    """AP over the classes with objects; 0 without any."""
    ranking = Ranking(label[counted], true[counted], np.zeros(int(counted.sum()), dtype=bool), len(num_objects))
    averages = ranking.steps(num_objects).average(num_objects)
    return float(np.nanmean(averages)) if (num_objects > 0).any() else 0.0
