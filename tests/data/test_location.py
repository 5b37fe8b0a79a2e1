"""A location is its text wherever it is read from or written to, and knows what it is."""

import json
import pickle
from pathlib import Path

import pytest
import yaml
from ddetr.core.config import Config, dump, load, parse
from ddetr.core.overrides import read, written
from ddetr.core.ownership import orders
from ddetr.data.config import DataConfig
from ddetr.data.location import Location

LOGIN = "https://me:secret@host/set?token=secret"


@pytest.mark.parametrize(
    ("text", "remote", "shown"),
    [
        ("shards/train", False, "shards/train"),
        ("~/shards", False, "~/shards"),
        ("http:/host", False, "http:/host"),
        ("s3://bucket/set", True, "s3://bucket/set"),
        (LOGIN, True, "https://host/set?..."),
        ("pipe:curl http://me:secret@host/{}", True, "pipe:curl http://host/{}"),
        ("shards\x1b[31m", False, r"shards\x1b[31m"),
    ],
)
def test_what_a_location_is_and_how_it_is_shown(text: str, remote: bool, shown: str) -> None:
    location = Location(text)
    assert (location, location.is_remote, location.shown) == (text, remote, shown)


def test_a_path_is_a_location() -> None:
    assert Location(Path("shards/train")) == "shards/train"


def test_a_location_is_plain_text_in_yaml_json_and_pickles() -> None:
    config = load("tiny", [f"data.train={LOGIN}", "train.output=123", "data.validation=null"])
    assert isinstance(config.data.train, Location)
    assert (config.train.output, config.data.validation) == ("123", None)
    assert yaml.safe_load(dump(config))["data"]["train"] == LOGIN
    assert parse(dump(config), "its own dump") == config
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert type(json.loads(json.dumps(config.model_dump()))["data"]["train"]) is str
    assert {type(value) for value in orders(config).values()} <= {str, int, bool}
    sent = pickle.loads(pickle.dumps(config))
    assert sent == config
    assert isinstance(sent.data.train, Location)


def test_an_override_of_a_location_is_text_as_typed() -> None:
    for typed in ("123", "[x", "on", "a: b"):
        path, value = read(f"data.train={typed}", Config)
        assert (path, value) == (["data", "train"], typed)
        assert read(written("data.train", Location(typed)), Config) == (path, typed)
    assert read("data.cache=null", Config)[1] == "null"
    assert read("data.train=null", Config)[1] is None


def test_what_is_no_text_is_no_location() -> None:
    for value in (5, ["a"], True):
        with pytest.raises(ValueError, match=r"cache\n  Input should be a valid string"):
            DataConfig.model_validate({"cache": value})
