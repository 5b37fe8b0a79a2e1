"""Weights on disk: our safetensors, the published layout, and files that are neither."""

import argparse
import os
import shutil
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from ddetr.core.checkpoint import published as checkpoint
from ddetr.core.checkpoint.trained import load_detector, load_weights
from ddetr.core.checkpoint.weights import (
    WEIGHTS,
    checkpoints,
    find_checkpoint,
    read_newest,
    save_weights,
    step_directory,
)
from ddetr.core.config import Config, ModelConfig
from ddetr.core.model.detector import Detector, build
from ddetr.data.categories import Categories
from safetensors.torch import save_file

pytestmark = pytest.mark.integration

CATEGORIES = Categories(ids=(1, 23, 56), names=("disc", "triangle", "cross"))


DETR = {"architecture": "detr", "levels": 1, "classification": "softmax"}


def configuration(**changes: object) -> Config:
    values = {
        "backbone": "resnet18.tv_in1k",
        "pretrained_backbone": False,
        "hidden_dim": 64,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "feedforward_dim": 32,
        "queries": 7,
        "num_classes": 3,
    }
    return Config(model=ModelConfig.model_validate(values | changes))


def assert_same_state(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)


def assert_same_weights(one: Detector, other: Detector) -> None:
    assert_same_state(one.state_dict(), other.state_dict())


@pytest.fixture
def written(tmp_path: Path) -> tuple[Detector, Path]:
    """A run directory with two complete checkpoints and one that was being written when the run was killed."""
    model = build(configuration().model)
    for step in (5, 12):
        folder = step_directory(tmp_path, step)
        folder.mkdir(parents=True)
        save_weights(folder / WEIGHTS, model.state_dict(), configuration(), CATEGORIES, step=step, epochs=1)
    (tmp_path / "checkpoints/.step_00000019").mkdir()
    return model, tmp_path


def test_newest_complete_checkpoint_is_found_and_describes_itself(written: tuple[Detector, Path]) -> None:
    model, run_directory = written
    assert find_checkpoint(run_directory) == step_directory(run_directory, 12)
    for path in (run_directory, step_directory(run_directory, 12), step_directory(run_directory, 12) / WEIGHTS):
        detector = load_detector(path)
        assert (detector.step, detector.epochs, detector.categories) == (12, 1, CATEGORIES)
        assert detector.config == configuration()
        assert not detector.model.training
        assert_same_weights(detector.model, model)


def test_no_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint here; expected checkpoints/step_\*/model.safetensors"):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"box_refine": True},
        {"box_refine": True, "two_stage": True},
        {"levels": 1, "points": 2},
        {"levels": 1, "dilation": True, "backbone": "resnet50.tv_in1k"},
        DETR,
        DETR | {"dilation": True, "backbone": "resnet50.tv_in1k"},
        DETR | {"classification": "sigmoid", "heads": 4},
        {"multi_scale_attention": False, "heads": 4},
    ],
    ids=lambda variant: "-".join(variant) or "plain",
)
def test_published_layout_is_an_exact_inverse(variant: dict, tmp_path: Path) -> None:
    model = build(configuration(**variant).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_()
    published = checkpoint.to_published(model)
    checkpoint.export_published(model, tmp_path / "published.pth")
    again = build(configuration(**variant).model)
    load_weights(again, tmp_path / "published.pth")
    assert_same_weights(again, model)
    detector = load_detector(tmp_path / "published.pth")
    assert detector.categories is None
    assert detector.config.model == configuration(**variant).model
    assert_same_weights(detector.model, model)
    exported = checkpoint.to_published(detector.model)
    assert list(exported) == list(published)
    for name, tensor in published.items():
        torch.testing.assert_close(exported[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("variant", "present", "absent"),
    [
        ({}, ["class_embed.0.bias", "class_embed.1.bias", "bbox_embed.1.layers.2.bias"], ["transformer.decoder.class"]),
        (
            {"box_refine": True},
            ["bbox_embed.1.layers.0.weight", "transformer.decoder.bbox_embed.0.layers.0.weight"],
            ["class_embed.2", "transformer.decoder.class_embed"],
        ),
        (
            {"box_refine": True, "two_stage": True},
            ["class_embed.2.bias", "transformer.decoder.class_embed.2.weight", "transformer.pos_trans.weight"],
            ["class_embed.3", "query_embed"],
        ),
        (
            DETR,
            [
                "class_embed.bias",
                "transformer.decoder.norm.weight",
                "transformer.decoder.layers.1.multihead_attn.in_proj_bias",
            ],
            ["class_embed.0", "transformer.level_embed"],
        ),
    ],
)
def test_published_names(variant: dict, present: list[str], absent: list[str]) -> None:
    names = checkpoint.to_published(build(configuration(**variant).model))
    assert not {"backbone.0.body.layer1.0.conv1.weight", *present} - set(names)
    assert [name for name in names if name.startswith(tuple(absent))] == []


def test_published_file_with_its_arguments_loads(tmp_path: Path) -> None:
    """The released files hold an argparse.Namespace, an optimizer and batch counters beside the weights."""
    model = build(configuration().model)
    weights = checkpoint.to_published(model) | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}
    content = {"model": weights, "args": argparse.Namespace(lr=2e-4), "epoch": 49, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "released.pth")
    assert_same_weights(load_detector(tmp_path / "released.pth").model, model)


def test_released_detr_weights_without_arguments(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They hold nothing else, and no shape tells of dilation: the file's name does."""
    config = configuration(**DETR, backbone="resnet50.tv_in1k", dilation=True)
    torch.save({"model": checkpoint.to_published(build(config.model))}, tmp_path / "detr-r50-dc5-f0fb7ef5.pth")
    with caplog.at_level("WARNING", logger="ddetr"):
        assert load_detector(tmp_path / "detr-r50-dc5-f0fb7ef5.pth").config.model == config.model
    assert "with dilation (DC5)" in caplog.text
    (tmp_path / "detr-r50-dc5-f0fb7ef5.pth").rename(tmp_path / "other.pth")
    with caplog.at_level("WARNING", logger="ddetr"):
        assert not load_detector(tmp_path / "other.pth").config.model.dilation
    assert "without dilation (else dc5 is in its name)" in caplog.text


def test_another_architecture_is_listed_and_changes_nothing(tmp_path: Path) -> None:
    checkpoint.export_published(build(configuration().model), tmp_path / "published.pth")
    model = build(configuration(num_classes=5, box_refine=True).model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="holds another architecture") as raised:
        load_weights(model, tmp_path / "published.pth")
    assert "missing: class_embed.1.weight" in str(raised.value)
    assert "re-shaped: class_embed.0.weight is (3, 64) in the file, (5, 64) in the model" in str(raised.value)
    assert_same_state(model.state_dict(), before)


@pytest.mark.parametrize(
    "variant", [{}, {"box_refine": True, "two_stage": True}, DETR], ids=["plain", "two_stage", "detr"]
)
def test_class_heads_start_anew_only_when_asked(variant: dict, tmp_path: Path) -> None:
    checkpoint.export_published(build(configuration(**variant).model), tmp_path / "published.pth")
    model = build(configuration(**variant, num_classes=5).model)
    fresh = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"start the class heads anew with train\.new_class_head=true"):
        load_weights(model, tmp_path / "published.pth")
    assert_same_state(model.state_dict(), fresh)
    anew = load_weights(model, tmp_path / "published.pth", new_class_head=True)
    assert anew == [name for name in fresh if name.startswith("class_embed.")]
    loaded = load_detector(tmp_path / "published.pth").model.state_dict()
    assert_same_state(model.state_dict(), loaded | {name: fresh[name] for name in anew})


def wrapped(weights: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        (lambda good, other: good, None),
        (lambda good, other: {"state_dict": wrapped(good, "module."), "epoch": 3}, None),
        (lambda good, other: {"model": wrapped(good, "module._orig_mod.")}, None),
        (lambda good, other: {"model": other, "ema": {"module": good, "updates": 7}}, "'ema' is taken, not 'model'"),
        (lambda good, other: {"model": other, "model_ema": {"state_dict": good}}, "'model_ema' is taken, not 'model'"),
        (
            lambda good, other: {"model": good | {"label_enc.weight": torch.ones(3)}},
            "left out, no part of this detector",
        ),
    ],
    ids=["bare", "parallel", "compiled", "average", "another average", "foreign tensor"],
)
def test_files_of_other_programs(layout: Callable, said: str | None, tmp_path: Path) -> None:
    model, other = (build(configuration().model) for _ in range(2))
    torch.save(layout(checkpoint.to_published(model), checkpoint.to_published(other)), tmp_path / "theirs.pth")
    told: list[str] = []
    again = build(configuration().model)
    load_weights(again, tmp_path / "theirs.pth", tell=told.append)
    assert_same_weights(again, model)
    assert len(told) == (said is not None)
    assert said is None or said in told[0]
    assert_same_weights(load_detector(tmp_path / "theirs.pth").model, model)


def test_published_tensors_as_safetensors(tmp_path: Path) -> None:
    model, again = (build(configuration().model) for _ in range(2))
    weights = {name: tensor.clone() for name, tensor in checkpoint.to_published(model).items()}
    save_file(wrapped(weights, "module."), tmp_path / "theirs.safetensors")
    load_weights(again, tmp_path / "theirs.safetensors")
    assert_same_weights(again, model)
    assert_same_weights(load_detector(tmp_path / "theirs.safetensors").model, model)


def test_advice_names_the_settings_that_differ(tmp_path: Path) -> None:
    small, wide = configuration(queries=7), configuration(queries=9, decoder_layers=3, num_classes=5)
    folder = tmp_path / WEIGHTS
    save_weights(folder, build(small.model).state_dict(), small, CATEGORIES, step=1, epochs=0)
    checkpoint.export_published(build(small.model), tmp_path / "published.pth")
    for file in (folder, tmp_path / "published.pth"):
        with pytest.raises(ValueError, match="holds another architecture") as refusal:
            load_weights(build(wide.model), file)
        advice = str(refusal.value).splitlines()[-1]
        assert (
            "The file is of a model with model.decoder_layers=2 model.queries=7: set that, and start the class"
            in advice
        )
    torch.save({"model": {"conv.weight": torch.ones(2)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="it is the checkpoint of another program"):
        load_weights(build(small.model), tmp_path / "other.pth")
    save_file({"bbox_embed.0.bias": torch.ones(2)}, tmp_path / "nameless.safetensors")
    with pytest.raises(ValueError, match=r"It does not say which model it is of \(.*names no configuration\)\.$"):
        load_weights(build(small.model), tmp_path / "nameless.safetensors")


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    file = tmp_path / "stranger.pth"
    torch.save({"model": {}, "payload": Malicious(tmp_path / "executed")}, file)
    with pytest.raises(ValueError, match="neither safetensors nor a checkpoint of plain tensors"):
        load_detector(file)
    assert not (tmp_path / "executed").exists()
    torch.load(file, weights_only=False)  # proves that the payload would have worked
    assert (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["broken.pth", "broken.safetensors"])
def test_truncated_files_are_named(name: str, tmp_path: Path, written: tuple[Detector, Path]) -> None:
    whole = step_directory(written[1], 5) / WEIGHTS
    (tmp_path / name).write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=name):
        load_detector(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data, start: data[:start] + b"no" + data[start + 2 :], r"not a readable archive \(Bad magic number"),
        (lambda data, start: data[:-2] + b"\2\0no", r"its table of contents is not where the archive says"),
    ],
    ids=["no table of contents", "a comment behind it"],
)
def test_archives_that_torch_does_not_write(change: Callable, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "other.pth"
    torch.save({"model": {"weight": torch.zeros(3)}}, file)
    with zipfile.ZipFile(file) as archive:
        start = archive.start_dir
    file.write_bytes(change(file.read_bytes(), start))
    with pytest.raises(ValueError, match=rf"^{file}: {reason}"):
        load_detector(file)


def test_a_file_that_is_not_there_is_not_said_to_be_broken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        checkpoint.read_published(tmp_path / "none.pth")


def test_safetensors_of_another_program(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was not written by ddetr"):
        load_detector(tmp_path / "other.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected the published layout"):
        load_detector(tmp_path / "other.pth")
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"neither a Deformable DETR nor a DETR checkpoint.* transformer\.level_embed"):
        load_detector(tmp_path / "model.pth")


def test_a_checkpoint_that_is_deleted_while_it_is_read_gives_way_to_the_newest(tmp_path: Path) -> None:
    files = [step_directory(tmp_path, step) / WEIGHTS for step in (10, 20, 30)]
    for file in files:
        file.parent.mkdir(parents=True)
        file.write_bytes(file.parent.name.encode())
    opened: list[Path] = []

    def read(file: Path) -> bytes:
        opened.append(file)
        if file != files[0]:
            shutil.rmtree(file.parent)
        return file.read_bytes()

    assert read_newest(tmp_path, read) == b"step_00000010"
    assert opened == files[::-1]
    with pytest.raises(FileNotFoundError, match="step_00000020: no checkpoint here"):
        read_newest(step_directory(tmp_path, 20), read)

    def refuse(file: Path) -> bytes:
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):  # it is there: no other is taken in its place
        read_newest(tmp_path, refuse)


def test_a_newest_checkpoint_that_is_deleted_meanwhile_gives_way(written: tuple[Detector, Path], monkeypatch) -> None:
    _, run_directory = written
    newest = step_directory(run_directory, 12)

    def listed(directory: Path) -> list[Path]:
        found = checkpoints(directory)
        shutil.rmtree(newest, ignore_errors=True)
        return found

    monkeypatch.setattr("ddetr.core.checkpoint.weights.checkpoints", listed)
    assert find_checkpoint(run_directory) == step_directory(run_directory, 5)


def test_a_link_that_leads_nowhere_is_a_damaged_checkpoint(written: tuple[Detector, Path]) -> None:
    _, run_directory = written
    step_directory(run_directory, 20).symlink_to(run_directory / "moved")
    with pytest.raises(ValueError, match=r"step_00000020 is damaged: model.safetensors is missing"):
        find_checkpoint(run_directory)
