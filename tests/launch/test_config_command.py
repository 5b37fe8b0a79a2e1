"""`ddetr config`: what it prints is read back; it explains and compares, and nothing in a file is an order to it."""

from pathlib import Path
from typing import Any

import pytest
from ddetr.core.config import changed, dump, load, preset_names
from ddetr.launch.cli import app
from typer.testing import CliRunner


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def ddetr(*arguments: str | Path, status: int = 0) -> str:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.output
    return result.output


def refusal(*arguments: str | Path) -> str:
    """What the command line prints before it exits with 2."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert isinstance(result.exception, ValueError | OSError), result.output
    return str(result.exception)


def test_alone_it_lists_the_presets_with_what_they_are() -> None:
    lines = ddetr("config").splitlines()
    for name in preset_names():
        (line,) = [line for line in lines if line.startswith(f"{name} ")]
        assert "DETR" in line or "demo" in line
    assert max(map(len, lines)) <= 80


def test_what_is_printed_is_read_back(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: tiny\ndata: {train: shards/a b, short_sides: [64, 96]}\n")
    for arguments in (["r50"], ["r50_two_stage", mine, "train.epochs=3"], [mine, "model.num_classes=7"]):
        file = tmp_path / "printed.yaml"
        file.write_text(ddetr("config", *arguments))
        names, overrides = [a for a in arguments if "=" not in str(a)], [a for a in arguments if "=" in str(a)]
        printed = load(file)
        assert printed == load(names, map(str, overrides))
        assert dump(printed) == dump(load(names, map(str, overrides))), "the number of classes is as open as it was"


def test_a_number_of_classes_that_is_open_is_said() -> None:
    assert "# model.num_classes: as many as the training set has (80 without one)" in ddetr("config", "r50")
    assert "num_classes: 5" in ddetr("config", "r50", "model.num_classes=5")


def test_logins_and_escape_sequences_are_not_shown(tmp_path: Path) -> None:
    given = ["data.train=https://me:secret@host/x?token=secret", 'train.deepspeed_extra.a="[red]\\e[31m"']
    shown = ddetr("config", "tiny", *given)
    shown += ddetr("config", "tiny", *given, "--explain", "data.train")
    shown += ddetr("config", "tiny", *given, "--explain", "train.deepspeed_extra")
    (tmp_path / "a.yaml").write_text(dump(load("tiny", given)))
    (tmp_path / "b.yaml").write_text(dump(load("tiny", [given[0].replace("me:", "you:"), given[1]])))
    shown += ddetr("config", "--diff", tmp_path / "a.yaml", tmp_path / "b.yaml", status=1)
    assert "(with another login or query)" in shown
    assert "https://host/x?..." in shown
    assert "# data.train: the login or query of its address is left out here" in shown
    assert "[red]" in shown
    assert "secret" not in shown
    assert "\x1b" not in shown


def test_a_setting_is_explained_with_its_value() -> None:
    told = ddetr("config", "--explain", "optim.clip_norm")
    for part in ("gradient clipping", "number, at least 0", "L2 norm", "default  0.1"):
        assert part in told
    assert "here" not in told
    assert "here     0.5" in ddetr("config", "tiny", "optim.clip_norm=0.5", "--explain", "optim.clip_norm")
    section = ddetr("config", "--explain", "monitor").splitlines()
    assert [line for line in section if line[:1].strip()] == ["monitor.enabled", "monitor.host", "monitor.port"]
    assert "Did you mean optim.clip_norm?" in refusal("config", "--explain", "clip_nrom")


def test_differences_are_a_line_each(tmp_path: Path) -> None:
    lines = ddetr("config", "--diff", "r50", "r50_two_stage", status=1).splitlines()
    assert [line.split() for line in lines] == [
        ["setting", "r50", "r50_two_stage"],
        ["model.box_refine", "false", "true"],
        ["model.two_stage", "false", "true"],
    ]
    (tmp_path / "same.yaml").write_text("base: r50\n")
    assert "no setting differs" in ddetr("config", "--diff", "r50", tmp_path / "same.yaml")
    for value in ("true", "1", "{b: [true]}", "{b: [1]}"):
        dumped = dump(load("r50", [f"train.deepspeed_extra.a={value}"]))
        (tmp_path / f"{value}.yaml").write_text(dumped)
    lines = ddetr("config", "--diff", tmp_path / "true.yaml", tmp_path / "1.yaml", status=1).splitlines()
    assert lines[1].split() == ["train.deepspeed_extra", "{a:", "true}", "{a:", "1}"]
    ddetr("config", "--diff", tmp_path / "{b: [true]}.yaml", tmp_path / "{b: [1]}.yaml", status=1)
    long = tmp_path / f"{'a' * 40}.yaml"
    long.write_text(f"base: r50\ntrain: {{output: {'b' * 40}, name: {'c' * 40}}}\n")
    lines = ddetr("config", "--diff", long, "r50", status=1).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["train.output", "b" * 40, "runs"],
        ["train.name", "c" * 40, "null"],
    ]
    stored = load("tiny", ["train.name=theirs", "data.train=pipe:touch executed", "model.num_classes=80"])
    run = tmp_path / "theirs"
    run.mkdir()
    (run / "metrics.jsonl").touch()
    (run / "config.yaml").write_text(dump(stored))
    lines = ddetr("config", "--diff", "tiny", run, status=1).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["model.num_classes", "data.train", "train.name"]
    assert "pipe:touch executed" in ddetr("config", run), "shown, and not carried out"


@pytest.mark.parametrize("columns", ["0", "2", "20"])
def test_however_narrow_the_terminal(columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert "r50_two_stage" in ddetr("config")
    assert "gradient" in ddetr("config", "--explain", "optim.clip_norm")
    assert "queries: 300" in ddetr("config", "r50")


def test_mistakes_are_one_message(tmp_path: Path) -> None:
    assert "takes nothing else" in refusal("config", "r50", "--diff", "r50", "tiny")
    assert "holds no config.yaml" in refusal("config", tmp_path)
    assert "name a preset" in refusal("config", "train.epochs=3")
    assert "an empty name" in refusal("config", "")
    assert "name a preset" in refusal("model", "train.epochs=3")
    assert "Did you mean r50?" in refusal("config", "--diff", "r50", "r51")
    assert "Did you mean model.queries?" in refusal("config", "r50", "model.querys=3")
    assert "presets and files stand before the settings" in refusal("train", "tiny", "train.epochs=3", "r50")


@pytest.mark.parametrize("command", ["train", "train --dry-run", "train --continues", "train --ray", "model", "config"])
def test_every_command_takes_presets_and_files_on_each_other(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the command does with it."""
    taken: list[Any] = []
    for module, name in (("train", "run"), ("ranks", "train_on_ray"), ("model", "model")):
        monkeypatch.setattr(f"ddetr.launch.{module}.{name}", lambda config, *_, **__: taken.append(config))
    monkeypatch.setattr("ddetr.launch.config.dump", lambda config, **_: taken.append(config) or "")
    (tmp_path / "mine.yaml").write_text("base: tiny\nmodel: {queries: 9}\ntrain: {name: mine, auto_resume: true}\n")
    expected = load("tiny", ["model.queries=9", "train.name=mine", "train.auto_resume=true", "train.epochs=5"])
    local = [*command.split(), *["local"] * ("--ray" in command)]
    output = ddetr(*local, "r50_refine", tmp_path / "mine.yaml", "train.epochs=5")
    if command == "train --continues":
        assert output == "true\n"
    else:
        assert taken == [changed(expected, [], "here")]


def test_data_commands_take_several_presets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    monkeypatch.setattr("ddetr.launch.data.show", lambda shards, output, count, config: taken.append(config))
    monkeypatch.setattr("ddetr.launch.statistics.stats", lambda shards, config, ranks: taken.append(config))
    (tmp_path / "mine.yaml").write_text("data: {crop: false}\n")
    files = ["--preset", "r50", "--preset", tmp_path / "mine.yaml"]
    ddetr("data", "show", "shards", "out.png", *files, "train.seed=1")
    ddetr("data", "stats", "shards", *files, "train.seed=1")
    ddetr("data", "show", "shards", "out.png")
    ddetr("data", "stats", "shards")
    own = load("r50", ["data.crop=false", "train.seed=1"])
    assert taken == [own, own, load("tiny"), load("r50")]
