"""The protocols that score detections: each gives a set of named numbers from ground truth and detections."""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...data.text import visible
from .coco import MEANINGS, coco_metrics
from .result import LONGEST_SCORE


@dataclass(frozen=True)
class Protocol:
    """A way to score detections.

    meanings: what each of its numbers is, by name, in the order in which they are shown. headline: the one by which
    checkpoints are compared. brief: those for which a line has room. score: computes the numbers by name, 0 to 1 and -1
    where nothing in the set has them. It takes a COCO dictionary and detections in COCO's result format, and changes
    neither.
    """

    meanings: Mapping[str, str]
    headline: str
    brief: tuple[str, ...]
    score: Callable[[dict[str, Any], list[dict[str, Any]]], dict[str, float]]


COCO = Protocol(MEANINGS, "AP", ("AP", "AP50", "AP75", "AP_small"), coco_metrics)

# All that an evaluation computes; the first one's headline is what retention, searches, progress and alerts go by.
# Code that shows scores takes the names from the result.
PROTOCOLS: list[Protocol] = [COCO]


RESERVED = ("epochs", "step")  # which a search reports with the scores


def check_protocols() -> None:
    """Raises ValueError that names what is wrong with PROTOCOLS, before anything is computed."""
    names = [name for protocol in PROTOCOLS for name in protocol.meanings]
    if twice := [name for name, count in Counter(names).items() if count > 1 or name in RESERVED]:
        raise ValueError(f"scores: the name {twice[0]!r} is taken: give the score of one protocol another")
    if long := [name for name in names if len(name) > LONGEST_SCORE or name != visible(name)]:
        raise ValueError(f"scores: {visible(long[0])} is no name that can be shown, of {LONGEST_SCORE} characters")
    for protocol in PROTOCOLS:
        if unknown := {protocol.headline, *protocol.brief} - set(protocol.meanings):
            raise ValueError(f"scores: a protocol of {list(protocol.meanings)} has no {min(unknown)!r} to show")


def headline() -> str:
    """The name of the score by which checkpoints are compared."""
    return PROTOCOLS[0].headline


def meanings() -> dict[str, str]:
    """What every score is, by name, in their order."""
    return {name: meaning for protocol in PROTOCOLS for name, meaning in protocol.meanings.items()}


def in_brief(metrics: Mapping[str, float], headline: str) -> str:
    """The scores of a result in a line: AP 0.412, AP50 0.605, ...; last those that no protocol here knows."""
    known = [name for protocol in PROTOCOLS for name in protocol.brief if name in metrics]
    unknown = [name for name in metrics if name not in meanings()]
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in dict.fromkeys([headline, *known, *unknown]))


def scored(ground_truth: dict[str, Any], detections: list[dict[str, Any]], num_not_finite: int = 0) -> dict[str, float]:
    """The numbers of all protocols by name.

    All are NaN if any query was not finite: no score of such a model may be preferred to another one's. Raises
    ValueError when a protocol computes other scores than it names.
    """
    if num_not_finite:
        return dict.fromkeys(meanings(), math.nan)
    found: dict[str, float] = {}
    for protocol in PROTOCOLS:
        scores = protocol.score(ground_truth, detections)
        if scores.keys() != protocol.meanings.keys():
            raise ValueError(f"a protocol promises the scores {list(protocol.meanings)} and computed {list(scores)}")
        found |= scores
    return {name: found[name] for name in meanings()}
