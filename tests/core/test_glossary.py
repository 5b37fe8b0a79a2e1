"""Every setting says what it means, numbers with their unit; the page of all settings is what the code says."""

import importlib
import re
from pathlib import Path

import pytest
from ddetr.core.config import Config
from ddetr.core.glossary import entries, found, section_meaning, section_names

DOCS = Path(__file__).resolve().parents[2] / "docs"
ALL = [entry for section in section_names() for entry in entries(section)]


def test_all_settings_are_there() -> None:
    values = Config().model_dump(mode="json")
    assert [entry.key for entry in ALL] == [f"{section}.{key}" for section in values for key in values[section]]
    assert all(section_meaning(section).endswith(".") for section in section_names())


@pytest.mark.parametrize("entry", ALL, ids=lambda entry: entry.key)
def test_every_setting_has_a_meaning_and_a_number_its_unit(entry) -> None:
    """In words of its own: more than its name repeated."""
    own = set(re.findall(r"[a-z]+", entry.key.lower()))
    assert len(set(re.findall(r"[A-Za-z]{2,}", entry.meaning)) - own) >= 2, entry.meaning
    assert not entry.meaning.endswith(".")
    assert entry.is_number == bool(entry.unit), "a number counts or measures something, and nothing else does"
    for ending, unit in (("_seconds", "seconds"), ("_bytes", "bytes"), ("_steps", "step"), ("_epochs", "epochs")):
        if entry.key.endswith(ending) and entry.unit:
            assert unit in entry.unit


@pytest.mark.parametrize(
    ("key", "kind", "unit", "default"),
    [
        ("model.heads", "whole number, 1 to 1024", "heads per attention layer", "8"),
        ("model.dropout", "number, at least 0, below 1", "probability", "0.1"),
        ("model.classification", "sigmoid or softmax", None, "sigmoid"),
        ("data.crop_sizes", "list of 2 whole numbers, 1 to 16384 each", "pixels", "[384, 600]"),
        ("data.train", "text, or null", None, "null"),
        ("optim.betas", "list of 2 numbers, at least 0 each, below 1 each", "decay factor per step", "[0.9, 0.999]"),
        ("train.zero_stage", "0, 1, 2 or 3", None, "1"),
        ("train.max_steps", "whole number, at least 1, or null", "optimizer steps", "null"),
        ("train.compile", "true or false", None, "false"),
        ("train.deepspeed_extra", "mapping", None, "{}"),
    ],
)
def test_types_bounds_and_defaults_are_those_declared(key: str, kind: str, unit: str | None, default: str) -> None:
    (entry,) = found(key)
    assert (entry.kind, entry.unit, entry.default) == (kind, unit, default)


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("gradient accumulation", "train.accumulation"),
        ("mixed precision", "train.precision"),
        ("EMA of the weights", "train.ema_decay"),
        ("gradient clipping", "optim.clip_norm"),
        ("data loader workers", "data.workers"),
        ("learning-rate warm-up", "optim.warmup_steps"),
    ],
)
def test_a_setting_is_found_by_the_word_of_the_field(word: str, key: str) -> None:
    assert word in found(key)[0].meaning


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("optim.clip_nrom", "Did you mean optim.clip_norm?"),
        ("clip_norm", "Did you mean optim.clip_norm?"),
        ("clip_nrom", "Did you mean optim.clip_norm?"),
        ("optim.batch_size", "Did you mean train.batch_size or eval.batch_size?"),
        ("hyperparameters.clip_nrom", "Did you mean optim.clip_norm?"),
        ("optm", "Did you mean optim?"),
        ("", "Sections: model, data, optim, train, eval, monitor"),
        ("x\x1b[31m", "no such setting"),
    ],
)
def test_a_misspelt_setting_is_answered_with_the_near_one(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=re.escape(hint)):
        found(name)


def test_the_page_of_settings_is_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run `python docs/write_settings.py` after a change of a setting."""
    monkeypatch.syspath_prepend(str(DOCS))
    page = importlib.import_module("write_settings").page()
    assert (DOCS / "settings.md").read_text() == page
    for entry in ALL:
        (row,) = [line for line in page.splitlines() if line.startswith(f"| `{entry.key}` |")]
        assert row.replace(r"\|", "").count("|") == 5
        assert entry.meaning in row
