"""Overrides: text as it was typed, YAML elsewhere, every mistake in its line; and what is written is read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ddetr.core.config import Config, ConfigError, changed, load
from ddetr.core.overrides import read, written
from ddetr.core.training.engine import deepspeed_config
from ddetr.launch.sweep import Sweep
from ddetr.launch.trials import _shown
from hypothesis import given, settings
from hypothesis import strategies as st

AS_TYPED = ["123", "1e5", "2026-11-29", "12:30", "on", "no", "true", "nulls", "~x", "-1", "=", "<<", "|", "[x", "{x"]
AS_TYPED += ["@x", "!x", "&x", "*x", "%x", "x: y", "x #y", "- x", "'a'b'", 'say "x"', "x\\d"]


@pytest.mark.parametrize("text", AS_TYPED)
def test_text_is_what_was_typed(text: str) -> None:
    config = changed(Config(), [f"train.output={text}", f"train.initial_weights={text}"], "here")
    assert (config.train.output, config.train.initial_weights) == (text, text)


@pytest.mark.parametrize(
    ("typed", "value"),
    [
        ('"123"', "123"),  # quotes around the whole are YAML's
        ("'it''s'", "it's"),
        (r'"a\tb"', "a\tb"),
        ("'null'", "null"),
        ("' x '", " x "),
        (" x ", "x"),
        ("null", None),
        ("~", None),
        ("", ""),
    ],
)
def test_quotes_blanks_and_none(typed: str, value: str | None) -> None:
    assert read(f"data.train={typed}", Config) == (["data", "train"], value)


def test_a_text_that_cannot_be_none_and_a_choice() -> None:
    assert changed(Config(), ["train.output=null"], "here").train.output == "null"
    with pytest.raises(ConfigError, match="'fp32', 'bf16' or 'fp16', got 'on'"):
        changed(Config(), ["train.precision=on"], "here")


def test_what_is_not_text_is_yaml() -> None:
    given = ["model.queries=0x10", "data.short_sides=[96, 128]", "data.crop=off", "train.deepspeed_extra.a.b=on"]
    config = changed(Config(), [*given, "train.deepspeed_extra.a.c='on'"], "here")
    assert (config.model.queries, config.data.short_sides, config.data.crop) == (16, (96, 128), False)
    assert config.train.deepspeed_extra == {"a": {"b": True, "c": "on"}}


BROKEN = ["[x", "@x", "x: y: z", "!!bool x", "!!timestamp x", "!!int ''", "!!no x", "2026-13-45", "\x00", "[" * 999]


def test_broken_yaml_is_one_more_line_of_the_mistakes() -> None:
    overrides = [f"model.queries={text}" for text in BROKEN] + [
        "train.nmae=[x",
        "train.zero_stage=7",
        'data.train="\\d"',
        "train.epochs.first=3",
    ]
    with pytest.raises(ConfigError) as raised:
        changed(Config(), overrides, "here")
    first, *lines = str(raised.value).splitlines()
    assert first == f"{len(overrides)} mistake(s) in here:"
    assert len(lines) == len(overrides)
    for line, override in zip(lines, overrides[: len(BROKEN)], strict=False):
        assert line.startswith(f"  {override!r}: ")
    assert any("expected ',' or ']'" in line for line in lines)
    assert any("train.nmae: no such key. Did you mean train.name?" in line for line in lines)
    assert any("unknown escape character" in line for line in lines)
    assert any("train.epochs.first: train.epochs is not a section" in line for line in lines)


@pytest.mark.parametrize("text", ["123", "2026-11-29", "on", "0x10"])
def test_a_file_keeps_the_types_of_yaml_and_the_message_says_so(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"train: {{name: {text}}}\n")
    with pytest.raises(ConfigError, match=r"train\.name: expected text, got .+, which is none in YAML without quotes"):
        load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(f"train: {{name: '{text}'}}\n")
    assert load(tmp_path / "run.yaml").train.name == text


@pytest.mark.parametrize("value", ["2026-11-29", "!!binary aGk=", ".nan"])
def test_free_form_values_are_json(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.deepspeed_extra: DeepSpeed reads JSON, which has no such value"):
        changed(Config(), [f"train.deepspeed_extra.x={value}"], "here")
    quoted = changed(Config(), [f"train.deepspeed_extra.x='{value}'"], "here")
    assert json.loads(json.dumps(deepspeed_config(quoted)))["x"] == value


PIECES = [*"'\" \t\n\r\\:#-[]{}@*&!%|>~nulNUL0123oyes=,?`.\x85\u2028\ufeff\xa0\x00\x1b\udcff"]
TEXT = st.text(st.one_of(st.sampled_from(PIECES), st.characters()), max_size=10)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)


def test_an_override_within_an_alias_leaves_the_other_place_alone(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny\ntrain: {deepspeed_extra: {a: &x {k: 1}, b: *x}}\n")
    extra = load(file, ["train.deepspeed_extra.a.k=2"]).train.deepspeed_extra
    assert extra == {"a": {"k": 2}, "b": {"k": 1}}


@pytest.mark.parametrize("levels", [40, 300, 3000])
def test_what_is_nested_too_deeply_is_refused(levels: int) -> None:
    with pytest.raises(ConfigError, match=r"train\.deepspeed_extra: it is nested more than 32 levels deep"):
        load("tiny", [f"train.deepspeed_extra{'.a' * levels}=1"])


@pytest.mark.parametrize("override", [".=3", ".epochs=3", "train.=3", "train..epochs=3", "=", "train"])
def test_an_override_names_section_and_key(override: str) -> None:
    with pytest.raises(ConfigError, match=r"an override is written section\.key=value"):
        load("tiny", [override])


@pytest.mark.parametrize("key", ["train.output", "train.name", "train.epochs", "train.deepspeed_extra.x"])
def test_bytes_that_are_no_text_are_a_mistake(key: str) -> None:
    with pytest.raises(ConfigError) as error:
        changed(Config(), [f"{key}=a\udcff"], "here")
    assert f"'{key}=a\\udcff': not text in UTF-8" in str(error.value)


@settings(deadline=None)
@given(TEXT)
def test_any_text_survives_being_written(text: str) -> None:
    for key in ("train.output", "data.train", "train.deepspeed_extra.a.b"):
        assert read(written(key, text), Config) == (key.split("."), text)
    assert yaml.safe_load(written("", text)[1:]) == text


@settings(deadline=None)
@given(VALUES)
def test_any_other_value_survives_being_written(value: Any) -> None:
    override = written("train.deepspeed_extra.a", value)
    assert read(override, Config)[1] == yaml.safe_load(override.partition("=")[2]) == value


@pytest.mark.parametrize(
    "address", ["https://me:secret@host/x", '"https://me:secret@host/x"', " https://me:secret@host/x"]
)
def test_results_of_a_sweep_show_no_login_however_it_was_typed(address: str) -> None:
    sweep = Sweep.model_validate(
        {
            "base": "tiny",
            "overrides": [f"data.train={address}"],
            "samples": 1,
            "search": {"model.queries": {"choice": [9]}},
        }
    )
    assert "secret" not in json.dumps(_shown(sweep))
    assert "host/x" in json.dumps(_shown(sweep))
