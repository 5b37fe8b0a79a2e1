"""Where a detector fails: the one value that `ddetr eval` writes beside its detections, and that the report reads.

Its size is bounded, so the file of a run directory, which anybody may have written, is read within limits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...data.documents import as_json, parse_json
from ...data.files import write_whole
from ...data.text import visible
from ...data.values import MOST_ID

FILE_NAME = "analysis.json"
MOST_BYTES = 8 << 20  # of the file; a character of a name may take 12
MOST_CLASSES = 5000  # of the table: those with the most objects
MOST_CONFUSIONS = 200  # pairs of classes
MOST_WORST = 12  # images
LONGEST_NAME = 80  # characters of a class, an image or a place
CURVE_RECALLS = 21  # of a class: 0, 0.05, ..., 1
BINS = 10  # of scores
FREQUENCY_GROUPS = ("rare", "common", "frequent")  # as LVIS has them
SMALL_GROUPS = (("1 to 10 objects", 10), ("11 to 100 objects", 100), ("over 100 objects", None))

Name = Annotated[str, Field(max_length=LONGEST_NAME)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0, le=MOST_ID)]
Id = Annotated[int, Field(ge=-MOST_ID, le=MOST_ID)]
Iou = Annotated[str, Field(pattern=r"^0\.(50|75)$")]
Curve = Annotated[list[Share], Field(min_length=101, max_length=101)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ClassRow(_Part):
    """One class with objects in the set. recall: the share of them that any detection finds, at IoU 0.5.

    threshold: the score with the best F1 at IoU 0.5, and that F1; None where no detection is right. curve: precision
    at IoU 0.5 and recalls 0, 0.05, ..., 1.
    """

    id: Id
    name: Name
    objects: Count
    ap: Share
    ap50: Share
    recall: Share
    threshold: Share | None
    f1: Share
    curve: Annotated[list[Share], Field(min_length=CURVE_RECALLS, max_length=CURVE_RECALLS)]


class ErrorKind(_Part):
    """Errors of a kind at IoU 0.5. count: over all scores; confident: where each class counts from its best threshold.

    gain: what mending this kind alone adds to AP50.
    """

    name: Annotated[str, Field(pattern="^(classification|localisation|both|duplicate|background|missed)$")]
    count: Count
    confident: Count
    gain: Share


class Group(_Part):
    """Classes, or objects of a size, and their AP."""

    name: Name
    classes: Count
    ap: Share


class Bin(_Part):
    """Detections of similar scores: their number, their mean score, and the share that is right at IoU 0.5."""

    count: Count
    score: Share
    right: Share


class Confusion(_Part):
    """Objects of the class `truth` that were detected as `found`, at IoU 0.5 and the best threshold of each class.

    share: of all objects of `truth`.
    """

    truth: Name
    found: Name
    count: Count
    share: Share


class ImageErrors(_Part):
    """What is wrong in one image, at IoU 0.5 and the best threshold of each class."""

    id: Id
    file_name: Name
    right: Count
    wrong: Count
    missed: Count


class Analysis(_Part):
    """Where a detector fails on a set.

    curves: mean precision over the classes at recalls 0, 0.01, ..., 1, by IoU. by_size: of the protocol's own scores.
    calibration_error: the mean distance between scores and shares of right detections (ECE). classes: by AP, the lowest
    first.
    """

    version: Literal[1] = 1
    shards: Name
    step: Count | None
    images: Count
    num_classes: Count  # with objects
    objects: Count
    detections: Count
    ap: Share
    ap50: Share
    curves: Annotated[dict[Iou, Curve], Field(max_length=2)]
    errors: Annotated[list[ErrorKind], Field(max_length=6)]
    by_size: Annotated[list[Group], Field(max_length=3)]
    by_frequency: Annotated[list[Group], Field(max_length=3)]
    calibration_error: Share
    bins: Annotated[list[Bin], Field(max_length=BINS)]
    confusions: Annotated[list[Confusion], Field(max_length=MOST_CONFUSIONS)]
    worst: Annotated[list[ImageErrors], Field(max_length=MOST_WORST)]
    classes: Annotated[list[ClassRow], Field(max_length=MOST_CLASSES)]


def write(folder: Path, analysis: Analysis) -> None:
    write_whole(folder / FILE_NAME, as_json(analysis.model_dump()).encode())


def read(folder: Path) -> Analysis:
    """What `write` has written. Raises ValueError that names the file for anything else, FileNotFoundError without."""
    file = folder / FILE_NAME
    try:
        with file.open("rb") as opened:
            data = opened.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} bytes")
        return Analysis.model_validate(_known(parse_json(data)))
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({_fault(error)}): move it away, or evaluate anew") from error


def _known(values: Any) -> Any:
    if isinstance(values, Mapping) and values.get("version") != 1:
        raise ValueError(f"version {visible(repr(values.get('version'))[:40])}, this release reads 1")
    return values


def _fault(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return visible(str(error))
    first = error.errors(include_input=False, include_url=False)[0]
    return visible(f"{'.'.join(map(str, first['loc']))[:100]}: {first['msg']}")
