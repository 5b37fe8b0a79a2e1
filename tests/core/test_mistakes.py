"""Mistakes in values for any model: where each is, and the nearest key."""

import pytest
from ddetr.core.mistakes import LONGEST_MISTAKE, described, listed
from pydantic import BaseModel, ConfigDict, ValidationError


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Bird(Strict):
    wings: int = 2


class Nest(Strict):
    eggs: int = 3
    bird: Bird | None = None


class Tree(Strict):
    nest: Nest = Nest()
    by_name: dict[str, Bird] = {}
    notes: dict[str, str] = {}
    height: int = 9


def lines(values: object, *, as_paths: bool = False) -> list[str]:
    with pytest.raises(ValidationError) as raised:
        Tree.model_validate(values)
    return described(raised.value, Tree, as_paths=as_paths)


@pytest.mark.parametrize(
    ("values", "key", "path"),
    [
        ({"hight": 3}, "height", "height"),
        ({"nest": {"egs": 3}}, "eggs", "nest.eggs"),
        ({"nest": {"bird": {"wing": 1}}}, "wings", "nest.bird.wings"),
        ({"by_name": {"a.b": {"wing": 1}}}, "wings", "by_name.a.b.wings"),
    ],
)
def test_a_misspelt_key_is_answered_with_the_near_one_at_its_place(values: dict, key: str, path: str) -> None:
    (of_key,), (of_path,) = lines(values), lines(values, as_paths=True)
    assert of_key.endswith(f": no such key. Did you mean {key}?")
    assert of_path.endswith(f": no such key. Did you mean {path}?")


def test_a_key_of_another_section_is_suggested_as_a_path() -> None:
    assert lines({"eggs": 3}, as_paths=True) == ["eggs: no such key. Did you mean nest.eggs?"]
    assert lines({"eggs": 3}) == ["eggs: no such key."]


def test_every_mistake_is_one_short_line() -> None:
    found = lines({"height": "x\ny" + "z" * 5000, "nest": {"eggs": 1.5}, "notes": {"a": 1}})
    assert [line.partition(":")[0] for line in found] == ["nest.eggs", "notes.a", "height"]
    assert all("\n" not in line and len(line) <= LONGEST_MISTAKE + 3 for line in found)
    assert lines(3) == ["tree: expected settings (key: value), got 3"]


def test_what_has_lines_keeps_them_set_in() -> None:
    assert str(listed("tree.yaml", ["one", "two\nmore"])) == "2 mistake(s) in tree.yaml:\n  one\n  two\n    more"
