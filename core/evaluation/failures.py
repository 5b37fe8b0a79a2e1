"""From the detections and objects of a set to where the detector fails.

D detections, G objects, K classes, I images. "Confident" detections are those with at least the best score threshold of
their class: what somebody sees who uses the detector with a threshold.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...data.categories import Categories
from ...data.protocols import ProtocolName
from ...data.text import shortened
from ...data.truth import GroundTruth
from . import analysis as parts
from .analysis import Analysis
from .errors import KINDS, MISSED, Errors, errors_of
from .matching import Matches, by_choice, chosen, matches
from .precision import Ranking

_IOU50, _IOU75 = 0, 5  # places in THRESHOLDS


@dataclass(frozen=True, eq=False)
class Seen:
    """What one image holds and what was detected there: rows of objects and of confident detections, the surest last.

    is_found: the object was detected, perhaps as another class; also for crowds. is_right: of each detection.
    """

    objects: np.ndarray
    is_found: np.ndarray
    detections: np.ndarray
    is_right: np.ndarray


@dataclass(frozen=True, eq=False)
class Failures:
    """An analysis, and what it was made from."""

    analysis: Analysis
    matches: Matches
    confident: np.ndarray  # (D) bool
    is_found: np.ndarray  # (G) bool

    def seen_in(self, image_id: int) -> Seen:
        matches = self.matches
        objects = np.flatnonzero(matches.objects["image_id"] == image_id)
        detections = np.flatnonzero(self.confident & (matches.detections["image_id"] == image_id))
        detections = detections[np.argsort(matches.detections["score"][detections], kind="stable")]
        return Seen(
            matches.objects[objects],
            self.is_found[objects],
            matches.detections[detections],
            matches.true[_IOU50][detections],
        )


def failures(
    truth: GroundTruth,
    detections: np.ndarray,
    categories: Categories,
    *,
    protocol: ProtocolName = "coco",
    shards: str = "",
    step: int | None = None,
    scores: Mapping[str, float] | None = None,
) -> Failures | None:
    """Analyse a set; None without a class that has objects.

    detections: rows of DETECTION_DTYPE, finite and in categories of the set. protocol: of the set. shards: where the
    set is. step: of the checkpoint. scores: of the protocol, for AP by size.
    """
    found = matches(truth, detections, categories, protocol)
    num_objects = found.num_objects
    listed = np.flatnonzero(num_objects)
    if not len(listed):
        return None
    rankings = [
        Ranking(found.label, true, ignored, len(num_objects))
        for true, ignored in zip(found.true, found.ignored, strict=True)
    ]
    steps = [ranking.steps(num_objects) for ranking in rankings]
    averages = np.stack([part.average(num_objects) for part in steps])  # (T, K)
    curves = {"0.50": steps[_IOU50].curves(num_objects), "0.75": steps[_IOU75].curves(num_objects)}
    best, f1 = _best_thresholds(found)
    confident = (found.detections["score"] >= best[found.label]) & ~found.ignored[_IOU50]
    errors, detected = errors_of(found), _detected(found, confident)
    names = dict(zip(categories.ids, (shortened(name, parts.LONGEST_NAME) for name in categories.names), strict=True))
    named = [names[int(id_)] for id_ in found.category_ids]

    recall = np.bincount(found.label[found.true[_IOU50]], minlength=len(num_objects)) / np.maximum(num_objects, 1)
    ap = averages.mean(axis=0)
    shown = listed[np.argsort(-num_objects[listed], kind="stable")][: parts.MOST_CLASSES]
    rows = [
        parts.ClassRow(
            id=int(found.category_ids[k]),
            name=named[k],
            objects=int(num_objects[k]),
            ap=_share(ap[k]),
            ap50=_share(averages[_IOU50, k]),
            recall=_share(recall[k]),
            threshold=round(float(best[k]), 6) if np.isfinite(best[k]) else None,
            f1=_share(f1[k]),
            curve=[_share(value, 3) for value in curves["0.50"][k, :: 100 // (parts.CURVE_RECALLS - 1)]],
        )
        for k in shown[np.argsort(ap[shown], kind="stable")]
    ]
    error, bins = _calibration(found)
    value = Analysis(
        shards=shortened(shards, parts.LONGEST_NAME),
        step=step,
        images=len(found.image_ids),
        num_classes=len(listed),
        objects=int(num_objects.sum()),
        detections=len(found.detections),
        ap=_share(ap[listed].mean()),
        ap50=_share(averages[_IOU50, listed].mean()),
        curves={iou: [_share(value, 4) for value in curve[listed].mean(axis=0)] for iou, curve in curves.items()},
        errors=_kinds(errors, confident, found, detected),
        by_size=_by_size(scores or {}),
        by_frequency=_by_frequency(
            ap, num_objects, [categories.frequencies.get(int(id_)) for id_ in found.category_ids]
        ),
        calibration_error=_share(error),
        bins=bins,
        confusions=_confusions(found, detected, named),
        worst=_worst(found, confident, detected, truth),
        classes=rows,
    )
    is_found = found.objects["iscrowd"].copy()
    is_found[detected.object] = True
    return Failures(value, found, confident, is_found)


def _share(value: Any, digits: int = 6) -> float:
    return round(min(max(float(value), 0.0), 1.0), digits)  # sums of shares may exceed 1 in the last place


def _best_thresholds(found: Matches) -> tuple[np.ndarray, np.ndarray]:
    """(K) The score from which on each class has the highest F1, infinite where no detection is right; that F1."""
    num_objects, counted = found.num_objects, ~found.ignored[_IOU50]
    label, score = found.label[counted], found.detections["score"][counted]
    right = np.cumsum(found.true[_IOU50][counted])
    starts = np.searchsorted(label, np.arange(len(num_objects)))
    before = np.append(0, right)[starts][label]
    number = np.arange(1, len(label) + 1) - starts[label]
    f1 = 2 * (right - before) / (number + num_objects[label])
    last = np.ones(len(label), dtype=bool)  # of equal scores, which no threshold separates
    last[:-1] = (label[1:] != label[:-1]) | (score[1:] != score[:-1])
    places = np.flatnonzero(last & (f1 > 0))
    order = places[np.lexsort((places, -f1[places], label[places]))]  # the highest of equally good thresholds
    classes, firsts = np.unique(label[order], return_index=True)
    best, value = np.full(len(num_objects), np.inf), np.zeros(len(num_objects))
    best[classes], value[classes] = score[order][firsts], f1[order][firsts]
    return best, value


@dataclass(frozen=True, eq=False)
class _Detected:
    """What the confident detections make of the objects, whatever the class, at IoU 0.5: M of them stand for one."""

    detection: np.ndarray  # (M) rows
    object: np.ndarray  # (M) rows


def _detected(found: Matches, confident: np.ndarray) -> _Detected:
    """As confusion matrices have it: in the order of their scores detections take objects of any class."""
    pairs, is_crowd = found.near.of(confident[found.near.detection]), found.objects["iscrowd"]
    scores = found.detections["score"][pairs.detection]
    turns = (pairs.detection, found.label[pairs.detection], -scores)
    object_ = chosen(pairs.of(by_choice(pairs, is_crowd, *turns)), is_crowd, len(found.detections))
    rows = np.flatnonzero(object_ >= 0)
    return _Detected(rows, object_[rows])


def _kinds(errors: Errors, confident: np.ndarray, found: Matches, detected: _Detected) -> list[parts.ErrorKind]:
    surely = {name: int((confident & (errors.kind == place)).sum()) for place, name in enumerate(KINDS)}
    surely[MISSED] = int(found.is_object.sum()) - len(detected.object)
    return [
        parts.ErrorKind(name=name, count=count, confident=surely[name], gain=_share(errors.gains[name]))
        for name, count in errors.counts.items()
    ]


def _by_size(scores: Mapping[str, float]) -> list[parts.Group]:
    sizes = {name: scores.get(f"AP_{name}", -1) for name in ("small", "medium", "large")}
    return [parts.Group(name=name, classes=0, ap=_share(ap)) for name, ap in sizes.items() if ap >= 0]


def _by_frequency(ap: np.ndarray, num_objects: np.ndarray, stated: list[str | None]) -> list[parts.Group]:
    """Classes by their frequency among the training images, where the set states it, else by their objects here."""
    inside: dict[str, np.ndarray] = {}
    if any(stated):
        inside = {name: np.array([frequency == name[0] for frequency in stated]) for name in parts.FREQUENCY_GROUPS}
    else:
        least = 1
        for name, most in parts.SMALL_GROUPS:
            inside[name] = (num_objects >= least) & (num_objects <= (most or np.inf))
            least = (most or 0) + 1
    found = {name: group & (num_objects > 0) for name, group in inside.items()}
    return [
        parts.Group(name=name, classes=int(group.sum()), ap=_share(ap[group].mean()))
        for name, group in found.items()
        if group.any()
    ]


def _calibration(found: Matches) -> tuple[float, list[parts.Bin]]:
    """Expected calibration error (Naeini et al., AAAI 2015) over ten ranges of scores, and what is in each."""
    counted = ~found.ignored[_IOU50]
    score = found.detections["score"][counted].astype(np.float64)
    place = np.clip((score * parts.BINS).astype(np.int64), 0, parts.BINS - 1)
    count = np.bincount(place, minlength=parts.BINS)
    sums = [np.bincount(place, values, parts.BINS) for values in (score, found.true[_IOU50][counted])]
    mean, right = (part / np.maximum(count, 1) for part in sums)
    error = (np.abs(mean - right) * count).sum() / max(count.sum(), 1)
    rows = zip(count.tolist(), mean, right, strict=True)
    return float(error), [parts.Bin(count=n, score=_share(mean), right=_share(right)) for n, mean, right in rows]


def _confusions(found: Matches, detected: _Detected, named: list[str]) -> list[parts.Confusion]:
    wanted, given = found.object_label[detected.object], found.label[detected.detection]
    number = len(named)
    pairs, counts = np.unique((wanted * number + given)[wanted != given], return_counts=True)
    order = np.argsort(-counts, kind="stable")[: parts.MOST_CONFUSIONS]
    num_objects = found.num_objects
    return [
        parts.Confusion(
            truth=named[pair // number],
            found=named[pair % number],
            count=count,
            share=_share(count / num_objects[pair // number]),
        )
        for pair, count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]


def _worst(found: Matches, confident: np.ndarray, detected: _Detected, truth: GroundTruth) -> list[parts.ImageErrors]:
    """The images with the most errors; of equal ones those with more objects missed."""
    number = len(found.image_ids)
    right = np.bincount(found.image[confident & found.true[_IOU50]], minlength=number)
    wrong = np.bincount(found.image[confident], minlength=number) - right
    objects = np.bincount(found.object_image[found.is_object], minlength=number)
    missed = objects - np.bincount(found.object_image[detected.object], minlength=number)
    order = np.lexsort((-missed, -(wrong + missed)))[: parts.MOST_WORST]
    names = {image["id"]: image["file_name"] for image in truth.images}
    return [
        parts.ImageErrors(
            id=int(found.image_ids[row]),
            file_name=shortened(names[int(found.image_ids[row])], parts.LONGEST_NAME),
            right=int(right[row]),
            wrong=int(wrong[row]),
            missed=int(missed[row]),
        )
        for row in order.tolist()
        if wrong[row] + missed[row]
    ]
