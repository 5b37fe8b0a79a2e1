"""`ddetr eval A B`: the differences between detectors on one set, and whether they are noise."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ..core.checkpoint import contents, read_newest
from ..core.evaluation.bootstrap import CONFIDENCE, RESAMPLES, SEED, Comparison, Difference
from ..core.evaluation.bootstrap import compare as compared
from ..core.evaluation.columns import counted
from ..core.evaluation.matching import Matches, matches
from ..data.categories import Categories
from ..data.documents import as_json
from ..data.files import write_whole
from ..data.index import ShardIndex
from ..data.truth import GroundTruth
from .console import Terminal, brief, progress_bar
from .evaluate import evaluate

FILE_NAME = "comparison.json"
SHOWN = 10  # classes
FEWEST = 10  # images of which draws say something


def compare(
    paths: Sequence[Path],
    overrides: list[str],
    data: str | Path | None = None,
    ray_address: str | None = None,
    output: Path | None = None,
) -> list[Comparison]:
    """Evaluate each checkpoint, then compare the first one with every other.

    All are evaluated on the same shards: `data`, or those of the first one's data.validation. output: folder for
    comparison.json and what `evaluate` writes of each, in a folder of its number. Raises as `evaluate`, and ValueError
    for shards without objects and for images that were damaged for one of them alone.
    """
    console, found = Terminal(), []
    categories: Categories | None = None

    def keep(index: ShardIndex, truth: GroundTruth, detections: np.ndarray) -> None:
        nonlocal data, categories
        data, categories = index.real_location, index.categories
        found.append(matches(truth, counted(detections, index.categories), index.categories, index.protocol))
        if not found[-1].num_objects.any():  # before the work on the others
            raise ValueError(f"{index.location}: there is no object in it, so there is nothing to compare")

    for path in paths:  # before the work on those before it
        read_newest(path, contents)
    for number, path in enumerate(paths, start=1):
        console.print(f"{number}: {path}", soft_wrap=True)
        sets, folder = [] if data is None else [data], None if output is None else output / str(number)
        evaluate(path, overrides, sets, ray_address, folder, use=keep)
    assert categories is not None
    names = dict(zip(categories.ids, categories.names, strict=True))
    comparisons = [_compared(console, found[0], other) for other in found[1:]]
    for number, comparison in enumerate(comparisons, start=2):
        _show(console, number, paths, comparison, names)
    if output is not None:
        values = [_to_json(number, paths, comparison, names) for number, comparison in enumerate(comparisons, start=2)]
        write_whole(output / FILE_NAME, as_json(values, indent=1).encode())
        console.print(f"Written to {output / FILE_NAME}", soft_wrap=True)
    return comparisons


def _compared(console: Console, first: Matches, second: Matches) -> Comparison:
    with progress_bar(console=console) as progress:
        task = progress.add_task("draws of images", total=RESAMPLES)
        return compared(first, second, advance=lambda: progress.advance(task))


def _show(console: Console, number: int, paths: Sequence[Path], comparison: Comparison, names: dict[int, str]) -> None:
    console.print(f"1 is {paths[0]}, {number} is {paths[number - 1]}, on {comparison.images} images", soft_wrap=True)
    table = Table()
    table.add_column("score or class")
    percent = f"{100 * CONFIDENCE:.0f} %"
    for name in ("1", str(number), "difference", f"{percent} of draws", "noise?"):
        table.add_column(name, justify="right")
    rows = list(comparison.classes.items())
    most = sorted(rows, key=lambda row: -abs(row[1].difference))[:SHOWN]
    for name, row in comparison.scores.items():
        table.add_row(name, *_cells(row))
    table.add_section()
    for id_, row in sorted(most, key=lambda item: item[1].difference):
        table.add_row(brief(names[id_]), *_cells(row))
    console.print(table)
    ap = comparison.scores["AP"]
    if comparison.images < FEWEST:
        verdict = f"With {comparison.images} images that says nothing: draws of so few hardly differ"
    elif ap.is_noise:
        verdict = "0 lies inside: this set does not tell them apart"
    else:
        verdict = f"0 lies outside: {number if ap.difference > 0 else 1} is better on images like these"
    console.print(
        f"AP differs by {ap.difference:+.4f}, in {percent} of {RESAMPLES} draws of the images by {ap.low:+.4f} to "
        f"{ap.high:+.4f}. {verdict}.",
        soft_wrap=True,
    )
    clear = sum(not row.is_noise for _, row in rows)
    chance = (1 - CONFIDENCE) * len(rows)
    by_chance = f"about {chance:.0f}" if chance >= 1 else "fewer than 1"
    console.print(
        f"{clear} of {len(rows)} classes have an interval without 0; {by_chance} would by chance alone.",
        soft_wrap=True,
    )


def _cells(row: Difference) -> tuple[str, ...]:
    interval = f"{row.low:+.4f} to {row.high:+.4f}"
    return (
        f"{row.first:.4f}",
        f"{row.second:.4f}",
        f"{row.difference:+.4f}",
        interval,
        "perhaps" if row.is_noise else "no",
    )


def _to_json(number: int, paths: Sequence[Path], comparison: Comparison, names: dict[int, str]) -> dict[str, object]:
    def row(difference: Difference) -> dict[str, float]:
        return {**asdict(difference), "difference": difference.difference}

    return {
        "first": str(paths[0]),
        "second": str(paths[number - 1]),
        "images": comparison.images,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "seed": SEED,
        "scores": {name: row(difference) for name, difference in comparison.scores.items()},
        "classes": [
            {"id": id_, "name": names[id_], **row(difference)} for id_, difference in comparison.classes.items()
        ],
    }
