"""Weights on disk: our safetensors, the published layout, and files that are neither."""

import argparse
import os
from pathlib import Path

import pytest
import torch
from ddetr.core import checkpoint
from ddetr.core.checkpoint import WEIGHTS, find_checkpoint, load_detector, load_weights, save_weights, step_directory
from ddetr.core.config import Config, ModelConfig
from ddetr.core.detector import DeformableDetr
from ddetr.data.categories import Categories

CATEGORIES = Categories(ids=(1, 23, 56), names=("disc", "triangle", "cross"))


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


def assert_same_weights(one: DeformableDetr, other: DeformableDetr) -> None:
    expected = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0)


@pytest.fixture
def written(tmp_path: Path) -> tuple[DeformableDetr, Path]:
    """A run directory with two complete checkpoints and one that was being written when the run was killed."""
    model = DeformableDetr(configuration().model)
    for step in (5, 12):
        folder = step_directory(tmp_path, step)
        folder.mkdir(parents=True)
        save_weights(folder / WEIGHTS, model.state_dict(), configuration(), CATEGORIES, step=step, epoch=1)
    (tmp_path / "checkpoints/.step_00000019").mkdir()
    return model, tmp_path


def test_newest_complete_checkpoint_is_found_and_describes_itself(written: tuple[DeformableDetr, Path]) -> None:
    model, run_directory = written
    assert find_checkpoint(run_directory) == step_directory(run_directory, 12)
    for path in (run_directory, step_directory(run_directory, 12), step_directory(run_directory, 12) / WEIGHTS):
        detector = load_detector(path)
        assert (detector.step, detector.epoch, detector.categories) == (12, 1, CATEGORIES)
        assert detector.config == configuration()
        assert not detector.model.training
        assert_same_weights(detector.model, model)


def test_no_checkpoint_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint here; expected checkpoints/step_\*/model.safetensors"):
        load_detector(tmp_path)


@pytest.mark.parametrize(
    "variant", [{}, {"box_refine": True}, {"box_refine": True, "two_stage": True}, {"levels": 1, "points": 2}]
)
def test_published_layout_is_an_exact_inverse(variant: dict, tmp_path: Path) -> None:
    model = DeformableDetr(configuration(**variant).model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_()
    checkpoint.export_published(model, tmp_path / "published.pth")
    again = DeformableDetr(configuration(**variant).model)
    load_weights(again, tmp_path / "published.pth")
    assert_same_weights(again, model)
    detector = load_detector(tmp_path / "published.pth")
    assert detector.categories is None
    assert_same_weights(detector.model, model)
    names = torch.load(tmp_path / "published.pth", weights_only=True)["model"]
    assert "backbone.0.body.layer1.0.conv1.weight" in names
    assert "transformer.encoder.layers.0.self_attn.sampling_offsets.weight" in names
    last = 2 if "two_stage" in variant else 1
    assert f"class_embed.{last}.bias" in names
    assert f"class_embed.{last + 1}.bias" not in names
    assert ("transformer.decoder.bbox_embed.0.layers.0.weight" in names) == ("box_refine" in variant)
    assert ("transformer.decoder.class_embed.0.weight" in names) == ("two_stage" in variant)


def test_published_file_with_its_arguments_loads(tmp_path: Path) -> None:
    """The released files hold an argparse.Namespace, an optimizer and batch counters beside the weights."""
    model = DeformableDetr(configuration().model)
    weights = checkpoint.to_published(model) | {"backbone.0.body.bn1.num_batches_tracked": torch.tensor(3)}
    content = {"model": weights, "args": argparse.Namespace(lr=2e-4), "epoch": 49, "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "released.pth")
    assert_same_weights(load_detector(tmp_path / "released.pth").model, model)


def test_another_architecture_is_listed_and_changes_nothing(tmp_path: Path) -> None:
    checkpoint.export_published(DeformableDetr(configuration().model), tmp_path / "published.pth")
    model = DeformableDetr(configuration(num_classes=5, box_refine=True).model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="holds another architecture") as raised:
        load_weights(model, tmp_path / "published.pth")
    assert "missing: class_embed.1.weight" in str(raised.value)
    assert "re-shaped: class_embed.0.weight is (3, 64) in the file, (5, 64) in the model" in str(raised.value)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


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
def test_truncated_files_are_named(name: str, tmp_path: Path, written: tuple[DeformableDetr, Path]) -> None:
    whole = step_directory(written[1], 5) / WEIGHTS
    (tmp_path / name).write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=name):
        load_detector(tmp_path / name)


def test_safetensors_of_another_program(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="was not written by ddetr"):
        load_detector(tmp_path / "other.safetensors")
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="expected the published layout"):
        load_detector(tmp_path / "other.pth")
    torch.save({"model": {"weight": torch.zeros(3)}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"not a Deformable DETR checkpoint, it has no transformer\.level_embed"):
        load_detector(tmp_path / "model.pth")
