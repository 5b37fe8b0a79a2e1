"""The command line as a user meets it: help, messages and exit statuses of the real `ddetr` process."""

import importlib.metadata
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from ddetr.core.config import load
from ddetr.launch import cli
from ddetr.launch.arguments import normalised_arguments
from ddetr.launch.train import check_beforehand
from typer.testing import CliRunner

from tests.processes import finished

DDETR = Path(sys.executable).with_name("ddetr")
COMMANDS = [
    ["data", "pack"],
    ["data", "check"],
    ["data", "synth"],
    ["data", "show"],
    ["train"],
    ["config"],
    ["model"],
    ["eval"],
    ["predict"],
    ["explain"],
    ["tune"],
    ["checkpoint", "inspect"],
    ["checkpoint", "export"],
    ["report"],
    ["doctor"],
]


def ddetr(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [DDETR, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False
    )


def assert_one_message(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    """Exit status 2, one message on stderr that holds all parts, no traceback."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.lstrip().startswith("ddetr: "), result.stderr
    assert "Traceback" not in result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.integration
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str]) -> None:
    result = ddetr(*command, "--help")
    assert result.returncode == 0
    assert "Usage: ddetr " + " ".join(command) in result.stdout


@pytest.mark.integration
def test_help_lists_every_command() -> None:
    listed = ddetr("--help").stdout
    for command in COMMANDS:
        assert f" {command[0]} " in listed


@pytest.mark.integration
def test_version() -> None:
    assert ddetr("--version").stdout.strip() == f"ddetr {importlib.metadata.version('ddetr')}"


@pytest.mark.integration
def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ["torch", "deepspeed", "ray", "timm", "webdataset", "numpy", "matplotlib", "prometheus_client", "pydantic"]
    script = f"import sys, ddetr.launch.cli; print(*[name for name in {heavy!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.integration
def test_a_misspelt_key_is_answered_with_the_near_one() -> None:
    assert_one_message(ddetr("train", "tiny", "train.bach_size=4"), "train.bach_size", "Did you mean train.batch_size?")


@pytest.mark.integration
def test_every_mistake_is_listed_at_once() -> None:
    result = ddetr("train", "tiny", "model.querys=4", "train.epochs=-1", "optim.learning_rate=fast")
    assert_one_message(result, "3 mistake(s)", "model.queries", "train.epochs", "optim.learning_rate")


@pytest.mark.integration
def test_a_misspelt_preset_is_answered_with_the_near_one() -> None:
    assert_one_message(ddetr("train", "tinny"), "tinny", "Did you mean tiny?", "r50_two_stage")


@pytest.mark.integration
def test_train_without_a_preset_says_what_to_name() -> None:
    assert_one_message(ddetr("train"), "name a preset", "--resume RUN_DIR")
    assert_one_message(ddetr("train", "train.epochs=1"), "name a preset")


def test_training_without_a_set_says_where_one_comes_from() -> None:
    with pytest.raises(
        ValueError, match=r"data.train is not set: give the folder of training shards that `ddetr data pa"
    ):
        check_beforehand(load("tiny"))


@pytest.mark.integration
def test_an_output_where_nothing_can_be_made_is_refused(synthetic_shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    words = ["train", "tiny", f"data.train={synthetic_shards}", "train.batch_size=4", f"train.output={tmp_path}/file"]
    result = finished(*words, "model.pretrained_backbone=false", "--dry-run")
    reason = f"train.output={tmp_path}/file: the run cannot be kept there: {tmp_path}/file is not a folder"
    assert_one_message(result, reason, "set train.output to another folder")


@pytest.mark.integration
def test_resume_refuses_a_preset_and_a_folder_that_is_no_run(tmp_path: Path) -> None:
    assert_one_message(ddetr("train", "tiny", "--resume", tmp_path), "leave out tiny")
    assert_one_message(ddetr("train", "--resume", tmp_path), str(tmp_path), "config.yaml")


@pytest.mark.integration
def test_auto_resume_needs_a_name() -> None:
    assert_one_message(ddetr("train", "tiny", "train.auto_resume=true"), "train.name=NAME")


@pytest.mark.integration
def test_an_unknown_option_exits_2_with_the_near_one() -> None:
    result = ddetr("eval", "somewhere", "--outputt", "x")
    assert result.returncode == 2
    assert "--output" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.integration
def test_missing_files_are_one_message(tmp_path: Path) -> None:
    absent = tmp_path / "absent"
    commands = (
        ["data", "pack", absent, tmp_path, tmp_path / "out"],
        ["data", "check", absent],
        ["data", "show", absent, tmp_path / "out.png"],
        ["eval", absent],
        ["predict", absent, absent],
        ["explain", absent, absent],
        ["tune", absent],
        ["checkpoint", "inspect", absent],
        ["checkpoint", "export", absent, tmp_path / "out"],
        ["report", absent],
    )
    for command in commands:
        assert_one_message(finished(*command, folder=tmp_path), str(absent))
    assert list(tmp_path.iterdir()) == [], "a failed command left something behind"


@pytest.mark.integration
def test_traceback_on_request_wherever_it_stands() -> None:
    for arguments in (["--traceback", "train", "tinny"], ["train", "tinny", "--traceback"]):
        result = ddetr(*arguments)
        assert result.returncode == 2
        assert "Traceback (most recent call last)" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("ddetr: ") or "Did you mean tiny?" in result.stderr


@pytest.mark.integration
def test_synth_pack_check_show(tmp_path: Path) -> None:
    coco, shards, picture = tmp_path / "coco", tmp_path / "shards", tmp_path / "samples.png"
    assert finished("data", "synth", coco, "--images", "8", "--size", "64", "--seed", "3").returncode == 0
    assert finished("data", "check", coco / "annotations.json", coco / "images").returncode == 0
    packed = finished("data", "pack", coco / "annotations.json", coco / "images", shards, "--workers", "1")
    assert packed.returncode == 0, packed.stderr
    assert (shards / "index.json").is_file()
    assert finished("data", "check", shards).returncode == 0
    shown = finished("data", "show", shards, picture, "--count", "4", "data.flip_probability=1.0")
    assert shown.returncode == 0, shown.stderr
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.integration
def test_check_of_broken_data_exits_1(tmp_path: Path) -> None:
    coco = tmp_path / "coco"
    finished("data", "synth", coco, "--images", "4", "--size", "64")
    victim = sorted((coco / "images").iterdir())[0]
    victim.unlink()
    result = finished("data", "check", coco / "annotations.json", coco / "images")
    assert result.returncode == 1
    assert victim.name in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["eval", "RUN", "--ray"], ["eval", "RUN", "--ray", "local"]),
        (["eval", "RUN", "--ray", "10.0.0.1:6379"], ["eval", "RUN", "--ray", "10.0.0.1:6379"]),
        (["eval", "RUN", "--ray", "ray://head:10001"], ["eval", "RUN", "--ray", "ray://head:10001"]),
        (["eval", "RUN", "--ray", "[::1]:6379"], ["eval", "RUN", "--ray", "[::1]:6379"]),
        (["eval", "--ray", "auto", "RUN"], ["eval", "--ray", "auto", "RUN"]),
        (["eval", "--ray", "RUN"], ["eval", "--ray", "local", "RUN"]),
        (["eval", "RUN", "--ray", "eval.top_k=3"], ["eval", "RUN", "--ray", "local", "eval.top_k=3"]),
        (["eval", "RUN", "--ray=auto", "--all"], ["eval", "RUN", "--ray=auto", "--all"]),
        (["predict", "RUN", "--", "--ray"], ["predict", "RUN", "--", "--ray"]),
        (["train", "tiny", "--traceback"], ["--traceback", "train", "tiny"]),
    ],
)
def test_the_address_of_ray_is_optional(given: list[str], wanted: list[str]) -> None:
    assert normalised_arguments(given) == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["predict", "run", "eval.top_k=3"], "name at least one image"),
        (["data", "pack", "set", "images", "out", "more"], "3 folders after set: needs at most two, IMAGES and OUT"),
    ],
)
def test_too_few_or_too_many_arguments_are_said(words: list[str], message: str) -> None:
    assert str(CliRunner().invoke(cli.app, words).exception) == message


@pytest.mark.parametrize(("healthy", "status"), [(True, 0), (False, 1)])
def test_the_doctor_ends_with_1_where_something_is_broken(healthy: bool, status: int, monkeypatch) -> None:
    monkeypatch.setattr("ddetr.launch.doctor.doctor", lambda: healthy)
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == status


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (
            ModuleNotFoundError("No module named 'timm'", name="timm"),
            2,
            "ddetr: timm is not installed; `ddetr doctor` lis",
        ),
        (ImportError("needs the extra: pip install"), 2, "ddetr: needs the extra: pip install"),
        (ImportError("cannot import name", name="ddetr.core"), None, ""),
    ],
)
def test_how_the_command_ends(error: BaseException, status: int | None, said: str, monkeypatch, capsys) -> None:
    def fail(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(sys, "argv", ["ddetr", "eval"])
    monkeypatch.setattr(logging.lastResort, "formatter", None)  # as it was, after the test
    with pytest.raises(BaseException) as ended:  # noqa: PT011
        cli.main()
    if status is None:
        assert ended.value is error, "a defect of ours keeps its traceback"
    else:
        assert isinstance(ended.value, SystemExit)
        assert ended.value.code == status
    assert capsys.readouterr().err.startswith(said)
