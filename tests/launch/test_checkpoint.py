"""`ddetr checkpoint`: what inspect prints, and that exported weights compute the same."""

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ddetr.core.checkpoint.codec import TRAINING
from ddetr.core.checkpoint.manifest import MANIFEST
from ddetr.core.checkpoint.trained import load_detector, load_weights
from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.evaluation import result
from ddetr.core.model.detector import DeformableDetr
from ddetr.launch.checkpoint import FixedSizeDetector, export, inspect
from ddetr.launch.cli import app
from typer.testing import CliRunner

pytestmark = pytest.mark.integration


def outputs(model: DeformableDetr) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    with torch.no_grad():
        predictions = model(torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool))
    return predictions.logits, predictions.boxes


def test_inspect_tells_what_is_inside(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(run_directory)
    text = capsys.readouterr().out
    for expected in (
        "step 20, 2 epoch(s) done",
        "disc (1), triangle (23), cross (56)",
        "hidden_dim: 64",
        "tensors F32",
        "MiB",
    ):
        assert expected in text
    model = load_detector(run_directory).model
    assert f"{sum(tensor.numel() for tensor in model.state_dict().values()):,}" in text
    encoder = [*model.transformer.encoder.parameters(), *model.transformer.level_embed.parameters()]
    assert f"{sum(p.numel() for p in encoder):,}" in text


def test_inspect_shows_the_evaluation(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step = tmp_path / "checkpoints/step_00000020"
    step.mkdir(parents=True)
    (step / WEIGHTS).symlink_to(run_directory / "checkpoints/step_00000020" / WEIGHTS)
    inspect(tmp_path)
    assert "not yet" in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 20, "metr')  # of a run that was killed
    weights = result.weights_digest(step / WEIGHTS)
    metrics = {"AP": 0.123, "AP50": 0.456, "AP75": 0.1}
    for shards, images in (("0", 24), ("1", 60)):
        measure = result.Measure(shards * 64, "2" * 64)
        result.write(step, result.Result(metrics, "AP", images, 0, 1.5, 1e9, 20, 2, weights, measure))
        metrics = {**metrics, "AP": 0.789}
    inspect(tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    expected = "AP 0.123, AP50 0.456, AP75 0.100 on 24 images; AP 0.789, AP50 0.456, AP75 0.100 on 60 images"
    assert expected in shown


def test_inspect_of_published_weights_and_of_an_evaluation_without_a_score(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run_directory, tmp_path / "weights.pth", "published")
    inspect(tmp_path / "weights.pth")
    shown = " ".join(capsys.readouterr().out.split())
    assert "stored as a published checkpoint, read as float32" in shown
    assert "labels are category ids" in shown
    step = tmp_path / "checkpoints/step_00000020"
    step.mkdir(parents=True)
    (step / WEIGHTS).symlink_to(run_directory / "checkpoints/step_00000020" / WEIGHTS)
    weights, measure = result.weights_digest(step / WEIGHTS), result.Measure("0" * 64, "2" * 64)
    result.write(step, result.Result({"AP": float("nan")}, "AP", 24, 9, 1.5, 1e9, 20, 2, weights, measure))
    inspect(tmp_path)
    assert "no score on 24 images: the model gave infinities or NaN" in " ".join(capsys.readouterr().out.split())


def test_without_the_extra_of_onnx_it_is_named(run_directory: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"ONNX export needs the extra: pip install 'ddetr\[export\]'"):
        export(run_directory, tmp_path / "weights.onnx", "onnx")
    assert list(tmp_path.iterdir()) == []


def test_inspect_shows_the_evaluation_of_the_first_release(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = tmp_path / "checkpoints/step_00000020"
    step.mkdir(parents=True)
    (step / WEIGHTS).symlink_to(run_directory / "checkpoints/step_00000020" / WEIGHTS)
    (tmp_path / "eval/step_00000020").mkdir(parents=True)
    (tmp_path / "eval/step_00000020/metrics.json").write_text('{"AP": 0.75, "AP50": 0.875}')
    inspect(tmp_path)
    assert "AP 0.750, AP50 0.875" in capsys.readouterr().out
    (step / "evaluation.json").write_text('{"AP": 0.25, "AP50": 0.5}')
    inspect(tmp_path)
    assert "AP 0.250, AP50 0.500" in capsys.readouterr().out


class Harmful:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return Path.mkdir, (self.folder,)


@pytest.mark.parametrize("kind", ["pickle", "zip", "run"])
@pytest.mark.parametrize(
    "command",
    [
        "checkpoint inspect {file}",
        "checkpoint export {file} {folder}/exported.safetensors",
        "eval {file} --data {shards}",
        "predict {file} {image}",
        "explain {file} {image}",
        "train tiny train.initial_weights={file} data.train={shards} train.output={folder}",
        "train --resume {file}",
    ],
    ids=lambda command: command.split("{")[0].strip(),
)
def test_a_strangers_checkpoint_executes_nothing(
    command: str, kind: str, synthetic_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plain pickle, torch's archive with one inside, and a folder with pickles under every name of a run."""
    monkeypatch.chdir(tmp_path)
    harmful, file = {"model": Harmful(tmp_path / "executed")}, tmp_path / "evil.pth"
    if kind == "run":
        step = file / "checkpoints/step_00000001"
        step.mkdir(parents=True)
        for name in (WEIGHTS, TRAINING, MANIFEST):
            (step / name).write_bytes(pickle.dumps(harmful))
        (file / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path}/executed']")
    elif kind == "zip":
        torch.save(harmful, file)
    else:
        file.write_bytes(pickle.dumps(harmful))
    image = synthetic_shards.parent / "coco/images"
    values = {"file": file, "folder": tmp_path, "shards": synthetic_shards, "image": next(image.iterdir())}
    result = CliRunner().invoke(app, command.format(**values).split())
    assert isinstance(result.exception, (ValueError, OSError)), result.output
    assert str(file) in str(result.exception)
    assert not (tmp_path / "executed").exists()


def test_safetensors_carry_everything(run_directory: Path, tmp_path: Path) -> None:
    export(run_directory, tmp_path / "new/detector.safetensors", "safetensors")
    before, after = load_detector(run_directory), load_detector(tmp_path / "new/detector.safetensors")
    assert (after.config, after.categories, after.step) == (before.config, before.categories, before.step)
    for expected, got in zip(outputs(before.model), outputs(after.model), strict=True):
        assert torch.equal(expected, got)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["detector.safetensors"], "no partial file is left"


def test_published_layout_and_back(
    run_directory: Path, make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run_directory, tmp_path / "small.pth", "published")
    assert "cannot build 'test_resnet" in capsys.readouterr().out
    detector = load_detector(run_directory)
    other = DeformableDetr(detector.config.model).eval().requires_grad_(False)
    load_weights(other, tmp_path / "small.pth")
    for expected, got in zip(outputs(detector.model), outputs(other), strict=True):
        assert torch.equal(expected, got)

    overrides = ("model.backbone=resnet50.tv_in1k", "model.backbone_norm=frozen_batch", "model.two_stage=false")
    run = make_run(tmp_path / "run", run_directory.parent / "shards", (1,), *overrides)
    export(run, tmp_path / "r50.pth", "published")
    state = torch.load(tmp_path / "r50.pth", weights_only=True)["model"]
    assert "transformer.encoder.layers.0.self_attn.sampling_offsets.weight" in state
    assert "backbone.0.body.layer1.0.conv1.weight" in state
    export(tmp_path / "r50.pth", tmp_path / "back.safetensors", "safetensors")
    for expected, got in zip(
        outputs(load_detector(run).model), outputs(load_detector(tmp_path / "back.safetensors").model), strict=True
    ):
        assert torch.equal(expected, got)


def test_unfit_names_are_refused(run_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.onnx"):
        export(run_directory, tmp_path / "detector.pth", "onnx")
    with pytest.raises(ValueError, match="expected one of safetensors, published, onnx"):
        export(run_directory, tmp_path / "detector.pth", "torchscript")
    file = run_directory / "checkpoints/step_00000020" / WEIGHTS
    with pytest.raises(ValueError, match="is the checkpoint itself"):
        export(run_directory, file, "safetensors")


def test_the_fixed_size_detector_is_the_detector(run_directory: Path) -> None:
    model = load_detector(run_directory).model
    images = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    mask = torch.zeros(1, 64, 96, dtype=torch.bool)
    from ddetr.data.batch import normalised

    with torch.no_grad():
        expected = model(normalised(images, mask), mask)
        logits, boxes = FixedSizeDetector(model, 64, 96)(images)
    torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(boxes, expected.boxes, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["two_stage", "plain"])
def test_onnxruntime_computes_the_same(
    run_directory: Path, make_run: Callable[..., Path], tmp_path: Path, variant: str
) -> None:
    onnx = pytest.importorskip("onnx", reason="ddetr[export] is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="ddetr[export] is not installed")
    run = run_directory
    if variant == "plain":
        plain = ("model.two_stage=false", "model.box_refine=false", "model.encoder_layers=2")
        run = make_run(tmp_path / "plain", run_directory.parent / "shards", (3,), *plain)
    detector = load_detector(run)
    export(run, tmp_path / "detector.onnx", "onnx", (64, 96))
    properties = {entry.key: entry.value for entry in onnx.load(tmp_path / "detector.onnx").metadata_props}
    assert [c["id"] for c in json.loads(properties["categories"])] == [1, 23, 56]
    session = runtime.InferenceSession(str(tmp_path / "detector.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 64, 96]
    from ddetr.data.batch import normalised

    for seed in range(3):
        images = np.random.default_rng(seed).integers(0, 256, (1, 3, 64, 96), dtype=np.uint8)
        logits, boxes = session.run(["logits", "boxes"], {"images": images})
        mask = torch.zeros(1, 64, 96, dtype=torch.bool)
        with torch.no_grad():
            expected = detector.model(normalised(torch.from_numpy(images), mask), mask)
        np.testing.assert_allclose(logits, expected.logits.numpy(), atol=2e-3, rtol=1e-3)
        np.testing.assert_allclose(boxes, expected.boxes.numpy(), atol=2e-4)


def test_inspect_of_a_run_whose_newest_checkpoint_is_deleted_shows_the_one_before(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddetr.launch import checkpoint

    shutil.copytree(run_directory, tmp_path / "run")
    resumable = checkpoint._resumable

    def deleted(folder: Path) -> str:
        if folder.name == "step_00000020":
            shutil.rmtree(folder)
        return resumable(folder)

    monkeypatch.setattr(checkpoint, "_resumable", deleted)
    checkpoint.inspect(tmp_path / "run")
    printed = capsys.readouterr().out
    assert "step_00000010/model.safetensors" in printed
    assert "step 10, 1 epoch(s) done" in printed
    assert "step_00000020" not in printed
