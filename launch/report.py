"""`ddetr report`: one HTML page of a run, built from its config.yaml, metrics.jsonl, events.jsonl and eval/ alone."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..core.config import without_logins
from ..data.documents import parse_yaml
from ..data.files import write_whole
from .charts import Line, chart, number
from .console import brief
from .page import date, duration, escaped, figure, page, picture, table, tile

PICTURES = 12
PARTS = ("class", "l1", "giou")
DETAIL_LENGTH = 2000  # characters of one value of an event
COUNTS = ("step", "epoch", "images")  # what a step and an evaluation both have, beside their time
AMOUNTS = ("learning_rate", "gradient_norm", "loss_scale", "memory_bytes")
SPANS = ("step_seconds", "data_wait_seconds")
SUMMED = ("images", *SPANS)  # over the steps that a record stands for
LATEST = 4e9  # seconds since 1970: what is later is no time of a run
SCORES = {
    "AP": "precision, IoU 0.50 to 0.95",
    "AP50": "precision, IoU 0.50",
    "AP75": "precision, IoU 0.75",
    "AP_small": "precision, area under 32² px",
    "AP_medium": "precision, 32² to 96² px",
    "AP_large": "precision, over 96² px",
    "AR1": "recall, 1 box per image",
    "AR10": "recall, 10 boxes per image",
    "AR100": "recall, 100 boxes per image",
    "AR_small": "recall, area under 32² px",
    "AR_medium": "recall, 32² to 96² px",
    "AR_large": "recall, over 96² px",
}


@dataclass(frozen=True)
class RunLog:
    """What a run directory says. Steps and evaluations are in order and each occurs once."""

    name: str
    config: dict[str, Any]
    config_text: str
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: list[dict[str, Any]]
    unreadable: list[str]  # "FILE line N" of what is no such record, as a line cut off by a crash


def report(run_directory: Path) -> Path:
    """Write RUN_DIR/report.html and return its path.

    Raises FileNotFoundError for a folder that is not a run's, and ValueError that names the file when config.yaml or a
    picture cannot be read.
    """
    run = read(Path(run_directory))
    body = [_head(run), _precision(run), _curves(run), _by_epoch(run), _pictures(Path(run_directory) / "eval")]
    body += [_events(run), _settings(run)]
    path = Path(run_directory) / "report.html"
    write_whole(path, page(f"{run.name} · ddetr", filter(None, body)).encode())
    return path


def read(run_directory: Path) -> RunLog:
    """The run's records. A resumed run repeats steps: what comes later in the file replaces what it went back over."""
    settings = run_directory / "config.yaml"
    if not settings.is_file():
        raise FileNotFoundError(
            f"{run_directory} is not a run directory: it has no config.yaml. `ddetr train` prints where its run is"
        )
    unreadable: list[str] = []
    steps: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    for record in _json_lines(run_directory / "metrics.jsonl", _is_metric, unreadable):
        if record.get("kind") == "step":
            begin = record["step"] - record.get("since_last_line", {"steps": 1})["steps"]
            if steps and begin < steps[-1]["step"]:
                steps = [earlier for earlier in steps if earlier["step"] <= begin]
                evaluations = [earlier for earlier in evaluations if earlier["step"] <= begin]
            steps.append(_with_sums(record, steps[-1]["step"] if steps else 0))
        elif record.get("kind") == "evaluation":
            evaluations = [earlier for earlier in evaluations if earlier["step"] < record["step"]]
            evaluations.append(record)
    config = _config(settings)
    return RunLog(
        name=run_directory.resolve().name,
        config={name: section for name, section in config.items() if isinstance(section, dict)},
        config_text=yaml.safe_dump(without_logins(config), sort_keys=False, allow_unicode=True),
        steps=steps,
        evaluations=evaluations,
        events=_json_lines(run_directory / "events.jsonl", _has_time, unreadable),
        unreadable=unreadable,
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        values = parse_yaml(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return values if isinstance(values, dict) else {}


def _json_lines(path: Path, is_record: Callable[[dict[str, Any]], bool], unreadable: list[str]) -> list[dict[str, Any]]:
    """The records of a file, one a line; the places of other lines are added to `unreadable`."""
    records = []
    if path.is_file():
        for place, line in enumerate(path.read_text(errors="replace").split("\n"), start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and is_record(record):
                records.append(record)
            elif line.strip():
                unreadable.append(f"{path.name} line {place}")
    return records


def _is_metric(record: dict[str, Any]) -> bool:
    """Whether the report can work with the record of a step or an evaluation; one of another kind is not looked at."""
    kind, losses, metrics = (record.get(name) for name in ("kind", "losses", "metrics"))
    if kind not in ("step", "evaluation"):
        return True
    if not (_has_time(record) and all(_is_count(record.get(name)) for name in COUNTS)):
        return False
    if kind == "evaluation":
        has_scores = isinstance(metrics, dict) and all(_is_amount(metrics.get(name)) for name in SCORES)
        return has_scores and _is_span(record.get("seconds"))
    sums = record.get("since_last_line", {"steps": 1, **dict.fromkeys(SUMMED, 0)})
    has_sums = isinstance(sums, dict) and all(_is_span(sums.get(name)) for name in ("steps", *SUMMED))
    has_losses = isinstance(losses, dict) and all(_is_amount(losses.get(name, "")) for name in ("total", *PARTS))
    has_amounts = all(_is_amount(record.get(name, "")) for name in AMOUNTS) and "skipped" in record
    return has_sums and has_losses and has_amounts and all(_is_span(record.get(name)) for name in SPANS)


def _has_time(record: dict[str, Any]) -> bool:
    return _is_span(record.get("time"))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < 2**53


def _is_span(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < LATEST


def _is_amount(value: object) -> bool:
    """A number that can be drawn, or marked as not finite: JSON written by others may hold null for that."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return True
    return isinstance(value, int | float) and (value == 0 or 1e-99 < abs(value) < 1e99)


def _with_sums(record: dict[str, Any], before: int) -> dict[str, Any]:
    """A record with sums over the steps that it stands for: in version 0.1 it had none, and they follow `before`."""
    count = record["step"] - before
    return {"since_last_line": {"steps": count, **{name: count * record[name] for name in SUMMED}}, **record}


def _sums(steps: Sequence[dict[str, Any]]) -> list[float]:
    """Images, seconds and seconds of waiting for data."""
    return [sum(record["since_last_line"][name] for record in steps) for name in SUMMED]


def _head(run: RunLog) -> str:
    parts = [f'<header><p class="soft">ddetr training run</p><h1>{escaped(run.name)}</h1>']
    parts.append(f"<p>{escaped(_in_short(run.config))}</p>")
    moments = [record["time"] for record in (*run.events, *run.steps, *run.evaluations)]
    if moments:
        times = f"{date(min(moments))} to {date(max(moments))}, {_state(run)}"
        parts.append(f'<p class="soft">{escaped(times)}{escaped(_hardware(run))}</p>')
    if run.unreadable:
        places = ", ".join(run.unreadable[:5]) + (" and more" if len(run.unreadable) > 5 else "")
        count = f"{len(run.unreadable)} line{'s' if len(run.unreadable) > 1 else ''}"
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
        note = f"AP50 {_percent(_score(last_evaluation, 'AP50'))}"
        if last_evaluation.get("num_not_finite"):
            note = "the model gave infinities or NaN"
        tiles.append(tile("AP, last evaluation", _percent(_score(last_evaluation, "AP")), note=note))
    epochs = run.config.get("train", {}).get("epochs")
    epoch = f"epoch {last['epoch'] + 1}" + (f" of {brief(str(epochs))}" if epochs else "")
    tiles += [
        tile("Steps", number(last["step"]), note=epoch),
        tile("Images trained on", number(images)),
        tile("Throughput", number(images / seconds), "images/s", f"{_percent(waited / seconds)} waiting for data"),
        tile("Time in steps", duration(seconds), note="training alone"),
        tile("Loss, last step", number(loss), note=f"{number(_finite(run.steps[0]['losses']['total']))} at first"),
    ]
    return "".join([*parts, f'<div class="tiles">{"".join(tiles)}</div>'])


def _in_short(config: dict[str, Any]) -> str:
    """The settings by which people tell runs apart, as far as the file has them."""
    model, train, optim = (config.get(section, {}) for section in ("model", "train", "optim"))
    kind = [name for key, name in (("two_stage", "two-stage"), ("box_refine", "box refinement")) if model.get(key)]
    facts = [
        "Deformable DETR" + (f" ({', '.join(kind)})" if kind else ""),
        model.get("backbone"),
        f"{model['queries']} queries" if "queries" in model else None,
        f"batch {train['batch_size']}" if "batch_size" in train else None,
        f"learning rate {_short(optim['learning_rate'])}" if "learning_rate" in optim else None,
        train.get("precision"),
        f"ZeRO {train['zero_stage']}" if "zero_stage" in train else None,
    ]
    return " · ".join(brief(str(fact)) for fact in facts if fact)


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


def _precision(run: RunLog) -> str:
    if not run.evaluations:
        return '<h2>Precision</h2><p class="card empty">No evaluation has been recorded yet.</p>'
    last = run.evaluations[-1]
    rows = []
    for name, meaning in SCORES.items():
        values = [(_score(record, name), record["epoch"] + 1) for record in run.evaluations]
        best, epoch = max(values)
        rows.append((name, meaning, _percent(values[-1][0]), _percent(best), str(epoch) if best >= 0 else "–"))
    scores = table(("", "COCO metric", "last", "best", "epoch"), rows, numbers=(2, 3, 4))
    epochs = [record["epoch"] + 1 for record in run.evaluations]

    def lines(*names: str) -> list[Line]:
        """Names without any objects to be computed on are left out."""
        values = {name: [_score(record, name) for record in run.evaluations] for name in names}
        return [
            Line(name, epochs, [100 * value if value >= 0 else math.nan for value in values[name]])
            for name in names
            if max(values[name]) >= 0
        ]

    over_iou = chart(lines("AP", "AP50", "AP75"), title="AP", x_name="epoch", from_zero=True)
    sizes = lines("AP_small", "AP_medium", "AP_large")
    over_size = chart(sizes, title="AP by object size", x_name="epoch", from_zero=True)
    note = (
        f"Last evaluation: step {number(last['step'])}, {number(last['images'])} images, {duration(last['seconds'])}. "
        "A dash means that the images have no such objects, or that the model gave infinities or NaN."
    )
    return (
        f'<h2>Precision</h2><div class="pair"><div class="card">{scores}<p class="note">{escaped(note)}</p></div>'
        f'<div class="column">{figure("AP over epochs", "percent, by the overlap that counts as found", over_iou)}'
        f"{figure('AP by object size', 'percent, classes of area as in COCO', over_size)}</div></div>"
    )


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
        return Line(part, x, [_finite(record["losses"][part]) for record in run.steps])

    step_time = [of("step_seconds", "step"), of("data_wait_seconds", "data wait")]
    memory = [of("memory_bytes", "memory", 2**-30)]
    charts = [
        curve("Loss", "weighted sum over all layers", [loss("total")], from_zero=True),
        curve("Parts of the loss", "weighted, summed over layers", [loss(part) for part in PARTS], from_zero=True),
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


def _resumed_after(run: RunLog) -> list[int]:
    """The last step recorded before each time the run was resumed."""
    moments = [event["time"] for event in run.events if event.get("event") == "resume"]
    before = [[record["step"] for record in run.steps if record["time"] < moment] for moment in moments]
    return sorted({steps[-1] for steps in before if steps})


def _by_epoch(run: RunLog) -> str:
    """The curves as numbers, one row an epoch."""
    if not run.steps:
        return ""
    precision = {record["epoch"]: _score(record, "AP") for record in run.evaluations}
    rows = []
    for epoch in sorted({record["epoch"] for record in run.steps}):
        steps = [record for record in run.steps if record["epoch"] == epoch]
        taken = [record for record in steps if not record["skipped"]] or steps
        losses = [sum(_finite(record["losses"][part]) for record in taken) / len(taken) for part in ("total", *PARTS)]
        images, seconds, waited = _sums(steps)
        seconds = seconds or math.nan
        row = [str(epoch + 1), number(steps[-1]["step"]), *(f"{value:.3f}" for value in losses)]
        row += [number(_finite(steps[-1]["learning_rate"])), number(images / seconds), _percent(waited / seconds)]
        rows.append([*row, _percent(precision[epoch]) if epoch in precision else ""])
    heads = ("epoch", "last step", "loss", "class", "l1", "giou", "learning rate", "images/s", "data wait", "AP")
    numbers = table(heads, rows, numbers=range(1, len(heads)))
    return f'<details class="card below"><summary>Numbers by epoch</summary>{numbers}</details>'


def _pictures(folder: Path) -> str:
    suffixes = (".png", ".jpg", ".jpeg")
    inside = folder.parent.resolve()  # not what a stranger's links lead to
    found = (path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
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
    text = "\n".join(map(escaped, run.config_text.split("\n")))
    return f'<h2>Settings</h2><details class="card"><summary>config.yaml</summary><pre>{text}</pre></details>'


def _short(value: object) -> str:
    return number(value) if isinstance(value, float) else brief(str(value), DETAIL_LENGTH)


def _finite(value: float | None) -> float:
    """JSON written by others may hold null for what is not a number."""
    return math.nan if value is None else value


def _score(record: dict[str, Any], name: str) -> float:
    """A number of an evaluation; -1 where there is none."""
    value = record["metrics"][name]
    return -1.0 if value is None or math.isnan(value) else value


def _percent(share: float) -> str:
    """A share as percent; pycocotools gives -1 for what cannot be computed."""
    return f"{100 * share:.1f} %" if share >= 0 else "–"
