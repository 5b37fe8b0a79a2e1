"""Presets, overrides, and the one error that lists every mistake."""

import pickle
from pathlib import Path

import pytest
from ddetr.core import config
from ddetr.core.config import Config, ConfigError
from ddetr.core.overrides import written
from ddetr.launch.placement import from_anywhere


@pytest.mark.parametrize("preset", config.preset_names())
def test_every_preset_survives_a_round_trip(preset: str, tmp_path: Path) -> None:
    loaded = config.load(preset)
    (tmp_path / "written.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "written.yaml") == loaded


def test_r50_has_the_published_hyperparameters() -> None:
    """Section 4 and appendix A.4 of the paper; the released arguments where the paper is silent."""
    published = config.load("r50")
    model, optim, train = published.model, published.optim, published.train
    assert (model.hidden_dim, model.heads, model.levels, model.points) == (256, 8, 4, 4)
    assert (model.encoder_layers, model.decoder_layers, model.feedforward_dim, model.queries) == (6, 6, 1024, 300)
    assert (optim.learning_rate, optim.weight_decay, optim.betas, optim.clip_norm) == (2e-4, 1e-4, (0.9, 0.999), 0.1)
    assert (optim.backbone_multiplier, optim.sampling_multiplier, optim.drop_epochs) == (0.1, 0.1, (40,))
    assert (optim.class_weight, optim.l1_weight, optim.giou_weight) == (2.0, 5.0, 2.0)
    assert (train.epochs, train.batch_size, published.data.long_side) == (50, 32, 1333)
    assert published.data.short_sides == tuple(range(480, 801, 32))


def test_one_error_lists_every_mistake_with_a_suggestion() -> None:
    with pytest.raises(ConfigError) as raised:
        config.load(
            "tiny", ["model.querys=3", "train.zero_stage=7", "optim.batch_size=3", "nonsense", "modle.queries=1"]
        )
    message = str(raised.value)
    assert message.startswith("5 mistake(s) in tiny:")
    assert "model.querys: no such key. Did you mean model.queries?" in message
    assert "optim.batch_size: no such key. Did you mean train.batch_size?" in message
    assert "modle: no such key. Did you mean model?" in message
    assert "train.zero_stage: " in message
    assert "got 7" in message
    assert "'nonsense': an override is written section.key=value" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model.hidden_dim=100", "hidden_dim must be a multiple of heads and of 32 .*; nearest: 96 and 128"),
        ("model.heads=5", "got 256 with heads=5; nearest: 160 and 320"),
        ("model.levels=2", "levels must be 1"),
        ("model.architecture=detr", "architecture=detr has levels=1 and neither"),
        ("model.classification=softmax", "classification=softmax is DETR's; .* has classification=sigmoid"),
        (
            "model.levels=1 model.multi_scale_attention=false",
            "multi_scale_attention=false is for several levels, got l",
        ),
        ("model.backbone_norm=group", "no pretrained weights; set pretrained_backbone=false"),
        ("train.new_class_head=true", "new_class_head needs initial_weights"),
        ("model.two_stage=true", "two_stage needs box_refine=true"),
        ("train.accumulation=3", "train.batch_size must be a multiple of train.accumulation, .*; nearest: 30 and 33"),
        ("data.short_sides=[]", "short_sides must hold 1 to 1000 sizes"),
    ],
)
def test_values_that_do_not_fit_together(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        config.load("r50", overrides.split())


NO_FOLDERS = [
    ".",
    "..",
    "a/b",
    "../a",
    "/a",
    "a/",
    "a\\b",
    "-a",
    "--resume",
    ".a",
    " a",
    "a ",
    "a" * 201,
    "é" * 101,
]
NO_FOLDERS += ["a\nb", "a\tb", "a\x00b", "a\x1b[31m", "a\u202eb"]


@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_name_is_one_folder(name: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.name: expected the name of one folder"):
        config.load("tiny", [written("train.name", name)])


@pytest.mark.parametrize("name", ["r50", "2026.11-run_3", "a b", "$(touch a); 'b' & c", "x=1", "é" * 100, "日本"])
def test_other_names_stay_as_they_are(name: str) -> None:
    assert config.load("tiny", [written("train.name", name)]).train.name == name


EMPTY = [
    f"{section}.{name}"
    for section, model in config.Config.model_fields.items()
    for name, field in model.annotation.model_fields.items()
    if field.annotation is str or "Location" in str(field.annotation) or field.annotation == (str | None)
]


@pytest.mark.parametrize("key", EMPTY)
@pytest.mark.parametrize("blank", ["", "''", '" "'])
def test_an_empty_text_is_a_variable_that_was_not_set(key: str, blank: str) -> None:
    assert {"data.train", "train.initial_weights", "monitor.host", "model.backbone"} <= set(EMPTY)
    with pytest.raises(ConfigError, match=rf"{key}: expected a value, got an empty text; leave the setting out"):
        config.load("tiny", [f"{key}={blank}"])


def test_every_mistake_is_told_at_once_also_what_does_not_fit_together() -> None:
    def told(*overrides: str) -> list[str]:
        with pytest.raises(ConfigError) as refusal:
            config.load("r50", overrides)
        return [line.strip() for line in str(refusal.value).splitlines()[1:]]

    several = told("eval.batch_size=10000", "model.levels=2", "model.dilation=true", "train.accumulation=3")
    assert [line.partition(" ")[0] for line in several] == ["model:", "model:", "eval.batch_size:", "config:"]
    several = told("data.crop_sizes=[600,384]", "data.short_sides=[]", "data.flip_probability=2", "model.head=3")
    assert sorted(line.partition(" ")[0] for line in several) == [
        "data.flip_probability:",
        "data:",
        "data:",
        "model.head:",
    ]
    # Of a setting that is wrong by itself nothing else is known.
    assert [line.partition(":")[0] for line in told("model.heads=x", "model.hidden_dim=100")] == ["model.heads"]
    assert [line.partition(":")[0] for line in told("train.batch_size=x", "train.accumulation=3")] == [
        "train.batch_size"
    ]


def test_logins_are_in_no_mistake(tmp_path: Path) -> None:
    address = "https://me:secret@host/x?token=secret"
    file = tmp_path / "mine.yaml"
    file.write_text("base: tiny\n")
    for overrides in (
        [f"data-train={address}"],
        [f"model.queries={address}"],
        [f"train.name={address}"],
        ["model.queries=pipe:curl me:secret@host/{}"],
    ):
        with pytest.raises(ConfigError, match="host/") as refusal:
            config.load(file, overrides)
        assert "secret" not in str(refusal.value), overrides
    for value in (f"['{address}']", f"{{url: '{address}'}}"):
        file.write_text(f"base: tiny\ndata: {{train: {value}}}\n")
        with pytest.raises(ConfigError, match="host/x") as refusal:
            config.load(file)
        assert "secret" not in str(refusal.value), value
    with pytest.raises(ConfigError, match="host/x") as refusal:
        config.load(address)
    assert "secret" not in str(refusal.value)
    shown = config.dump(config.load("tiny", [f"data.train={address.replace('https', 'HTTPS')}"]), for_others=True)
    assert "HTTPS://host/x" in shown
    assert "secret" not in shown


def test_a_switch_is_no_number(tmp_path: Path) -> None:
    """Python takes true for 1."""
    file = tmp_path / "mine.yaml"
    file.write_text("train: {zero_stage: on, batch_size: yes, box: 1}\nmodel: {two_stage: on, box_refine: true}")
    with pytest.raises(ConfigError) as refusal:
        config.load(file, ["optim.clip_norm=no", "train.max_steps=true"])
    assert sorted(line.strip() for line in str(refusal.value).splitlines()[1:]) == [
        "optim.clip_norm: expected a number, got false",
        "train.batch_size: expected a number, got true",
        "train.box: no such key.",
        "train.max_steps: expected a number, got true",
        "train.zero_stage: expected a number, got true",
    ]


def test_numbers_are_finite() -> None:
    given = ["optim.learning_rate=.inf", "optim.betas=[.nan,0.999]", "data.fetch_timeout_seconds=.inf"]
    with pytest.raises(ConfigError) as refusal:
        config.load("tiny", given)
    assert str(refusal.value).count("finite number") == len(given)


def test_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean r50_refine"):
        config.load("r50_refin")


def test_file_that_is_not_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected sections"):
        config.load(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("model: {")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(tmp_path / "broken.yaml")


def test_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().train.epochs = 3  # type: ignore[misc]


def test_the_number_of_classes_is_the_training_sets_unless_somebody_gave_it(tmp_path: Path) -> None:
    """It stays open through all that makes one configuration out of another."""
    open_ = config.load("r50", ["model.queries=7"])
    (tmp_path / "written.yaml").write_text(config.dump(open_))
    for same in (
        open_,
        config.changed(open_, ["train.seed=3"], "here"),
        config.load(tmp_path / "written.yaml"),
        config.parse(config.dump(open_, for_others=True), "here"),
        from_anywhere(open_, tmp_path),
        pickle.loads(pickle.dumps(open_)),
    ):
        assert same.model.num_classes == 80
        assert not config.gives_classes(same)
        resolved = config.with_classes(same, 12)
        assert (resolved.model.num_classes, resolved.model.queries) == (12, 7)
        assert config.gives_classes(resolved)
        assert config.with_classes(resolved, 13) is resolved
        assert "num_classes: 12" in config.dump(resolved)


@pytest.mark.parametrize("number", [80, 12])
def test_a_number_of_classes_that_was_given_stays(number: int, tmp_path: Path) -> None:
    """Also when it is the default."""
    (tmp_path / "mine.yaml").write_text(f"base: r50\nmodel: {{num_classes: {number}}}\n")
    (tmp_path / "mine2.yaml").write_text("base: mine.yaml\n")
    for given in (
        config.load("r50", [f"model.num_classes={number}"]),
        config.load(tmp_path / "mine.yaml"),
        config.load([tmp_path / "mine2.yaml", "r50_refine"]),
        config.parse(config.dump(config.load(tmp_path / "mine.yaml")), "here"),
        from_anywhere(config.load(tmp_path / "mine.yaml"), tmp_path),
    ):
        assert config.with_classes(given, 3) is given
        assert given.model.num_classes == number


def test_lists_stand_in_one_line() -> None:
    assert "\n  betas: [0.9, 0.999]\n" in config.dump(config.load("r50"))
