"""Locations for a process that Ray starts on some node in some folder."""

from pathlib import Path
from typing import get_args

import pytest
from ddetr.core.config import Config, changed, load
from ddetr.data.location import Location
from ddetr.data.sources import source_of
from ddetr.launch.placement import from_anywhere


def output(location: str, name: str) -> bytes:
    return b"".join(source_of(location, 10).read(name, 0))


@pytest.mark.integration
def test_a_command_runs_where_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "it's {} $HOME"
    (here / "shards").mkdir(parents=True)
    (here / "shards/index.json").write_text("found")
    location = Location("pipe:cat shards/{} || false; true").from_anywhere(here)
    monkeypatch.chdir("/")
    assert output(location, "index.json") == b"found"
    assert location.from_anywhere(tmp_path) == location, "a run that goes on from another folder"


@pytest.mark.integration
def test_a_command_needs_no_such_folder(tmp_path: Path) -> None:
    assert output(Location("pipe:printf %s {}").from_anywhere(tmp_path / "absent"), "index.json") == b"index.json"


def test_paths_are_absolute_and_other_addresses_stay(tmp_path: Path) -> None:
    given = ["data.train=shards/train", "data.validation=s3://bucket/val", "train.output=../runs", "data.cache=~/cache"]
    given += ["train.initial_weights=/models/first.pth", "model.backbone=local-dir:models/own"]
    values = from_anywhere(load("tiny", given), tmp_path / "work").model_dump()
    assert values["data"]["train"] == f"{tmp_path}/work/shards/train"
    assert values["data"]["validation"] == "s3://bucket/val"
    assert values["data"]["cache"] == "~/cache"
    assert values["train"]["output"] == f"{tmp_path}/runs"
    assert values["train"]["initial_weights"] == "/models/first.pth"
    assert values["model"]["backbone"] == f"local-dir:{tmp_path}/work/models/own"


def test_every_setting_that_is_a_location_is_moved_and_no_other(tmp_path: Path) -> None:
    config, locations = load("tiny"), set()
    for section, field in Config.model_fields.items():
        for key, setting in field.annotation.model_fields.items():
            if Location in (setting.annotation, *get_args(setting.annotation)):
                locations.add(f"{section}.{key}")
    assert locations == {"data.train", "data.validation", "data.cache", "train.output", "train.initial_weights"}
    config = changed(config, [f"{setting}=some/{setting}" for setting in sorted(locations)], "the test")
    moved = [f"{setting}={tmp_path}/some/{setting}" for setting in sorted(locations)]
    assert from_anywhere(config, tmp_path) == changed(config, moved, "the test")
