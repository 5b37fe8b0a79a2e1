"""Presets and files on each other: the last wins, setting by setting; bases, their chains, circles and strangers."""

import os
from pathlib import Path

import pytest
from ddetr.core.config import ConfigError, dump, load, parse, preset_names
from ddetr.core.layers import came_with_weights, layers, preset_summary
from ddetr.core.ownership import ForeignSettingError

pytestmark = pytest.mark.usefixtures("new_account")


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_file_stands_on_its_base(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "base: r50_two_stage\nmodel: {queries: 100}\noptim: {drop_epochs: [20]}\n")
    assert load(mine) == load("r50_two_stage", ["model.queries=100", "optim.drop_epochs=[20]"])


def test_a_base_is_looked_for_beside_the_file_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "shared/lowest.yaml", "base: tiny\ntrain: {epochs: 7, seed: 1}\n")
    write(tmp_path / "shared/middle.yaml", "base: lowest.yaml\ntrain: {seed: 2}\nmodel: {queries: 9}\n")
    write(tmp_path / "top.yaml", f"base: {tmp_path}/shared/middle.yaml\ntrain: {{batch_size: 4}}\n")
    write(tmp_path / "elsewhere/lowest.yaml", "train: {epochs: 99}\n")
    monkeypatch.chdir(tmp_path / "elsewhere")
    expected = load("tiny", ["train.epochs=7", "train.seed=2", "model.queries=9", "train.batch_size=4"])
    assert load("../top.yaml") == expected
    assert [str(layer) for layer in layers("../top.yaml")] == [
        "tiny",
        f"{tmp_path}/shared/lowest.yaml",
        f"{tmp_path}/shared/middle.yaml",
        "../top.yaml",
    ]


def test_of_several_the_last_wins_and_overrides_win_over_all(tmp_path: Path) -> None:
    one = write(tmp_path / "one.yaml", "model: {queries: 1, points: 1}\ntrain: {deepspeed_extra: {a: 1}}\n")
    two = write(tmp_path / "two.yaml", "model: {queries: 2}\ntrain: {deepspeed_extra: {b: 2}}\n")
    config = load(["r50_refine", one, two], ["train.epochs=3"])
    assert (config.model.queries, config.model.points, config.model.box_refine) == (2, 1, True)
    assert config.train.deepspeed_extra == {"b": 2}, "a setting is replaced, not mixed"
    assert config.train.epochs == 3
    assert load([two, one]).model.queries == 1


def test_mistakes_name_all_that_was_laid_on_each_other(tmp_path: Path) -> None:
    lowest = write(tmp_path / "lowest.yaml", "base: tiny\nmodel: 3\n")
    mine = write(tmp_path / "mine.yaml", "base: lowest.yaml\nmodel: {queries: 3}\ntrain: {epoch: 3}\n")
    with pytest.raises(ConfigError) as refusal:
        load(mine)
    first, *lines = str(refusal.value).splitlines()
    assert first == f"2 mistake(s) in tiny + {lowest} + {mine}:"
    assert any(line.startswith("  model: ") and "got 3" in line for line in lines), "what lies above hides no mistake"
    assert "  train.epoch: no such key. Did you mean train.epochs?" in lines


@pytest.mark.parametrize("names", [["a"], ["a", "b"], ["a", "b", "c"]])
def test_a_circle_is_refused_with_its_files(names: list[str], tmp_path: Path) -> None:
    for name, following in zip(names, [*names[1:], names[0]], strict=True):
        write(tmp_path / f"{name}.yaml", f"base: ./{following}.yaml\n")
    with pytest.raises(ConfigError, match="round in a circle") as refusal:
        load(tmp_path / "a.yaml")
    chain = str(refusal.value).partition("circle: ")[2].partition(";")[0].split(" -> ")
    assert [Path(part).stem for part in chain] == [*names, "a"]


@pytest.mark.parametrize(
    ("base", "said"),
    [
        (
            "r50_two_stag",
            "mine.yaml: base: r50_two_stag: no such preset or file beside mine.yaml. Did you mean r50_two",
        ),
        ("absent.yaml", "mine.yaml: base: absent.yaml: no such preset or file beside mine.yaml. Presets: detr_r50,"),
        ("3", "mine.yaml: base: expected the name of a preset or of a file, got 3"),
        ("null", "mine.yaml: base: expected the name of a preset or of a file, got None"),
        ("[tiny, r50]", "mine.yaml: base: expected the name of a preset or of a file, got ['tiny', 'r50']"),
    ],
)
def test_a_base_that_is_none_is_said(base: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(write(tmp_path / "mine.yaml", f"base: {base}\n"))
    assert said in str(refusal.value)


def test_a_setting_without_a_value_is_not_taken_for_a_file() -> None:
    with pytest.raises(ConfigError, match=r"train\.epochs: no such preset or file\. A setting is written section.key="):
        load(["tiny", "train.epochs"])
    with pytest.raises(ConfigError, match=r"train\.yaml: no such preset or file\. Presets"):
        load("train.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "expected sections .* got nothing: it is empty"),
        ("# model:\n", "got nothing: it is empty"),
        ("- a\n", "got list"),
        ("model:\n", r"model: expected settings \(key: value\), got nothing; take the line out"),
        ("model: [1]\n", r"model: expected settings \(key: value\), got \[1\]"),
        ("model: {1: 2}\n", "expected a text for a key; put quotes around it"),
        ("Base: tiny\n", r"Base: no such key\. Did you mean base\?"),
        ("model: {base: tiny}\n", r"model\.base: no such key\. base stands beside the sections"),
        ("model: {queries: 9}\nmodel: {dropout: 0.2}\n", "the key model stands twice, in lines 1 and 2"),
        ("train: {epochs: 1:30}\n", r"1:30 \(line 1\) is octal or sexagesimal in YAML"),
        ("# " + "x" * (1 << 20), "it is longer than 1 MiB"),
    ],
)
def test_a_file_that_says_nothing_or_something_twice_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yaml", text)
    with pytest.raises(ConfigError, match=said):
        load(["tiny", file])


def test_what_is_no_file_is_named_as_what_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, said in ((tmp_path, "a folder, where"), (tmp_path / "pipe", "a pipe or a device"), ("", "an empty name")):
        with pytest.raises(ConfigError, match=said):
            load(["tiny", name])
    with pytest.raises(ConfigError, match=r"mine\.yaml: base: : an empty name"):
        load(write(tmp_path / "mine.yaml", "base: ''\n"))


def test_many_bases_are_bounded(tmp_path: Path) -> None:
    for number in range(200):
        write(tmp_path / f"{number}.yaml", f"base: {number + 1}.yaml\n" if number < 199 else "base: tiny\n")
    assert load(tmp_path / "150.yaml") == load("tiny")
    with pytest.raises(ConfigError, match=r"0\.yaml: more than 100 bases"):
        load(tmp_path / "0.yaml")


ORDER = "data: {train: 'pipe:touch executed; cat {}'}\n"


def test_what_comes_with_a_run_has_no_base(tmp_path: Path) -> None:
    theirs = write(tmp_path / "run/config.yaml", "base: tiny\n")
    assert load(theirs)
    write(tmp_path / "run/metrics.jsonl", "")
    for overrides in ([], ["train.seed=1"]):
        with pytest.raises(
            ForeignSettingError, match=r"run/config.yaml came with weights or a run and is based on tiny"
        ):
            load(theirs, overrides)
    with pytest.raises(ForeignSettingError):
        load(write(tmp_path / "mine.yaml", "base: run/config.yaml\n"))
    with pytest.raises(ForeignSettingError):
        load(theirs, acts=())
    with pytest.raises(ForeignSettingError):
        load(write(tmp_path / "other/config.yaml", "base: tiny\n"), of_run=True)
    with pytest.raises(ConfigError, match="names a base"):
        parse("base: tiny\n", "weights")


def test_orders_of_a_strangers_layer_count_only_where_the_user_gives_them(tmp_path: Path) -> None:
    """Whatever lies on what."""
    theirs = write(tmp_path / "run/config.yaml", ORDER + "train: {output: /elsewhere}\n")
    write(tmp_path / "run/metrics.jsonl", "")
    mine = write(tmp_path / "mine.yaml", "base: run/config.yaml\ntrain: {output: /mine}\n")
    for names in (mine, ["tiny", theirs], [theirs, "tiny"]):
        with pytest.raises(
            ForeignSettingError, match=r"(?s)run/config.yaml comes with.*data.train=pipe:touch executed"
        ):
            load(names)
    with pytest.raises(ForeignSettingError) as refusal:
        load(mine)
    assert "train.output" not in str(refusal.value), "the user's own file sets it"
    own = write(tmp_path / "own.yaml", "data: {train: s3://bucket/train}\ntrain: {output: /mine}\n")
    assert load([theirs, own]).data.train == "s3://bucket/train"
    with pytest.raises(ForeignSettingError, match="pipe:touch"):
        load([own, theirs])
    assert load([own, theirs], ["data.train=shards", "train.output=x"]).data.train == "shards"
    assert load([own, theirs], acts=()).train.output == "/elsewhere"


def test_links_hide_nobody(tmp_path: Path) -> None:
    """A link to a link in a run directory, to a folder in it, and descriptors that were opened by name."""
    evil = write(tmp_path / "evil/x.yaml", ORDER)
    run = write(tmp_path / "run/metrics.jsonl", "").parent
    (run / "config.yaml").symlink_to(evil)
    (run / "conf").symlink_to(evil.parent)
    (tmp_path / "to_file.yaml").symlink_to(run / "config.yaml")
    (tmp_path / "again.yaml").symlink_to("to_file.yaml")
    (tmp_path / "to_folder").symlink_to("run/conf")
    assert load(evil).data.train, "it lies in no run"
    names = [run / "config.yaml", tmp_path / "to_file.yaml", tmp_path / "again.yaml", tmp_path / "to_folder/x.yaml"]
    folder = os.open(run, os.O_RDONLY)
    names += [Path(f"/proc/self/fd/{folder}/config.yaml"), Path(f"/dev/fd/{folder}/config.yaml")]
    with write(run / "plain.yaml", ORDER).open() as plain:
        for name in [*names, Path(f"/proc/self/fd/{plain.fileno()}")]:
            with pytest.raises(ForeignSettingError, match="pipe:touch"):
                load(name)
    os.close(folder)
    handed_over = os.memfd_create(f"..{run}/config.yaml")  # a name that looks like a place in a run
    os.write(handed_over, ORDER.encode())
    assert load(Path(f"/proc/self/fd/{handed_over}")).data.train, "the program that started this one wrote it"
    os.close(handed_over)
    (tmp_path / "round").symlink_to("round")
    assert not came_with_weights(tmp_path / "round")
    with pytest.raises(ConfigError, match="no such preset or file"):
        load(tmp_path / "round")


def test_the_orders_of_each_strangers_file_are_told(tmp_path: Path) -> None:
    write(tmp_path / "run/metrics.jsonl", "")
    theirs = write(tmp_path / "run/a.yaml", ORDER), write(tmp_path / "run/b.yaml", "train: {output: /elsewhere}\n")
    with pytest.raises(ForeignSettingError, match=r"(?s)a\.yaml comes.*pipe:touch.*b\.yaml comes.*/elsewhere"):
        load(["tiny", *theirs])


def test_a_strangers_name_does_not_say_which_run_goes_on(tmp_path: Path) -> None:
    write(tmp_path / "run/metrics.jsonl", "")
    theirs = write(tmp_path / "run/config.yaml", "train: {name: mine}\n")
    assert load(theirs).train.name == "mine"
    with pytest.raises(ForeignSettingError, match=r"train\.name=mine  \(says which run of yours"):
        load(theirs, ["train.auto_resume=true"])
    assert load(theirs, ["train.auto_resume=true", "train.name=mine"]).train.auto_resume


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pipe:cat \\u202e x; cat {}", "signs that are not drawn, are not shown here"),
        ("https://host/x?...", "give them yourself"),  # as weights have it: another place than the run had
    ],
)
def test_what_would_name_something_else_is_not_offered_for_repetition(
    source: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "run/metrics.jsonl", "")
    theirs = write(tmp_path / "run/config.yaml", f'data: {{train: "{source}"}}\n')
    with pytest.raises(ForeignSettingError, match=message) as refusal:
        load(theirs)
    assert "add to the command" not in str(refusal.value)


def test_presets_say_what_they_are_and_leave_the_number_of_classes_to_the_shards() -> None:
    for name in preset_names():
        assert 20 < len(preset_summary(name)) < 160, name
        assert "num_classes" not in dump(load(name))
