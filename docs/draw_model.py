"""Draw docs/images/model.svg: one training step of the real model, every detail with its place in code and paper.

    python docs/draw_model.py            draws it
    python docs/draw_model.py --check    says whether the file is what would be drawn; exit status 1 if not

Numbers with decimals, which processors round differently, may differ a little; all else may not.
"""

import re
import sys
from pathlib import Path

from picture import attention, decoder, encoder, features, proposals, step, surroundings
from picture.canvas import Canvas
from picture.maps import Maps
from picture.record import record

PICTURE = Path(__file__).parent / "images/model.svg"
TITLE = "Deformable DETR: one training step, from images to weights"
DECIMAL = re.compile(r"(\d+\.\d+)")
SLACK = {1: 0.35}  # by the number of decimals: coordinates have one
LEAST_SLACK = 0.02


def drawing() -> str:
    """Raises ValueError when something overlaps or does not fit."""
    recorded = record()
    canvas = Canvas(2120, 2790)
    maps = Maps(canvas, recorded)
    surroundings.head(canvas, recorded)
    boxes = features.draw(canvas, maps, recorded, 110)
    boxes |= encoder.draw(canvas, recorded, 610, boxes)
    boxes |= attention.draw(canvas, maps, recorded, 610, boxes)
    boxes |= proposals.draw(canvas, maps, recorded, 1310, boxes)
    boxes |= decoder.draw(canvas, maps, recorded, 1310, boxes)
    step.draw(canvas, maps, recorded, 2110, boxes)
    surroundings.foot(canvas, maps, recorded, 2590)
    if problems := canvas.problems():
        raise ValueError("\n".join(problems))
    return canvas.svg(TITLE)


def difference(drawn: str, stored: str) -> str | None:
    """The first line that differs by more than rounding."""
    ours, theirs = drawn.splitlines(), stored.splitlines()
    if len(ours) != len(theirs):
        return f"{len(ours)} lines instead of {len(theirs)}"
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        if one != other and not _nearly(one, other):
            return f"line {number}: {one[:300]}\ninstead of {other[:300]}"
    return None


def _nearly(one: str, other: str) -> bool:
    ours, theirs = DECIMAL.split(one), DECIMAL.split(other)
    if ours[0::2] != theirs[0::2] or len(ours) != len(theirs):
        return False
    return all(
        abs(float(a) - float(b)) <= SLACK.get(len(a.partition(".")[2]), LEAST_SLACK)
        for a, b in zip(ours[1::2], theirs[1::2], strict=True)
    )


def main() -> int:
    drawn = drawing()
    if "--check" not in sys.argv[1:]:
        PICTURE.write_text(drawn)
        return 0
    found = difference(drawn, PICTURE.read_text())
    if found:
        print(
            f"{PICTURE} is not what the code says; draw it with `python docs/draw_model.py`\n{found}", file=sys.stderr
        )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
