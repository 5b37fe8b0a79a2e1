"""What a report tells of a run's configuration: of this release, an earlier one, or one that cannot be read."""

import html
import re
from pathlib import Path

import pytest
import yaml
from ddetr.core.config import dump, load
from ddetr.launch.report import report
from ddetr.launch.settings import MISTAKES, Settings, in_short

LOGIN = "https://me:secret@example.com/shards"


def told(folder: Path) -> tuple[str, str]:
    """The head of a run's page as text, and its settings."""
    page = report(folder).read_text()
    return text_between("<header>", "</header>", page), text_between("<pre>", "</pre>", page)


def text_between(begin: str, end: str, page: str) -> str:
    markup = page.partition(begin)[2].partition(end)[0]
    assert markup
    return html.unescape(re.sub(r"<[^>]*>", " ", markup))


@pytest.mark.parametrize(
    ("preset", "kind"),
    [
        ("r50", "Deformable DETR"),
        ("r50_refine", "Deformable DETR (box refinement)"),
        ("r50_two_stage", "Deformable DETR (two-stage, box refinement)"),
        ("r50_single_scale", "Deformable DETR (single-scale)"),
        ("r50_single_scale_dc5", "Deformable DETR (single-scale, DC5)"),
        ("detr_r50", "DETR"),
        ("detr_r50_dc5", "DETR (DC5)"),
    ],
)
def test_what_a_run_trained(preset: str, kind: str, tmp_path: Path) -> None:
    config = load(preset)
    (tmp_path / "config.yaml").write_text(dump(config))
    rest = f"resnet50.tv_in1k · {config.model.queries} queries · batch {config.train.batch_size} · learning rate "
    assert in_short(config).startswith(f"{kind} · {rest}")
    assert in_short(config) in told(tmp_path)[0]


def test_settings_of_an_earlier_release_have_their_defaults(tmp_path: Path) -> None:
    """A file from before there were architectures, say; what it says itself is shown as it is."""
    values = yaml.safe_load(dump(load("tiny")))
    del values["model"]["architecture"], values["monitor"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    settings = Settings.of(tmp_path / "config.yaml")
    assert settings.config == load("tiny")
    assert yaml.safe_load(settings.text) == values


def test_a_configuration_that_cannot_be_read_is_told_and_shown(tmp_path: Path) -> None:
    values = {"model": {"querys": 3, "architecture": "yolo"}, "data": {"train": LOGIN, "validation": [LOGIN]}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    head, settings = told(tmp_path)
    assert "Not a configuration that this release can read: 3 mistake(s) in config.yaml: " in head
    assert "model.querys: no such key. Did you mean model.queries?" in head
    assert "model.architecture: Input should be 'deformable_detr' or 'detr', got 'yolo'" in head
    assert "DETR (" not in head
    assert "querys: 3" in settings
    assert "example.com" in head + settings
    assert "secret" not in head + settings


@pytest.mark.parametrize(
    "text", ["", "3", "[1]", "model: 3\ntrain: [1]\noptim: x\n", "1: 2", "a: !!timestamp 2026-01-01"]
)
def test_what_is_no_configuration_is_no_obstacle(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert "Not a configuration that this release can read: " in told(tmp_path)[0]


def test_few_of_many_mistakes_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({f"key{number}": 1 for number in range(1000)}))
    fault = Settings.of(tmp_path / "config.yaml").fault
    assert fault.startswith("1000 mistake(s) in config.yaml: key0: no such key.; ")
    assert fault.count("no such key") == MISTAKES
    assert fault.endswith("; and more")
