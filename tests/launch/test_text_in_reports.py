"""A stranger's run directory in `ddetr report`: readable, and without markup of its own."""

import json
import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from ddetr.launch.report import report
from PIL import Image

from tests.launch.names import NAMES, SHOWN, assert_harmless, file_of

DDETR = Path(sys.executable).with_name("ddetr")


class Markup(HTMLParser):
    """Every tag and attribute of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[tuple[str, str]] = set()
        self.text: list[str] = []
        self.values: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found |= {(tag, name) for name, _ in attrs} | {(tag, "")}
        self.values += [value or "" for name, value in attrs if name in ("src", "href", "style", "content")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def record(number: int, **others: object) -> str:
    amounts = dict.fromkeys(("learning_rate", "gradient_norm", "loss_scale"), 1.0)
    spans = {"time": 1.79e9 + number, "step_seconds": 0.5, "data_wait_seconds": 0.1, "memory_bytes": 10**9}
    losses = dict.fromkeys(("total", "class", "l1", "giou"), 1.5)
    counts = {"kind": "step", "step": number, "epoch": 0, "images": 8, "skipped": False}
    return json.dumps({**counts, "losses": losses, **amounts, **spans, **others}) + "\n"


def page_of(folder: Path, *texts: str) -> Markup:
    """The report of a run directory with these texts wherever it can have any."""
    folder.mkdir(parents=True)
    config = {"model": {"backbone": texts[0] if texts else "b"}, "train": {"epochs": 3, "name": " ".join(texts)}}
    config["optim"] = {"learning_rate": texts[0] if texts else 1}
    (folder / "config.yaml").write_text(json.dumps(config))
    (folder / "metrics.jsonl").write_text("".join(record(step) for step in range(1, 9)))
    events = [
        {"time": 1.79e9, "event": "start", "ranks": 2, "device": " ".join(texts), **dict.fromkeys(texts, 1)},
        *({"time": 1.79e9 + 1, "event": text, "reason": text, text: [text, {text: text}]} for text in texts),
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for number, text in enumerate(texts or ("plain",)):
        (folder / "eval").mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (10 * number, 99, 0)).save(folder / "eval" / file_of(text))
    return Markup(report(folder).read_text(encoding="utf-8"))


def test_a_report_of_strangers_has_the_markup_of_any(tmp_path: Path) -> None:
    plain = page_of(tmp_path / "plain")
    page = page_of(tmp_path / '<script>alert(2)<|script> \x1b[2J\u202e"><img src=x onerror=alert(1)>', *NAMES)
    assert page.found == plain.found
    assert not {tag for tag, _ in page.found} & {"script", "iframe", "object", "embed", "link", "base", "form", "a"}
    assert not {name for _, name in page.found if name.startswith("on")}
    assert set(map(str.lower, page.values)) - set(map(str.lower, plain.values)) <= {
        value.lower() for value in page.values if value.startswith("data:image/jpeg;base64,")
    }
    text = "".join(page.text)
    assert_harmless(text)
    for name in NAMES:
        assert SHOWN[name] in text
    assert r"<script>alert(2)<|script> \x1b[2J\u202e" in text


@pytest.mark.parametrize(
    "line",
    [
        record(9, step="<script>"),
        record(9, time="never"),
        record(9, time=1e300),
        record(9, losses={"total": "<b>"}),
        record(9, losses=[1]),
        record(9, gradient_norm=1e308),
        record(9, step_seconds=None),
        record(9, step=10**400),
        record(9, step=-1),
        json.dumps(
            {"kind": "evaluation", "time": 1, "step": 9, "epoch": 0, "images": 1, "seconds": 1, "metrics": "AP"}
        ),
        "[" * 100_000,
        "not JSON \x1b[2J",
    ],
    ids=range(12),
)
def test_a_record_that_is_none_is_named(line: str, tmp_path: Path) -> None:
    page_of(tmp_path / "run")
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(line)
    text = "".join(Markup(report(tmp_path / "run").read_text()).text)
    assert "1 line could not be read: metrics.jsonl line 9." in text


def test_settings_and_pictures_that_are_none_are_named(tmp_path: Path) -> None:
    page_of(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("model: 3\ntrain: [1]\noptim: x\n")
    report(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("model: {\x1b[2J")
    with pytest.raises(ValueError, match=r"config\.yaml: not valid YAML"):
        report(tmp_path / "run")
    (tmp_path / "run/config.yaml").write_text("{}")
    (tmp_path / "run/eval/bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"bad\.png: not a picture that can be read"):
        report(tmp_path / "run")


@pytest.mark.integration
def test_a_terminal_that_lacks_the_letters_is_given_escapes(tmp_path: Path) -> None:
    page_of(tmp_path / "名前")
    command, environment = [DDETR, "report", tmp_path / "名前"], os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/\\u540d\\u524d/report.html\n"), done.stderr
