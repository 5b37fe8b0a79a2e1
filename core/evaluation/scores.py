"""The protocols that score detections: each gives a set of named numbers from ground truth and detections."""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...data.index import ShardIndex
from ...data.text import visible
from ...data.truth import GroundTruth
from ..config import EvalConfig
from .coco import MEANINGS, coco_tally
from .columns import counted
from .result import LONGEST_SCORE
from .tally import Score, Tally, Whole


@dataclass(frozen=True)
class Protocol:
    """A way to score detections.

    meanings: what each of its numbers is, by name, in the order in which they are shown. headline: the one by which
    checkpoints are compared. brief: those for which a line has room. tally: an empty count over the images of a set,
    which gives the numbers by name.
    """

    meanings: Mapping[str, str]
    headline: str
    brief: tuple[str, ...]
    tally: Callable[[ShardIndex, EvalConfig], Tally]

    @staticmethod
    def of(meanings: Mapping[str, str], headline: str, brief: tuple[str, ...], score: Score) -> "Protocol":
        """One by a function that computes the numbers by name, 0 to 1 and -1 where nothing in the set has them.

        score: takes a COCO dictionary and detections in COCO's result format, those that count, and changes neither.
        """
        return Protocol(meanings, headline, brief, lambda index, _: Whole(score, index.categories))


COCO = Protocol(
    MEANINGS,
    "AP",
    ("AP", "AP50", "AP75", "AP_small"),
    lambda index, config: coco_tally(index.samples["image_id"], index.categories, config.scorer),
)

# All that an evaluation computes; the first one's headline is what retention, searches, progress and alerts go by.
# Code that shows scores takes the names from the result.
PROTOCOLS: list[Protocol] = [COCO]


RESERVED = ("epochs", "step")  # which a search reports with the scores


class Tallies:
    """The tallies of all protocols over the images of a set."""

    def __init__(self, index: ShardIndex, config: EvalConfig) -> None:
        self._categories = index.categories
        self._tallies = [(protocol, protocol.tally(index, config)) for protocol in PROTOCOLS]

    def add(self, truth: GroundTruth, detections: np.ndarray) -> None:
        """Count further images. detections: rows of DETECTION_DTYPE."""
        rows = counted(detections, self._categories)
        for _, tally in self._tallies:
            tally.add(truth, rows)

    def to_bytes(self) -> bytes:
        """All of them, for `merge` in another process."""
        parts = [tally.to_bytes() for _, tally in self._tallies]
        return json.dumps([len(part) for part in parts]).encode() + b"\n" + b"".join(parts)

    def merge(self, others: Sequence[bytes]) -> None:
        """Count the images of others, too. Raises ValueError for bytes of other protocols."""
        parts = [_parts(other) for other in others]
        if any(len(found) != len(self._tallies) for found in parts):
            raise ValueError("tallies of other protocols than these")
        for number, (_, tally) in enumerate(self._tallies):
            tally.merge([found[number] for found in parts])

    def scores(self, num_not_finite: int = 0) -> dict[str, float]:
        """The numbers of all protocols by name.

        All are NaN if any query was not finite: no score of such a model may be preferred to another one's. Raises
        ValueError when a protocol computes other scores than it names.
        """
        if num_not_finite:
            return dict.fromkeys(meanings(), math.nan)
        found: dict[str, float] = {}
        for protocol, tally in self._tallies:
            scores = tally.scores()
            if scores.keys() != protocol.meanings.keys():
                raise ValueError(
                    f"a protocol promises the scores {list(protocol.meanings)} and computed {list(scores)}"
                )
            found |= scores
        return {name: found[name] for name in meanings()}


def _parts(data: bytes) -> list[bytes]:
    lengths, _, rest = data.partition(b"\n")
    parts, start = [], 0
    for length in json.loads(lengths):
        parts.append(rest[start : start + length])
        start += length
    return parts


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
