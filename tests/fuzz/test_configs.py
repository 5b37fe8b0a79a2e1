"""Configurations, overrides and sweeps of a stranger: every mistake in one list, or what was written."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ddetr.core.config import Config, ConfigError, dump, load, parse
from ddetr.core.config import changed as with_overrides
from ddetr.launch.sweep import Sweep, read_sweep
from hypothesis import strategies as st

from tests.core.runs import SMALL
from tests.fuzz.strategies import DAMAGES, LEAVES, NASTY, WILD, Effort, changed, damaged, outcome, watched


def as_yaml(values: Any) -> bytes:
    return yaml.safe_dump(values, sort_keys=False).encode(errors="surrogatepass")


def without_secrets(config: Config) -> Config:
    return parse(dump(config), "again")


def assert_config_is_sound(config: Config) -> None:
    assert without_secrets(config) == config
    assert with_overrides(config, [], "again") == config


def test_a_configuration_is_what_its_file_says_or_refused(effort: Effort, tmp_path: Path) -> None:
    values = {"base": "r50", **load("tiny").model_dump(mode="json")}
    good = b"base: r50\n" + dump(load("tiny")).encode()
    file = tmp_path / "run.yaml"

    def holds(data: bytes, overrides: list[str]) -> None:
        file.write_bytes(data)
        with watched():
            config = outcome(lambda: load(file, overrides), file, lines=True)
        if config is None:
            return
        assert_config_is_sound(config)
        said = yaml.safe_load(data)
        said.pop("base", None)
        for section, keys in said.items() if not overrides else ():
            for key, value in (keys or {}).items():
                read = getattr(getattr(config, section), key)
                # A whole number of more digits than a float64 has is rounded, as one with a decimal point is.
                numbers = type(read) is float or (isinstance(value, str) and type(read) is int)
                assert (type(read)(value) if numbers else value) == (list(read) if isinstance(read, tuple) else read)
                assert not (isinstance(value, bool) and not isinstance(read, bool))

    texts = changed(values).map(as_yaml) | DAMAGES.map(lambda damage: damaged(good, damage))
    effort(holds, texts, st.just([]))


def keys(values: dict[str, Any]) -> list[str]:
    return [f"{section}.{key}" for section, settings in values.items() for key in settings]


def test_overrides_are_read_as_typed_or_refused(effort: Effort) -> None:
    base = load("tiny")
    names = [*keys(base.model_dump(mode="json")), "train.deepspeed_extra.a.b", "train", "nothing.at.all", "", "."]

    def holds(overrides: list[str]) -> None:
        with watched():
            config = outcome(
                lambda: with_overrides(base, overrides, "the command line"), "the command line", lines=True
            )
        if config is not None:
            assert_config_is_sound(config)

    values = st.one_of(
        WILD.map(lambda value: yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()),
        st.sampled_from(NASTY),
        st.text(max_size=12),
        DAMAGES.map(lambda damage: damaged(b"[1, {a: 'b'}]", damage).decode(errors="surrogateescape")),
    )
    override = st.tuples(st.sampled_from(names), st.sampled_from(["=", "=", "=", "", " = "]), values).map("".join)
    effort(holds, st.lists(override, min_size=1, max_size=3))


SWEEP = {
    "base": "base.yaml",
    "overrides": ["train.epochs=12", "optim.clip_norm=0.2"],
    "metric": "AP",
    "mode": "max",
    "samples": 20,
    "concurrent": 4,
    "cpus_per_trial": 2,
    "gpus_per_trial": 0,
    "search": {
        "optim.learning_rate": {"loguniform": [1.0e-5, 1.0e-3]},
        "optim.clip_norm": {"uniform": [0.05, 0.5]},
        "optim.warmup_steps": {"integer": [2, 6]},
        "optim.betas": {"choice": [[0.9, 0.99], [0.8, 0.9]]},
    },
    "scheduler": {"asha": {"grace_epochs": 1, "reduction_factor": 3}},
    "seed": 0,
    "output": "runs/sweep",
}


def test_a_sweep_is_what_its_file_says_or_refused(
    effort: Effort, synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = [*SMALL, f"data.train={synthetic_shards}", f"data.validation={synthetic_shards}", "model.num_classes=3"]
    own += ["train.evaluate_every_epochs=1", "model.pretrained_backbone=false"]
    (tmp_path / "base.yaml").write_text(dump(load("tiny", own)))
    file = tmp_path / "sweep.yaml"
    good = as_yaml(SWEEP)
    file.write_bytes(good)
    assert read_sweep(file)[0].samples == 20

    def holds(data: bytes) -> None:
        file.write_bytes(data)
        with watched():
            found = outcome(lambda: read_sweep(file), file, "base.yaml", lines=True)
        if found is None:
            return
        sweep, base = found
        said = yaml.safe_load(data)
        assert sweep == Sweep.model_validate(said)
        for name in ("samples", "concurrent", "cpus_per_trial", "gpus_per_trial", "seed"):
            read = getattr(sweep, name)
            assert name not in said or (type(read)(said[name]) == read and type(said[name]) is not bool)
        for key, distribution in sweep.search.items():
            for value in distribution.extremes():
                section, name = key.split(".", 1)
                assert name.split(".")[0] in getattr(base, section).model_fields, value

    texts = changed(SWEEP, values=WILD | LEAVES).map(as_yaml) | DAMAGES.map(lambda damage: damaged(good, damage))
    effort(holds, texts)


def test_a_long_value_is_cut_in_its_line() -> None:
    with pytest.raises(ConfigError) as refusal:
        with_overrides(load("tiny"), [f"model.architecture=1{'0' * 5000}"], "here")
    assert max(map(len, str(refusal.value).split("\n"))) < 1300


def test_a_key_that_is_several_lines_makes_one(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text('model:\n  "a\\n  train.forged": 1\n')
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path / "run.yaml")
    first, *more = str(refusal.value).split("\n")
    assert first == f"1 mistake(s) in {tmp_path}/run.yaml:"
    assert more == [r"  model.a\n  train.forged: no such key."]


def test_broken_yaml_is_one_line_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("model:\n  queries: [1, 2\ntrain: {}\n")
    with pytest.raises(ConfigError, match=r"run.yaml: not valid YAML: expected ',' or '\]'.* \(line 3, column 6\)$"):
        load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_bytes(b"a: \0")
    assert outcome(lambda: load(tmp_path / "run.yaml"), tmp_path / "run.yaml") is None


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "a\nb"])
def test_a_name_that_no_file_has_is_no_preset(name: str) -> None:
    assert outcome(lambda: load(name)) is None
    with pytest.raises(ConfigError, match="no such preset or file"):
        load(name)


@pytest.mark.parametrize(
    "change",
    [
        {"samples": True},
        {"seed": False},
        {"scheduler": {"asha": {"grace_epochs": True}}},
        {"search": {"optim.clip_norm": {"uniform": [False, True]}}},
    ],
    ids=str,
)
def test_a_switch_is_no_number_of_a_sweep(change: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_bytes(as_yaml({**SWEEP, **change}))
    with pytest.raises(ConfigError, match=r"(samples|seed|grace_epochs|uniform): expected no (true|false) here"):
        read_sweep(tmp_path / "sweep.yaml")


def test_mistakes_in_the_base_of_a_sweep_name_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_bytes(as_yaml({**SWEEP, "base": "tiny", "overrides": ["model.querys=1"]}))
    with pytest.raises(ConfigError, match=r"sweep\.yaml, its base and overrides: 1 mistake"):
        read_sweep(tmp_path / "sweep.yaml")
