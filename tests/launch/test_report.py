"""The page of a run, read back from its HTML. One test looks at it through a real browser."""

import json
import math
import random
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from ddetr.core.config import dump, load
from ddetr.core.evaluation.coco import MEANINGS
from ddetr.launch.charts import Line, chart, number, short, thinned
from ddetr.launch.history import read
from ddetr.launch.report import report
from PIL import Image, ImageDraw

BEGIN = 1_790_000_000.0  # 2026-09-21 14:13:20 UTC
STEPS_PER_EPOCH = 80
VOID = {"meta", "img", "circle", "path", "rect", "br"}


def step_record(step: int, time: float, noise: random.Random) -> dict[str, Any]:
    decay = math.exp(-step / 350)
    parts = {"class": 1.4 * decay + 0.5, "l1": 2.6 * decay + 0.45, "giou": 2.4 * decay + 0.8}
    parts = {name: value * noise.lognormvariate(0, 0.08) for name, value in parts.items()}
    wait = noise.lognormvariate(-4.2, 0.7)
    return {
        "kind": "step",
        "time": time,
        "step": step,
        "epoch": (step - 1) // STEPS_PER_EPOCH,
        "losses": {"total": sum(parts.values()), **parts},
        "learning_rate": 4e-4 * min(1, step / 50) * (0.1 if step > 640 else 1),
        "gradient_norm": (9 * decay + 2.5) * noise.lognormvariate(0, 0.25),
        "images": 8,
        "step_seconds": 0.42 * noise.lognormvariate(0, 0.07) + wait + (1.5 if step % 97 == 0 else 0),
        "data_wait_seconds": wait,
        "skipped": False,
        "memory_bytes": int(1.1e9 + 1e8 * (1 - decay)),
        "loss_scale": 1.0,
    }


def evaluation_record(step: int, time: float) -> dict[str, Any]:
    ap50 = 0.78 * (1 - math.exp(-step / 330))
    factors = (0.62, 1, 0.66, 0.31, 0.7, -1, 0.4, 0.85, 0.86, 0.5, 0.9, -1)
    metrics = {name: -1.0 if f < 0 else ap50 * f for name, f in zip(MEANINGS, factors, strict=True)}
    epoch = max(0, step // STEPS_PER_EPOCH - 1)
    return {
        "kind": "evaluation",
        "time": time,
        "step": step,
        "epoch": epoch,
        "metrics": metrics,
        "images": 100,
        "seconds": 6.2,
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def picture_file(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    image = Image.new("RGB", (900, 640), (70 + 30 * seed, 110, 140))
    pen = ImageDraw.Draw(image)
    for color in ("#ffd166", "#ef476f", "#06d6a0"):
        x, y = draw.randrange(40, 500), draw.randrange(40, 300)
        pen.rectangle((x, y, x + 260, y + 220), outline=color, width=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """Ten epochs of the demo: killed at step 450, resumed from 400; its crash cut a line off."""
    return sample_run(tmp_path / "tiny-demo")


def sample_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump(load("tiny", ["train.epochs=10", "model.backbone=resnet18.a1_in1k"])))
    noise = random.Random(0)
    metrics, events, time = [], [], BEGIN
    events.append({"time": time, "event": "start", "ranks": 2, "device": "cpu", "torch": "2.15.0"})
    for first, last in ((1, 450), (401, 800)):
        if first > 1:
            time += 300
            events.append({"time": time, "event": "resume", "ranks": 2, "device": "cpu", "torch": "2.15.0"})
        for step in range(first, last + 1):
            record = step_record(step, time, noise)
            time += record["step_seconds"]
            if step % 2 == 0:
                metrics.append(record)
            if step % STEPS_PER_EPOCH == 0:
                path = f"runs/tiny-demo/checkpoints/step_{step:08d}"
                events.append({"time": time, "event": "checkpoint", "step": step, "path": path, "seconds": 1.318274})
                time += 6.2
                metrics.append(evaluation_record(step, time))
                precision = metrics[-1]["metrics"]["AP"]
                events.append({"time": time, "event": "evaluation", "step": step, "AP": precision, "seconds": 6.2})
    events.append({"time": time, "event": "stop"})
    write_lines(folder / "metrics.jsonl", metrics)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "time": 17900')
    write_lines(folder / "events.jsonl", events)
    for seed in range(3):
        picture_file(folder / "eval" / f"image_{seed:012d}.png", seed)
    return folder


class Page(HTMLParser):
    """The text, the addresses and the nesting of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.alternatives: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.addresses += [str(values[name]) for name in ("src", "href", "srcset", "action") if name in values]
        if tag in ("img", "svg"):
            self.alternatives.append(values.get("alt") or values.get("aria-label") or "")
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self._open[-1:] not in (["style"], ["title"]):
            self.text.append(data.strip())

    def after(self, label: str, count: int) -> list[str]:
        index = self.text.index(label)
        return self.text[index + 1 : index + 1 + count]


def page_of(run_directory: Path) -> Page:
    path = report(run_directory)
    assert path == run_directory / "report.html"
    return Page(path.read_text())


def test_the_page_stands_alone(run_directory: Path):
    page = page_of(run_directory)
    assert page.tags.count("img") == 3
    assert all(address.startswith("data:image/jpeg;base64,") for address in page.addresses)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    text = (run_directory / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text
    assert sorted(path.name for path in run_directory.iterdir()) == sorted(
        ["config.yaml", "metrics.jsonl", "events.jsonl", "eval", "report.html"]
    )


def test_every_drawing_is_valid_and_said_in_words(run_directory: Path):
    page = page_of(run_directory)
    drawings = re.findall(r"<svg.*?</svg>", (run_directory / "report.html").read_text(), flags=re.DOTALL)
    assert len(drawings) == 8
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        assert root.get("role") == "img"
        for path in root.iter("path"):
            assert "nan" not in str(path.get("d"))
    assert all(page.alternatives)
    first, last = (read(run_directory).steps[index]["losses"]["total"] for index in (0, -1))
    assert f"Loss: total from {first:.4g} to {last:.4g}" in page.alternatives


def test_the_summary_is_right(run_directory: Path):
    page = page_of(run_directory)
    run = read(run_directory)
    # every second step is recorded and stands for two
    seconds = sum(2 * record["step_seconds"] for record in run.steps)
    assert page.after("Steps", 2) == ["800", "epoch 10 of 10"]
    assert page.after("Images trained on", 1) == ["6\N{THIN SPACE}400"]
    assert page.after("Throughput", 2) == [f"{6400 / seconds:.4g}", "images/s"]
    assert any(
        "2026-09-21 14:13:20 UTC" in text and "ranks 2" in text and "resumed 1 time" in text for text in page.text
    )
    assert any("two-stage" in text and "resnet18" in text and "batch 8" in text for text in page.text)


def test_the_table_holds_the_twelve_numbers(run_directory: Path):
    page = page_of(run_directory)
    metrics = evaluation_record(800, 0)["metrics"]
    for name, meaning in MEANINGS.items():
        value = f"{100 * metrics[name]:.1f} %" if metrics[name] >= 0 else "–"
        epoch = "10" if metrics[name] >= 0 else "–"
        start = page.text.index(meaning)
        assert page.text[start - 1 : start + 4] == [name, meaning, value, value, epoch]


def test_after_a_resume_the_last_record_of_a_step_wins(tmp_path: Path):
    """Steps 1 to 6 and an evaluation at 4 and 6, then again from 3: what came after step 2 is not of this run."""
    noise = random.Random(1)
    first = [step_record(step, BEGIN + step, noise) for step in range(1, 7)]
    again = [step_record(step, BEGIN + 60 + step, noise) for step in range(3, 5)]
    records = [*first[:4], evaluation_record(4, BEGIN + 5), *first[4:], evaluation_record(6, BEGIN + 8)]
    records += [*again, evaluation_record(4, BEGIN + 66)]
    (tmp_path / "config.yaml").write_text("{}\n")
    write_lines(tmp_path / "metrics.jsonl", records)
    run = read(tmp_path)
    assert [record["time"] for record in run.steps] == [record["time"] for record in (*first[:2], *again)]
    assert [record["time"] for record in run.evaluations] == [BEGIN + 66]
    page_of(tmp_path)


def test_a_line_cut_off_by_a_crash_is_left_out_and_named(run_directory: Path):
    page = page_of(run_directory)
    lines = (run_directory / "metrics.jsonl").read_text().splitlines()
    assert f"1 line could not be read: metrics.jsonl line {len(lines)}." in page.text
    with (run_directory / "metrics.jsonl").open("a") as file:  # a resumed run writes on, on the same line at first
        file.write("".join(json.dumps(step_record(step, BEGIN + 1e4, random.Random(2))) + "\n" for step in (801, 802)))
    assert read(run_directory).steps[-1]["step"] == 802
    assert read(run_directory).unreadable == [f"metrics.jsonl line {len(lines)}"]


def test_a_run_without_an_evaluation(run_directory: Path):
    records = [step_record(step, BEGIN + step, random.Random(step)) for step in range(1, 4)]
    write_lines(run_directory / "metrics.jsonl", records)
    page = page_of(run_directory)
    assert "No evaluation has been recorded yet." in page.text
    assert page.after("Steps", 1) == ["3"]


def test_a_run_that_has_only_begun(tmp_path: Path):
    (tmp_path / "config.yaml").write_text(dump(load("tiny")))
    page = page_of(tmp_path)
    assert "No step has been recorded yet." in page.text
    assert "svg" not in page.tags


def test_losses_that_are_not_finite_are_marked(run_directory: Path):
    records = [step_record(step, BEGIN + step, random.Random(step)) for step in range(1, 9)]
    records[5]["losses"]["total"] = math.nan
    records[6]["losses"]["total"] = math.inf
    write_lines(run_directory / "metrics.jsonl", records)
    page_of(run_directory)
    assert (run_directory / "report.html").read_text().count('class="bad"') == 2


def test_what_users_wrote_is_escaped(run_directory: Path):
    events = [{"time": BEGIN, "event": "error", "message": "<script>alert(1)</script> & more"}]
    write_lines(run_directory / "events.jsonl", events)
    page = page_of(run_directory)
    assert "message <script>alert(1)</script> & more" in page.text
    assert any("ended by an error" in text for text in page.text)


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"not a run directory: it has no config\.yaml"):
        report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_long_line_keeps_its_mean_and_its_extremes():
    values = [float(value % 7) for value in range(10_000)]
    values[4321] = 50.0
    points = thinned(Line("loss", range(10_000), values))
    assert len(points) == 150
    assert max(point.high for point in points) == 50
    assert min(point.low for point in points) == 0
    assert sum(point.mean for point in points) / 150 == pytest.approx(sum(values) / len(values), rel=1e-3)


def test_a_point_lies_where_its_axis_says():
    """Of a chart with both axes from 0: the line's coordinates against those of the ticks 0 and 10 (or 1 and 100)."""
    for log, values in ((False, [0.0, 5.0, 10.0]), (True, [1.0, 10.0, 100.0])):
        drawing = chart([Line("a", [0, 1, 2], values)], title="t", x_name="step", log=log)
        root = ElementTree.fromstring(drawing)
        ticks = {t.text: float(str(t.get("y"))) - 4 for t in root.iter("text") if t.get("text-anchor") == "end"}
        across = {t.text: float(str(t.get("x"))) for t in root.iter("text") if t.get("text-anchor") == "middle"}
        line = next(p for p in root.iter("path") if p.get("class") == "line c1")
        places = [tuple(map(float, pair.split())) for pair in str(line.get("d"))[1:].split("L")]
        assert [x for x, _ in places] == pytest.approx([across["0"], across["1"], across["2"]], abs=0.11)
        low, high = ticks[number(values[0])], ticks[number(values[2])]
        assert [y for _, y in places] == pytest.approx([low, (low + high) / 2, high], abs=0.11)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (4e-4, "4e-4"), (0.00041234, "4.12e-4"), (2.44879, "2.449"), (65536, "65\N{THIN SPACE}536"), (-1, "-1")],
)
def test_numbers_are_short(value: float, text: str):
    assert number(value) == text


def test_counts_on_an_axis_are_short():
    assert [short(count) for count in (0, 800, 1500, 20_000, 3_000_000)] == ["0", "800", "1.5k", "20k", "3M"]


@pytest.mark.integration
def test_a_browser_draws_the_page_in_both_schemes(run_directory: Path, tmp_path: Path):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    address = report(run_directory).as_uri()
    backgrounds = []
    for scheme in (1, 0):  # light, dark
        screenshot = tmp_path / f"{scheme}.png"
        flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
        flags += " --disable-component-update --disable-sync --hide-scrollbars --window-size=1240,1800"
        flags += f" --blink-settings=preferredColorScheme={scheme} --user-data-dir={tmp_path / 'profile'}"
        done = subprocess.run(
            [chromium, *flags.split(), f"--screenshot={screenshot}", address],
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert screenshot.exists(), done.stderr.decode()[-2000:]
        with Image.open(screenshot) as image:
            backgrounds.append(image.convert("RGB").getpixel((3, 3)))
            colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
        assert colors is not None
        assert len(colors) > 200  # text and curves, not an empty page
    assert backgrounds == [(0xF6, 0xF6, 0xF4), (0x13, 0x13, 0x12)]
