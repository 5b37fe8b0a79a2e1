"""Of the report: where the detector fails, from the newest analysis in a run's eval/ folder."""

from pathlib import Path

from ..core.evaluation import analysis as analyses
from ..core.evaluation.analysis import Analysis, Group
from .charts import Line, bars, chart, number, spark
from .failures import PANEL, pictures
from .page import Markup, escaped, figure, picture, table

EVERY_RECALL = 2  # of the 101 of a curve: as many as a chart draws one by one


def section(folder: Path) -> str:
    """Nothing without an analysis; a warning in place of one that cannot be read.

    folder: the run's eval/. Raises ValueError that names a picture that cannot be read.
    """
    inside = folder.parent.resolve()  # not what links of others lead to
    files = [file for file in folder.glob(f"*/{analyses.FILE_NAME}") if file.resolve().is_relative_to(inside)]
    if not files:
        return ""
    newest = max(files, key=lambda file: (file.stat().st_mtime, file)).parent
    head = "<h2>Where it fails</h2>"
    try:
        analysis = analyses.read(newest)
    except ValueError as error:
        return f'{head}<p class="warning">{escaped(str(error))}</p>'
    parts = [_charts(analysis), _classes(analysis), _confusions(analysis), _pictures(newest, analysis, inside)]
    return f"{head}{_summary(analysis)}{''.join(parts)}"


def _summary(analysis: Analysis) -> str:
    step = "" if analysis.step is None else f"Step {number(analysis.step)}: "
    text = (
        f"{step}{number(analysis.images)} images of {analysis.shards}, {number(analysis.objects)} objects of "
        f"{number(analysis.num_classes)} classes, {number(analysis.detections)} detections. "
        f"AP {_percent(analysis.ap)}, AP50 {_percent(analysis.ap50)}. Errors, recall and scores are at IoU 0.50; "
        "the best score of a class is the threshold with its highest F1."
    )
    return f'<p class="note">{escaped(text)}</p>'


def _charts(analysis: Analysis) -> str:
    kinds = sorted(analysis.errors, key=lambda kind: -kind.gain)
    gains = [(kind.name, kind.gain, f"+{100 * kind.gain:.1f}") for kind in kinds]
    rows = [(kind.name, number(kind.count), number(kind.confident)) for kind in kinds]
    counts = table(("errors", "all", "from the best scores on"), rows, numbers=(1, 2))
    x = [float(percent) for percent in range(0, 101, EVERY_RECALL)]
    lines = [
        Line(f"IoU {iou}", x, [100 * value for value in curve[::EVERY_RECALL]])
        for iou, curve in sorted(analysis.curves.items())
    ]
    bins = [part for part in analysis.bins if part.count]
    scores = [100 * part.score for part in bins]
    reliability = [Line("right", scores, [100 * part.right for part in bins]), Line("as scored", scores, scores)]
    error = f"percent that is right, by score; mean distance {_percent(analysis.calibration_error)}"
    curves = chart(lines, title="Precision over recall", x_name="recall", from_zero=True)
    drawn = [
        figure("Errors", "points of AP50 that mending one kind alone would add", bars(gains, title="Errors") + counts),
        figure("Precision over recall", "percent, mean over the classes", curves),
        figure("Scores", error, chart(reliability, title="Right detections by score", x_name="score", from_zero=True)),
        _groups(analysis),
    ]
    return f'<div class="pair">{"".join(drawn)}</div>'


def _groups(analysis: Analysis) -> str:
    def drawn(groups: list[Group], title: str) -> str:
        rows = [
            (group.name, group.ap, f"{_percent(group.ap)}" + (f" of {group.classes}" if group.classes else ""))
            for group in groups
        ]
        return f'<h3 class="below">{title}</h3>{bars(rows, title=title)}' if rows else ""

    note = "mean over the classes; with the number of classes"
    return (
        f'<figure class="card">{drawn(analysis.by_size, "AP by size of the objects")}'
        f"{drawn(analysis.by_frequency, 'AP by frequency of the classes')}"
        f"<figcaption>{note}</figcaption></figure>"
    )


def _classes(analysis: Analysis) -> str:
    heads = ("class", "objects", "AP", "AP50", "recall", "best score", "F1", "precision over recall")
    rows = [
        (
            row.name,
            number(row.objects),
            _percent(row.ap),
            _percent(row.ap50),
            _percent(row.recall),
            "–" if row.threshold is None else f"{row.threshold:.2f}",
            f"{row.f1:.2f}",
            Markup(spark(row.curve)),
        )
        for row in analysis.classes
    ]
    title = f"{number(len(rows))} classes, the lowest AP first"
    return _scrolling(title, table(heads, rows, numbers=range(1, 7)))


def _confusions(analysis: Analysis) -> str:
    if not analysis.confusions:
        return ""
    rows = [(pair.truth, pair.found, number(pair.count), _percent(pair.share)) for pair in analysis.confusions]
    heads = ("object of class", "detected as", "times", "of its objects")
    return _scrolling("Confusions, from the best scores on", table(heads, rows, numbers=(2, 3)))


def _scrolling(title: str, content: str) -> str:
    # A region that scrolls takes the focus, so that it can be scrolled from the keyboard.
    region = f'<div class="card scroll" tabindex="0" role="region" aria-label="{escaped(title)}">'
    return f'<h3 class="below">{escaped(title)}</h3>{region}{content}</div>'


def _pictures(folder: Path, analysis: Analysis, inside: Path) -> str:
    shown = []
    for image, file in zip(analysis.worst, pictures(folder), strict=False):
        if file.is_file() and file.resolve().is_relative_to(inside):
            caption = f"{image.file_name}: {image.right} right, {image.wrong} wrong, {image.missed} missed"
            shown.append(picture(file, caption, 2 * PANEL))
    if not shown:
        return ""
    title = "The images with the most errors: truth on the left, detections on the right"
    return f'<h3 class="below">{title}</h3><div class="pictures two">{"".join(shown)}</div>'


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
