"""What can be wrong with a set: each kind of finding, where it was found, and what a user does about it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .text import visible

# What a user does about each kind of finding. None of it loses anything.
FIXES = {
    # boxes
    "degenerate box": "correct the annotation or take it out; or pack with --drop-degenerate, which leaves it out",
    "impossible box": "write four finite numbers, of which the last two, width and height, are not negative",
    "outside box": "correct the numbers, or the image that they belong to",
    "overhanging box": "nothing to do: the stream clips it to the image",
    "corners as box": "write each bbox as (x, y, width, height): the last two less the first two",
    "shares as box": "write each bbox in pixels: times the width and the height of its image",
    "repeated box": "keep one of them, unless there are really two such objects",
    "outline as box": "nothing to do if it is an outline; if it is keypoints, give the data.yaml its kpt_shape",
    "confidence in a label": "nothing to do, unless the labels are a detector's output rather than annotations",
    "pixels counted from 0": "nothing to do: corners of 0 do not occur where the first pixel is 1, as VOC has it",
    "replaced area": "nothing to do: width times height stands in its place; evaluation by size looks at it",
    # entries
    "bad entry": "correct the entry, or take it out",
    "unknown category": 'add the category to "categories" of the json (or to the names of the classes), or correct it',
    "repeated category": "give each category its own name: checkpoints and reports tell categories by their names",
    "missing id": "give every annotation an id of its own; --renumber numbers them all anew",
    "duplicate id": "give every image and every annotation its own id; --renumber numbers the annotations anew",
    "duplicate file name": "keep one of the image entries: the image would count twice",
    "unknown image": "correct the entry, or add its image",
    "no boxes": "a detector learns nothing from it and no AP can be computed: look whether this is the right set",
    "lost boxes": "correct the boxes: no --drop-degenerate leaves out all boxes of a class",
    # of LVIS and Open Images
    "missing frequency": "nothing to do if it is not known: no AP of rare, common or frequent ones has the category",
    "absent companion": "put the file beside that of the boxes; without it, each class stands alone or is not verified",
    "absent image": "nothing to do if a part of the set is meant; else put the images into IMAGES",
    "missing list": "nothing to do if it is not known: on this image, detections of classes without a box do not count",
    # files
    "outside image": "move the image into the folder and correct file_name; --allow-outside reads it where it is",
    "not a file": "put an ordinary file in its place: pipes and devices are not read",
    "too large image": "scale the image down, or allow more pixels: --most-pixels here, data.most_pixels for training",
    "missing image": "put the file into the images folder, or name the right folder as IMAGES",
    "ambiguous image": "keep the one image that the annotations belong to, or name it in them in full",
    "other file name": "nothing to do if this is the image; else correct the name in the annotations",
    "undecodable image": "replace the file, or take the image out of the annotations",
    "dark image": "scale its numbers up to the whole range of 16 bits: as they are it is nearly black",
    "wrong size": "correct height and width in the annotations: neither the stored picture nor the one shown has them",
    "unknown orientation": "say what the boxes refer to: --orientation stored, or --orientation shown",
    "duplicate content": "keep one of the files if the images are really the same",
    "image without labels": "nothing to do if there is nothing on these images: they count as background",
    "image left out": "nothing to do if they are not meant to belong to the set: it has no annotations of them",
    "foreign file": "nothing to do if it holds no labels",
    "other names": "keep one list of the classes",
    "absent split": "nothing to do if it is not meant to be there; else correct its path, or add its labels",
    "shared image": "take it out of one of the splits: what was trained on is no test",
    "differing categories": "give a class the same id and name in all splits, or training refuses to evaluate on them",
    # shards
    "missing shard": "run `ddetr data pack` again: it makes only what is missing",
    "extra shard": "move the file elsewhere, or pack into an empty folder",
    "wrong bytes": "copy the shard again from where it is from, or pack into an empty folder",
}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: its kind (a key of FIXES), where it is, and what was found there."""

    kind: str
    where: str
    what: str
    severity: Literal["error", "warning"] = "error"


def summary(findings: Sequence[Finding], each: int = 5) -> str:
    """Findings grouped by kind: how many, the first few, and the fix."""
    lines = []
    for kind, count in Counter(finding.kind for finding in findings).items():
        some = [finding for finding in findings if finding.kind == kind][:each]
        lines.append(f"  {kind}: {count}")
        lines += [f"    {visible(finding.where)}: {visible(finding.what)[:1000]}" for finding in some]
        lines += [f"    ... and {count - each} more"] if count > each else []
        lines.append(f"    fix: {FIXES[kind]}")
    return "\n".join(lines)
