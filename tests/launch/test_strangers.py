"""What came with a stranger's checkpoint or run directory is read, and not obeyed, by any command."""

import contextlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.checkpoint.weights import WEIGHTS, save_weights
from ddetr.core.config import changed, dump, load
from ddetr.core.ownership import ORDERS, ForeignSettingError, check_own, own_settings_file, remember

from tests.core.runs import SMALL
from tests.data.file_server import FileServer
from tests.launch.strangers import Stranger, everything, refusal, rewritten, run
from tests.processes import finished

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("new_account")]


@pytest.fixture
def server(run_directory: Path) -> Iterator[FileServer]:
    server = FileServer(run_directory.parent / "shards")
    yield server
    server.close()


def metrics_of(folder: Path) -> dict[str, float]:
    """Of the result in a folder, or beside the checkpoint of a run."""
    (file,) = folder.rglob("evaluation.json")
    return json.loads(file.read_text())["results"][-1]["metrics"]


def test_a_command_is_shown_not_run(run_directory: Path, stranger: Stranger, tmp_path: Path) -> None:
    shards, marker = run_directory.parent / "shards", tmp_path / "executed"
    order = f"data.validation=pipe:touch {marker}; cat {shards}/{{}}"
    folder = stranger(order)
    said = refusal(run("eval", folder))
    assert f"{folder}/checkpoints/step_00000020/{WEIGHTS} comes with 1 setting(s)" in said
    assert order in said
    assert not marker.exists()
    (repeat,) = re.findall(r"add to the command: (.*)\n", said)
    assert run("eval", folder, *shlex.split(repeat)).exception is None
    assert marker.exists()


def test_the_ways_to_allow_it_work(run_directory: Path, stranger: Stranger, server: FileServer, tmp_path: Path) -> None:
    shards = run_directory.parent / "shards"
    assert run("eval", run_directory, "--output", tmp_path / "expected").exception is None
    folder, cache = stranger(f"data.validation={server.url}"), f"data.cache={tmp_path}/cache"
    assert server.url in refusal(run("eval", folder, cache))
    assert not server.requests
    ways: list[list[str]] = [
        ["--data", server.url, cache],
        ["--data", f"pipe:cat {shards}/{{}}", cache],
        [f"data.validation={server.url}", cache],
        ["--data", str(shards)],
        ["--data", os.path.relpath(shards)],
    ]
    for number, way in enumerate(ways):
        output = tmp_path / str(number)
        result = run("eval", folder, *way, "--output", output)
        assert result.exception is None, (way, result.exception)
        assert metrics_of(output) == metrics_of(tmp_path / "expected")


def test_folders_of_shards_are_only_read(run_directory: Path, stranger: Stranger, tmp_path: Path) -> None:
    shards = Path(shutil.copytree(run_directory.parent / "shards", tmp_path / "shards"))
    before = {path: path.stat() for path in (shards, *shards.iterdir())}
    folder = stranger(f"data.validation={os.path.relpath(shards)}", f"data.cache={tmp_path}/cache", "monitor.port=1")
    result = run("eval", folder)
    assert result.exception is None, result.exception
    assert {path: path.stat().st_mtime_ns for path in (shards, *shards.iterdir())} == {
        path: stat.st_mtime_ns for path, stat in before.items()
    }
    assert not (tmp_path / "cache").exists()


def test_a_cache_folder_is_not_taken_over(stranger: Stranger, server: FileServer, tmp_path: Path) -> None:
    folder = stranger(f"data.cache={tmp_path}/theirs")
    assert f"data.cache={tmp_path}/theirs" in refusal(run("eval", folder, "--data", server.url))
    assert not (tmp_path / "theirs").exists()
    assert not server.requests


@pytest.mark.parametrize(
    "command",
    [
        "eval {folder}",
        "predict {folder} {image}",
        "explain {folder} {image}",
        "checkpoint export {folder} {folder}/new.safetensors",
        "train --resume {folder}",
        "train {folder}/config.yaml",
        "model {folder}/config.yaml",
    ],
)
def test_a_backbone_from_a_hub_is_not_fetched(
    command: str, stranger: Stranger, run_directory: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    folder = stranger("model.backbone=hf-hub:someone/backbone")
    image = next((run_directory.parent / "coco/images").iterdir())
    said = refusal(run(*command.format(folder=folder, image=image).split()))
    assert "model.backbone=hf-hub:someone/backbone" in said
    assert not server.requests


def test_inspect_shows_all_and_acts_on_nothing(
    stranger: Stranger, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
    result = run("checkpoint", "inspect", stranger(*orders(), f"data.train={server.url}"))
    assert result.exception is None
    for value in ("hf-hub:someone/backbone", server.url, "host: 0.0.0.0", "output_path: /home"):
        assert value in result.output
    assert not server.requests


HOSTILE = {
    "model.backbone": "hf-hub:someone/backbone",
    "data.train": "pipe:touch executed; cat shards/{}",
    "data.validation": "https://somewhere.example/shards",
    "data.cache": "/home",
    "data.cache_bytes": 1,
    "data.most_pixels": 2_000_000_000,
    "train.initial_weights": "https://somewhere.example/weights",
    "train.output": "/home",
    "train.name": "theirs",
    "train.auto_resume": True,
    "train.deepspeed_extra": {"tensorboard": {"enabled": True, "output_path": "/home"}},
    "eval.ray": "somewhere.example:6379",
    "monitor.host": "0.0.0.0",
    "monitor.port": 22,
}


def orders() -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in HOSTILE.items()]


def test_each_order_has_its_case() -> None:
    assert set(HOSTILE) == set(ORDERS)


@pytest.mark.parametrize("command", ["train --resume {folder}", "train {folder}/config.yaml", "tune {sweep}"])
def test_settings_of_a_run_are_refused_together(command: str, stranger: Stranger, tmp_path: Path) -> None:
    folder = stranger(*orders())
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: {folder}/config.yaml\nsamples: 1\nsearch: {{optim.clip_norm: {{uniform: [0.1, 0.2]}}}}\n")
    before = everything(tmp_path)
    said = refusal(run(*command.format(folder=folder, sweep=sweep).split()))
    moved = (
        {"train.output", "train.name", "train.auto_resume"} if "--resume" in command else set()
    )  # a run goes on where it is
    for key in {*ORDERS} - moved:
        assert f"\n  {key}=" in said
    assert not any(f"\n  {key}=" in said for key in moved)
    assert everything(tmp_path) == before


def test_each_order_alone_is_refused(stranger: Stranger, tmp_path: Path) -> None:
    """A name is one where a run of that name goes on."""
    name = f"train.name={HOSTILE['train.name']}"
    each = [order for order in orders() if not order.startswith("train.name=")]
    for order in each:
        folder = stranger(name, order)
        number = 2 if order.startswith("train.auto_resume=") else 1
        with pytest.raises(ForeignSettingError, match=rf"(?s){number} setting.*\n  {order.partition('=')[0]}="):
            load(folder / "config.yaml")
        assert load(folder / "config.yaml", [name, order])
        shutil.move(folder / "config.yaml", tmp_path / "my_own.yaml")
        assert load(tmp_path / "my_own.yaml")
        shutil.rmtree(folder)


def test_files_beside_weights_came_with_them(run_directory: Path, tmp_path: Path) -> None:
    shutil.copy(run_directory / "checkpoints/step_00000020" / WEIGHTS, tmp_path)
    (tmp_path / "recipe.yaml").write_text("data: {train: 'pipe:touch executed; cat {}'}\n")
    said = refusal(run("train", tmp_path / "recipe.yaml"))
    assert "data.train=pipe:touch executed; cat {}" in said
    sweep = "base: tiny\noverrides: ['data.train=pipe:touch executed; cat {}']\nsamples: 1\n"
    (tmp_path / "sweep.yaml").write_text(f"{sweep}search: {{optim.clip_norm: {{uniform: [0.1, 0.2]}}}}\n")
    assert "data.train=pipe:touch executed; cat {}" in refusal(run("tune", tmp_path / "sweep.yaml"))


@pytest.mark.parametrize("key", [*ORDERS, "train.deepspeed_extra.tensorboard.output_path"])
def test_a_search_that_came_with_weights_gives_no_orders(key: str, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").touch()
    sweep = tmp_path / "sweep.yaml"
    sweep.write_text(f"base: tiny\nsamples: 1\nsearch: {{{key}: {{choice: [1]}}}}\n")
    assert f"{sweep} came with weights, and sets {key}: copy it" in refusal(run("tune", sweep))
    sweep.write_text("base: tiny\nsamples: 1\noutput: /home\nsearch: {optim.clip_norm: {choice: [1]}}\n")
    assert "sets output" in refusal(run("tune", sweep))


def test_a_run_is_known_through_links_and_from_below(tmp_path: Path) -> None:
    (tmp_path / "run/a/b/c/d").mkdir(parents=True)
    (tmp_path / "run/metrics.jsonl").touch()
    (tmp_path / "run/a/b/c/d/real.yaml").write_text("data: {train: 'pipe:touch executed; cat {}'}\n")
    (tmp_path / "run/config.yaml").symlink_to("a/b/c/d/real.yaml")
    (tmp_path / "outside.yaml").symlink_to("run/config.yaml")
    for file in ("run/a/b/c/d/real.yaml", "run/config.yaml", "outside.yaml"):
        with pytest.raises(ForeignSettingError, match=r"data.train=pipe:touch executed"):
            load(tmp_path / file)


def test_what_is_resumed_is_a_run_however_it_looks(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text(f"data: {{train: 'pipe:touch {marker}; cat {{}}'}}\n")
    assert f"data.train=pipe:touch {marker}" in refusal(run("train", "--resume", tmp_path / "theirs"))
    assert not marker.exists()


def test_what_was_given_once_is_own(stranger: Stranger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = stranger(*orders())
    config = load(folder / "config.yaml", orders())
    remember(config)
    resumed = ["train.name=theirs", "train.auto_resume=true"]
    with pytest.raises(
        ForeignSettingError, match=r"(?s)2 setting\(s\) .*\n  train.name=theirs .*\n  train.auto_resume=true"
    ):  # of any other run, too
        load(folder / "config.yaml")
    assert load(folder / "config.yaml", resumed) == config
    assert own_settings_file().stat().st_mode & 0o777 == 0o600
    assert "touch" not in own_settings_file().read_text()
    (folder / "config.yaml").write_text(dump(changed(config, ["data.train=pipe:touch other; cat {}"], "a stranger")))
    with pytest.raises(ForeignSettingError, match=r"1 setting\(s\) .*\n  data.train=pipe:touch other"):
        load(folder / "config.yaml", resumed)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"half a line", None])
def test_what_is_remembered_stops_nobody(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged file, a folder in its place: then nothing is remembered."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    own_settings_file().parent.mkdir()
    if content is None:
        own_settings_file().mkdir()
    else:
        own_settings_file().write_bytes(content)
    own = load("tiny", ["data.train=s3://bucket/train"])
    remember(own)
    with pytest.raises(ForeignSettingError) if content is None else contextlib.nullcontext():
        check_own(own, ["data.train"], (), "a file")


def test_a_home_that_cannot_be_written_to_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    remember(load("tiny", ["data.train=s3://bucket/train"]))
    assert "--resume and eval of it will ask for data.train again" in caplog.text
    caplog.clear()
    remember(load("tiny"))
    assert not caplog.text


@pytest.mark.slow
def test_a_run_on_a_server_is_resumed_by_who_started_it(
    synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word more; another account has to say where the data is."""
    server = FileServer(synthetic_shards)
    arguments = [*SMALL, f"data.train={server.url}", f"data.cache={tmp_path}/cache", f"train.output={tmp_path}"]
    try:
        finished("train", "tiny", *arguments, "train.name=run", "train.max_steps=2").check_returncode()
        resume = ("train", "--resume", tmp_path / "run")
        finished(*resume, "train.max_steps=3").check_returncode()
        other = {"XDG_STATE_HOME": str(tmp_path / "other")}
        refused = finished(*resume, "train.max_steps=4", environment=other)
        assert refused.returncode == 2
        assert f"  data.train={server.url}" in refused.stderr
        (repeat,) = re.findall(r"add to the command: (.*)\n", refused.stderr)
        finished(*resume, "train.max_steps=4", *shlex.split(repeat), environment=other).check_returncode()
    finally:
        server.close()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "step"] == [1, 2, 3, 4]


def test_an_address_with_a_login_is_that_of_the_own_run(
    run_directory: Path, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights hold it without, the run's config.yaml as it is."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    address = f"{server.url.replace('http://', 'http://me:secret@')}?token=secret"
    settings = [f"data.validation={address}", f"data.cache={tmp_path}/cache"]
    config = changed(load_detector(run_directory).config, settings, "mine")
    folder = rewritten(run_directory, tmp_path / "run", config=dump(config, for_others=True))
    (folder / "config.yaml").write_text(dump(config))
    assert "data.validation" in refusal(run("eval", folder))
    assert not server.requests
    remember(config)
    assert run("eval", folder).exception is None
    assert server.requests


def test_logins_stay_with_the_run(run_directory: Path, tmp_path: Path) -> None:
    """Neither in what is printed nor in weights, which are handed on; config.yaml needs them to go on."""
    secret = "https://me:secret@somewhere.example/shards?token=secret"
    config = changed(load_detector(run_directory).config, [f"data.validation={secret}"], "mine")
    assert secret in dump(config)
    assert "secret" not in dump(config, for_others=True)
    assert "https://somewhere.example/shards" in dump(config, for_others=True)
    save_weights(tmp_path / WEIGHTS, {}, config, load_detector(run_directory).categories, 1, 1)
    assert b"secret" not in (tmp_path / WEIGHTS).read_bytes()
    folder = rewritten(run_directory, tmp_path / "run", config=dump(config))
    for command in (["checkpoint", "inspect", folder], ["eval", folder], ["report", folder]):
        result = run(*command)
        assert "secret" not in result.output + str(result.exception)
    said = refusal(run("eval", folder))
    assert "data.validation=https://somewhere.example/shards?..." in said
    assert "not shown here: give them yourself" in said
    assert "add to the command" not in said
    assert "somewhere.example" in (folder / "report.html").read_text()
    assert "secret" not in (folder / "report.html").read_text()
