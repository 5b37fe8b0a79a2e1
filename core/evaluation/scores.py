"""The protocols that score detections: each gives a set of named numbers from ground truth and detections."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...data.index import ShardIndex
from ...data.protocols import SPELLED, ProtocolName
from ...data.text import visible
from ...data.truth import GroundTruth
from ..config import EvalConfig
from . import coco, lvis, openimages
from .columns import counted, packed, unpacked
from .tally import LONGEST_SCORE, Score, Tally, Whole


@dataclass(frozen=True)
class Protocol:
    """A way to score detections.

    meanings: what each of its numbers is, by name, in the order in which they are shown. brief: those for which a line
    has room. tally: an empty count over the images of a set, which gives the numbers by name.
    """

    meanings: Mapping[str, str]
    brief: tuple[str, ...]
    tally: Callable[[ShardIndex, EvalConfig], Tally]

    @staticmethod
    def of(meanings: Mapping[str, str], brief: tuple[str, ...], score: Score) -> "Protocol":
        """One by a function that computes the numbers by name, 0 to 1 and -1 where nothing in the set has them.

        score: takes a COCO dictionary and detections in COCO's result format, those that count, and changes neither.
        """
        return Protocol(meanings, brief, lambda index, _: Whole(score, index.categories))


@dataclass(frozen=True)
class SetProtocol(Protocol):
    """One that the index of a set may name.

    detections_per_image: how many it counts, the best ones. headline: the number that retention, searches, progress and
    alerts go by.
    """

    detections_per_image: int
    headline: str = "AP"


OF_SETS: dict[ProtocolName, SetProtocol] = {
    "coco": SetProtocol(
        coco.MEANINGS,
        ("AP", "AP50", "AP75", "AP_small"),
        lambda index, config: coco.coco_tally(index.samples["image_id"], index.categories, config.scorer),
        100,
    ),
    "lvis": SetProtocol(
        lvis.MEANINGS,
        ("AP", "AP_rare", "AP_common", "AP_frequent"),
        lambda index, _: lvis.LvisTally(index.samples["image_id"], index.categories),
        300,
    ),
    "openimages": SetProtocol(
        openimages.MEANINGS, ("AP",), lambda index, _: openimages.OpenImagesTally(index.categories), 100
    ),
}

# What an evaluation computes besides, on every set. Code that shows scores takes the names from the result.
PROTOCOLS: list[Protocol] = []

RESERVED = ("epochs", "step")  # which a search reports with the scores


class Tallies:
    """The tallies of the set's protocol and of PROTOCOLS over the images of a set."""

    def __init__(self, index: ShardIndex, config: EvalConfig) -> None:
        check_set(index, config)
        self._categories, self._meanings = index.categories, meanings(index.protocol)
        protocols = [OF_SETS[index.protocol], *PROTOCOLS]
        self._tallies = [(protocol, protocol.tally(index, config)) for protocol in protocols]

    def add(self, truth: GroundTruth, detections: np.ndarray) -> None:
        """Count further images. detections: rows of DETECTION_DTYPE."""
        rows = counted(detections, self._categories)
        for _, tally in self._tallies:
            tally.add(truth, rows)

    def to_bytes(self) -> bytes:
        """All of them, for `merge` in another process."""
        return packed(*(tally.to_bytes() for _, tally in self._tallies))

    def merge(self, others: Sequence[bytes]) -> None:
        """Count the images of others, too. Raises ValueError for bytes of other protocols."""
        parts = [unpacked(other) for other in others]
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
            return dict.fromkeys(self._meanings, math.nan)
        found: dict[str, float] = {}
        for protocol, tally in self._tallies:
            scores = tally.scores()
            if scores.keys() != protocol.meanings.keys():
                raise ValueError(
                    f"a protocol promises the scores {list(protocol.meanings)} and computed {list(scores)}"
                )
            found |= scores
        return {name: found[name] for name in self._meanings}


def check_set(index: ShardIndex, config: EvalConfig) -> None:
    """Raise ValueError unless eval.scorer knows the protocol of the set, and each image stands in it once."""
    ids, counts = np.unique(index.samples["image_id"], return_counts=True)
    if len(repeated := ids[counts > 1]):
        raise ValueError(
            f"{index.location}: {len(repeated)} images stand in it more than once, and no score is defined for that; "
            f"the first one: {repeated[0]}. Pack the set again, each image once and under an id of its own"
        )
    if config.scorer == "pycocotools" and index.protocol != "coco":
        raise ValueError(
            f"eval.scorer=pycocotools scores by COCO's protocol alone, and {index.location} is a set of "
            f"{SPELLED[index.protocol]}; leave it out"
        )


def check_protocols() -> None:
    """Raises ValueError that names what is wrong with PROTOCOLS, before anything is computed."""
    names = [*dict.fromkeys(_names(OF_SETS.values())), *_names(PROTOCOLS)]
    if twice := [name for name, count in Counter(names).items() if count > 1 or name in RESERVED]:
        raise ValueError(f"scores: the name {twice[0]!r} is taken: give the score of one protocol another")
    if long := [name for name in names if len(name) > LONGEST_SCORE or name != visible(name)]:
        raise ValueError(f"scores: {visible(long[0])} is no name that can be shown, of {LONGEST_SCORE} characters")
    for protocol in PROTOCOLS:
        if unknown := set(protocol.brief) - set(protocol.meanings):
            raise ValueError(f"scores: a protocol of {list(protocol.meanings)} has no {min(unknown)!r} to show")


def headline(protocol: ProtocolName = "coco") -> str:
    """The name of the score by which checkpoints are compared on a set of this protocol."""
    return OF_SETS[protocol].headline


def score_names() -> list[str]:
    """The names of the scores of all protocols, each once."""
    return list(dict.fromkeys(_names([*OF_SETS.values(), *PROTOCOLS])))


def _names(protocols: Iterable[Protocol]) -> list[str]:
    return [name for protocol in protocols for name in protocol.meanings]


def meanings(protocol: ProtocolName) -> dict[str, str]:
    """What every score of a set of this protocol is, by name, in their order."""
    found = (OF_SETS[protocol], *PROTOCOLS)
    return {name: meaning for each in found for name, meaning in each.meanings.items()}


def most_detections(config: EvalConfig, protocol: ProtocolName) -> int:
    """How many detections of an image are scored: eval.top_k, by default as many as the set's protocol counts."""
    return config.top_k or OF_SETS[protocol].detections_per_image


def departure(protocol: ProtocolName, top_k: int | None) -> str:
    """What is to be said beside numbers of at most so many detections an image: "" where the protocol has as many."""
    usual = OF_SETS[protocol].detections_per_image
    if top_k in (None, usual):
        return ""
    return f"with at most {top_k} detections an image, where {SPELLED[protocol]} counts {usual}"


def in_brief(metrics: Mapping[str, float], headline: str, protocol: ProtocolName = "coco") -> str:
    """The scores of a result in a line: AP 0.412, AP50 0.605, ...; last those that no protocol here knows."""
    known = [name for each in (OF_SETS[protocol], *PROTOCOLS) for name in each.brief if name in metrics]
    unknown = [name for name in metrics if name not in meanings(protocol)]
    return ", ".join(f"{name} {metrics[name]:.3f}" for name in dict.fromkeys([headline, *known, *unknown]))
