"""`ddetr report`: one HTML page of a run, from its settings, its history and the pictures in eval/."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.evaluation.scores import OF_SETS, departure, meanings
from ..data.files import write_whole
from . import failure_section as failures
from . import history
from .charts import Line, chart, number
from .console import brief
from .failures import WORST
from .history import SUMMED, Entry, History
from .page import date, duration, escaped, figure, page, picture, table, tile
from .settings import Settings, in_short

PICTURES = 12
DETAIL_LENGTH = 2000  # characters of one value of an event
COLOURS = 4  # lines of a chart that can be distinguished


@dataclass(frozen=True)
class RunLog:
    """What a run directory says."""

    name: str
    settings: Settings
    history: History

    @property
    def steps(self) -> list[Entry]:
        return self.history.steps

    @property
    def evaluations(self) -> list[Entry]:
        return self.history.evaluations

    @property
    def events(self) -> list[Entry]:
        return self.history.events


def report(run_directory: Path) -> Path:
    """Write RUN_DIR/report.html and return its path.

    Raises FileNotFoundError for a folder that is not a run's, and ValueError that names the file when config.yaml or a
    picture cannot be read.
    """
    run = read(Path(run_directory))
    evaluations = Path(run_directory) / "eval"
    body = [_head(run), _precision(run), failures.section(evaluations), _curves(run), _by_epoch(run)]
    body += [_pictures(evaluations), _events(run), _settings(run)]
    path = Path(run_directory) / "report.html"
    write_whole(path, page(f"{run.name} · ddetr", filter(None, body)).encode())
    return path


def read(run_directory: Path) -> RunLog:
    """Read settings and history of a run. Raises as `report`."""
    config_file = run_directory / "config.yaml"
    if not config_file.is_file():
        raise FileNotFoundError(
            f"{run_directory} is not a run directory: it has no config.yaml. `ddetr train` prints where its run is"
        )
    return RunLog(run_directory.resolve().name, Settings.of(config_file), history.read(run_directory))


def _sums(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Images, seconds and seconds of waiting for data."""
    return [sum(record["since_last_line"][name] for record in steps) for name in SUMMED]


def _head(run: RunLog) -> str:
    parts = [f'<header><p class="soft">ddetr training run</p><h1>{escaped(run.name)}</h1>']
    config = run.settings.config
    if config is not None:
        parts.append(f"<p>{escaped(in_short(config))}</p>")
    else:
        fault = f"Not a configuration that this release can read: {run.settings.fault}"
        parts.append(f'<p class="warning">{escaped(fault)}</p>')
    moments = [record["time"] for record in (*run.events, *run.steps)]
    if moments:
        times = f"{date(min(moments))} to {date(max(moments))}, {_state(run)}"
        parts.append(f'<p class="soft">{escaped(times)}{escaped(_hardware(run))}</p>')
    if run.history.unreadable:
        places = ", ".join(run.history.unreadable[:5]) + (" and more" if len(run.history.unreadable) > 5 else "")
        count = f"{len(run.history.unreadable)} line{'s' if len(run.history.unreadable) > 1 else ''}"
        parts.append(f'<p class="warning">{count} could not be read: {escaped(places)}.</p>')
    parts.append("</header>")
    if not run.steps:
        return "".join([*parts, '<p class="card empty below">No step has been recorded yet.</p>'])
    last = run.steps[-1]
    loss = _finite(last["losses"]["total"])
    images, seconds, waited = _sums(run.steps)
    seconds = seconds or math.nan
    tiles = []
    if run.evaluations:
        last_evaluation = run.evaluations[-1]
        first, *others = _names(run)
        note = f"{brief(others[0])} {_percent(_score(last_evaluation, others[0]))}" if others else ""
        if last_evaluation.get("num_not_finite"):
            note = "the model gave infinities or NaN"
        tiles.append(tile(f"{brief(first)}, last evaluation", _percent(_score(last_evaluation, first)), note=note))
    epoch = f"epoch {last['epoch'] + 1}" + (f" of {config.train.epochs}" if config else "")
    tiles += [
        tile("Steps", number(last["step"]), note=epoch),
        tile("Images trained on", number(images)),
        tile("Throughput", number(images / seconds), "images/s", f"{_percent(waited / seconds)} waiting for data"),
        tile("Time in steps", duration(seconds), note="training alone"),
        tile("Loss, last step", number(loss), note=f"{number(_finite(run.steps[0]['losses']['total']))} at first"),
    ]
    return "".join([*parts, f'<div class="tiles">{"".join(tiles)}</div>'])


def _hardware(run: RunLog) -> str:
    """What the last start recorded of machine and software, such as device and number of ranks."""
    starts = [event for event in run.events if event.get("event") in ("start", "resume")]
    elsewhere = ("time", "event", "step", "path", "machines")
    facts = [f"{key} {value}" for key, value in starts[-1].items() if key not in elsewhere] if starts else []
    return "".join(f" · {brief(fact)}" for fact in facts)


def _state(run: RunLog) -> str:
    resumed = sum(event.get("event") == "resume" for event in run.events)
    again = f", resumed {resumed} time{'s' if resumed > 1 else ''}" if resumed else ""
    ends = {"stop": "ended in order", "error": "ended by an error", "ranks_lost": "ended because ranks were lost"}
    last = run.events[-1].get("event") if run.events else None
    return ends.get(str(last), "running, or ended without a word") + again


def _names(run: RunLog) -> list[str]:
    """Of the scores, the headline first."""
    names = dict.fromkeys(record["headline"] for record in reversed(run.evaluations))
    return list(names | dict.fromkeys(name for record in run.evaluations for name in record["metrics"]))


def _precision(run: RunLog) -> str:
    if not run.evaluations:
        return '<h2>Precision</h2><p class="card empty">No evaluation has been recorded yet.</p>'
    last = run.evaluations[-1]
    known = meanings(last["protocol"])
    rows = []
    for name in _names(run):
        values = [(_score(record, name), record["epoch"] + 1) for record in run.evaluations]
        best, epoch = max(values)
        found = str(epoch) if best >= 0 else "–"
        rows.append((brief(name), known.get(name, ""), _percent(values[-1][0]), _percent(best), found))
    scores = table(("", "score", "last", "best", "epoch"), rows, numbers=(2, 3, 4))
    steps = [record["step"] for record in run.evaluations]

    def lines(names: Sequence[str]) -> list[Line]:
        """Names without any objects to be computed on are left out."""
        values = {name: [_score(record, name) for record in run.evaluations] for name in names}
        return [
            Line(brief(name), steps, [100 * value if value >= 0 else math.nan for value in values[name]])
            for name in names
            if max(values[name]) >= 0
        ]

    charts = []
    for title, names in _charts(run):
        drawn = chart(lines(names), title=title, x_name="step", from_zero=True)
        charts.append(figure(title, "percent", drawn))
    note = (
        f"Last evaluation: step {number(last['step'])}, {number(last['images'])} images, {duration(last['seconds'])}. "
        "A dash means that the images have no such objects, or that the model gave infinities or NaN."
    )
    if beside := departure(last["protocol"], last.get("top_k")):
        note += f" All are {beside}."
    if run.history.others:
        note += f" {run.history.others} evaluation(s) on other sets or with other settings are not shown."
    return (
        f'<h2>Precision</h2><div class="pair"><div class="card">{scores}<p class="note">{escaped(note)}</p></div>'
        f'<div class="column">{"".join(charts)}</div></div>'
    )


def _charts(run: RunLog) -> list[tuple[str, Sequence[str]]]:
    """Title and scores of each chart: the headline and its kin, the same by size, then what other protocols have."""
    first, *others = _names(run)
    kin = [name for name in others if name.startswith(first)]
    sizes = [name for name in kin if name.startswith(f"{first}_")]
    shown = {*OF_SETS[run.evaluations[-1]["protocol"]].meanings, *kin}
    drawn = [
        (f"{brief(first)} over steps", [first, *(name for name in kin if name not in sizes)]),
        (f"{brief(first)} by object size", sizes),
        ("Other scores", [name for name in others if name not in shown]),
    ]
    return [(title, few) for title, names in drawn for few in _few(names)]


def _few(names: Sequence[str]) -> list[Sequence[str]]:
    """As many together as lines of a chart can be distinguished."""
    return [names[start : start + COLOURS] for start in range(0, len(names), COLOURS)]


def _curves(run: RunLog) -> str:
    if not run.steps:
        return ""
    x = [record["step"] for record in run.steps]
    resumed = [(step, "resumed") for step in _resumed_after(run)]

    def curve(title: str, note: str, lines: Sequence[Line], **how: Any) -> str:
        return figure(title, note, chart(lines, title=title, x_name="step", marks=resumed, **how))

    def of(key: str, name: str, factor: float = 1) -> Line:
        return Line(name, x, [_finite(record[key]) * factor for record in run.steps])

    def loss(part: str) -> Line:
        return Line(brief(part), x, [_finite(record["losses"].get(part)) for record in run.steps])

    step_time = [of("step_seconds", "step"), of("data_wait_seconds", "data wait")]
    memory = [of("memory_bytes", "memory", 2**-30)]
    charts = [
        curve("Loss", "weighted sum over all layers", [loss("total")], from_zero=True),
        *(
            curve("Parts of the loss", "weighted, summed over layers", [loss(part) for part in few], from_zero=True)
            for few in _few(_parts(run))
        ),
        curve("Learning rate", "of the transformer", [of("learning_rate", "rate")], from_zero=True),
        curve("Gradient norm", "before clipping; logarithmic", [of("gradient_norm", "norm")], log=True),
        curve("Step time", "seconds, and how many of them were spent waiting for data", step_time, from_zero=True),
        curve("Memory", "GiB; largest so far on rank 0", memory, from_zero=True),
    ]
    if len({record["loss_scale"] for record in run.steps}) > 1:
        charts.append(curve("Loss scale", "fp16; logarithmic", [of("loss_scale", "scale")], log=True))
    skipped = sum(bool(record["skipped"]) for record in run.steps)
    note = (
        "Lines with many steps are means of neighbouring steps, bands reach from the smallest to the largest. "
        "Hover a chart for its values. Red marks stand where a value is not finite. "
        f"Steps recorded as skipped: {skipped}."
    )
    return f'<h2>Training</h2><div class="pair">{"".join(charts)}</div><p class="note below">{note}</p>'


def _parts(run: RunLog) -> list[str]:
    """Of the loss, as the last step has them."""
    return list(run.steps[-1]["parts"])


def _resumed_after(run: RunLog) -> list[int]:
    """The last step recorded before each time the run was resumed."""
    moments = [event["time"] for event in run.events if event.get("event") == "resume"]
    before = [[record["step"] for record in run.steps if record["time"] < moment] for moment in moments]
    return sorted({steps[-1] for steps in before if steps})


def _by_epoch(run: RunLog) -> str:
    """The curves as numbers, one row an epoch."""
    if not run.steps:
        return ""
    names, headline = ["total", *_parts(run)], [*_names(run)][:1]
    precision = {record["epoch"]: _score(record, record["headline"]) for record in run.evaluations}
    rows = []
    for epoch in sorted({record["epoch"] for record in run.steps}):
        steps = [record for record in run.steps if record["epoch"] == epoch]
        taken = [record for record in steps if not record["skipped"]] or steps
        losses = [sum(_finite(record["losses"].get(name)) for record in taken) / len(taken) for name in names]
        images, seconds, waited = _sums(steps)
        seconds = seconds or math.nan
        row = [str(epoch + 1), number(steps[-1]["step"]), *(f"{value:.3f}" for value in losses)]
        row += [number(_finite(steps[-1]["learning_rate"])), number(images / seconds), _percent(waited / seconds)]
        rows.append([*row, *[_percent(precision[epoch]) if epoch in precision else "" for _ in headline]])
    heads = ["epoch", "last step", "loss", *map(brief, names[1:]), "learning rate", "images/s", "data wait", *headline]
    numbers = table(heads, rows, numbers=range(1, len(heads)))
    return f'<details class="card below"><summary>Numbers by epoch</summary>{numbers}</details>'


def _pictures(folder: Path) -> str:
    suffixes = (".png", ".jpg", ".jpeg")
    inside = folder.parent.resolve()  # not what links of others lead to
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes and path.parent.name != WORST)
    paths = sorted(path for path in found if path.resolve().is_relative_to(inside))
    if not paths:
        return ""
    shown = "".join(picture(path, str(path.relative_to(folder))) for path in paths[:PICTURES])
    more = len(paths) - PICTURES
    rest = f'<p class="note">{more} more in {escaped(folder.name)}/.</p>' if more > 0 else ""
    return f'<h2>Pictures</h2><div class="pictures">{shown}</div>{rest}'


def _events(run: RunLog) -> str:
    if not run.events:
        return ""
    rows = []
    for event in run.events:
        details = (f"{brief(key)} {_short(value)}" for key, value in event.items() if key not in ("time", "event"))
        rows.append((date(event["time"]), brief(str(event.get("event"))), ", ".join(details)))
    # A region that scrolls takes the focus, so that it can be scrolled from the keyboard.
    region = '<div class="card scroll" tabindex="0" role="region" aria-label="Events">'
    return f"<h2>Events</h2>{region}{table(('time', 'event', 'details'), rows)}</div>"


def _settings(run: RunLog) -> str:
    text = "\n".join(map(escaped, run.settings.text.split("\n")))
    return f'<h2>Settings</h2><details class="card"><summary>config.yaml</summary><pre>{text}</pre></details>'


def _short(value: object) -> str:
    return number(value) if isinstance(value, float) else brief(str(value), DETAIL_LENGTH)


def _finite(value: float | None) -> float:
    """JSON written by others may hold null for what is not a number."""
    return math.nan if value is None else value


def _score(record: dict[str, Any], name: str) -> float:
    """A number of an evaluation; -1 where there is none."""
    value = record["metrics"].get(name)
    return -1.0 if value is None or math.isnan(value) else value


def _percent(share: float) -> str:
    """A share as percent; pycocotools gives -1 for what cannot be computed."""
    return f"{100 * share:.1f} %" if share >= 0 else "–"
