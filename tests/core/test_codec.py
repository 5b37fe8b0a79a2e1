"""A checkpoint as a value: whole through its files, whatever the optimizer keeps, and each tensor read once."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ddetr.core.checkpoint import find_checkpoint, load_detector
from ddetr.core.checkpoint.codec import TRAINING, Checkpoint
from ddetr.core.checkpoint.manifest import MANIFEST, verify
from ddetr.core.checkpoint.published import to_published
from ddetr.core.checkpoint.weights import WEIGHTS, step_directory
from ddetr.core.config import load
from ddetr.core.model.detector import Detector, build
from ddetr.core.progress import Position
from ddetr.data.categories import Categories
from safetensors.torch import load_file, save_file

from tests.core.runs import SMALL, Train, succeeded
from tests.processes import finished

pytestmark = pytest.mark.integration

COUNTED_RUN = Path(__file__).with_name("counted_run.py")


def checkpoint(folder: Path, averaged: bool) -> tuple[Checkpoint, Detector]:
    """Of an optimizer with one slot; and the model with the weights that training goes on with."""
    config = load("tiny", [*SMALL, "model.pretrained_backbone=false", "model.num_classes=3"])
    torch.manual_seed(0)
    model, average = build(config.model), build(config.model)
    trained = {name: number for number, (name, _) in enumerate(model.named_parameters()) if "backbone" not in name}
    weights = model.state_dict()
    momentum = {name: torch.randn_like(weights[name]) for name in trained}
    slots = {"momentum": momentum} | ({"weights": {name: weights[name] for name in trained}} if averaged else {})
    stored = Checkpoint(
        folder=folder,
        position=Position(step=7, epochs=1, step_in_epoch=1, steps_per_epoch=6, order="abc"),
        config=config,
        categories=Categories((1, 5, 9), ("a", "b", "c")),
        weights=weights | ({name: average.state_dict()[name] for name in trained} if averaged else {}),
        averaged=averaged,
        slots=slots,
        trained=trained,
        loss_scale={"cur_scale": 65536.0, "cur_iter": 7},
        ranks=3,
        zero_stage=2,
    )
    return stored, model


@pytest.mark.parametrize("averaged", [False, True])
def test_what_is_written_is_read(averaged: bool, tmp_path: Path) -> None:
    written, model = checkpoint(step_directory(tmp_path, 7), averaged)
    written.write()
    verify(written.folder)
    found = Checkpoint.read(written.folder)
    assert replace(found, weights={}, slots={}) == replace(written, weights={}, slots={})
    assert all(torch.equal(found.weights[name], tensor) for name, tensor in written.weights.items())
    assert "nothing" not in found.weights
    evaluated = load_detector(tmp_path).model.state_dict()
    assert all(torch.equal(evaluated[name], tensor) for name, tensor in written.weights.items())
    of_model = {"weights": model.state_dict(), "average": evaluated}
    for kind in ("momentum", "weights", "average") if averaged else ("momentum", "weights"):
        expected, read = written.slots.get(kind) or of_model[kind], dict(found.beside(kind))
        assert read.keys() == written.trained.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in read.items())

    going_on = build(found.config.model)
    found.fill(going_on)
    assert all(torch.equal(going_on.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


def test_the_manifest_lists_what_is_in_the_files(tmp_path: Path) -> None:
    written, _ = checkpoint(step_directory(tmp_path, 7), averaged=True)
    written.write()
    values = json.loads((written.folder / MANIFEST).read_text())
    assert (values["version"], values["model"], values["slots"]) == (2, "average", ["momentum", "weights"])
    assert values["trained"] == written.trained
    assert set(values["files"]) == {WEIGHTS, TRAINING}
    names = {f"{slot}/{name}" for slot in values["slots"] for name in values["trained"]}
    assert load_file(written.folder / TRAINING).keys() == names


@pytest.mark.parametrize("slots", [[], ["momentum", "momentum"], ["exp_avg"], [1]])
def test_slots_that_are_not_those_of_the_files_are_damage(slots: list[Any], tmp_path: Path) -> None:
    written, _ = checkpoint(step_directory(tmp_path, 7), averaged=False)
    written.write()
    values = json.loads((written.folder / MANIFEST).read_text())
    (written.folder / MANIFEST).write_text(json.dumps({**values, "slots": slots}))
    with pytest.raises(ValueError, match=r"step_00000007 is damaged: checkpoint.json lacks .*'slots'"):
        Checkpoint.read(written.folder)


def test_state_of_another_optimizer_is_named(tmp_path: Path) -> None:
    written, _ = checkpoint(step_directory(tmp_path, 7), averaged=False)
    written.write()
    with pytest.raises(ValueError, match=r"has no 'exp_avg' of its trained parameters, only \['momentum'\]"):
        dict(Checkpoint.read(written.folder).beside("exp_avg"))


def test_weights_of_another_program_are_damage(tmp_path: Path) -> None:
    """Published ones say their configuration, but not their classes."""
    written, model = checkpoint(step_directory(tmp_path, 7), averaged=False)
    written.write()
    save_file({name: tensor.clone() for name, tensor in to_published(model).items()}, written.folder / WEIGHTS)
    values = json.loads((written.folder / MANIFEST).read_text())
    values["files"][WEIGHTS]["bytes"] = (written.folder / WEIGHTS).stat().st_size
    (written.folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(
        ValueError, match=rf"step_00000007 is damaged: {WEIGHTS} was not written by ddetr. Move it away"
    ):
        Checkpoint.read(written.folder)


def test_another_architecture_is_named_without_reading_a_tensor(tmp_path: Path) -> None:
    """Of values that are not finite, which reading would name."""
    written, _ = checkpoint(step_directory(tmp_path, 7), averaged=False)
    spoiled = {name: torch.full_like(tensor, torch.nan) for name, tensor in written.weights.items()}
    replace(written, weights=spoiled).write()
    found = Checkpoint.read(written.folder)
    with torch.device("meta"):
        same, other = (build(found.config.model.model_copy(update={"decoder_layers": number})) for number in (2, 3))
    found.check_fit(same)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: holds another architecture"):
        found.check_fit(other)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}: \S+ has \d+ of \d+ values that are infinite or not a number"):
        found.fill(build(found.config.model))


@pytest.mark.parametrize("settings", [(), ("train.ema_decay=0.9",)], ids=["plain", "average"])
def test_a_resume_reads_each_tensor_once_on_each_rank(train: Train, tmp_path: Path, settings: tuple[str, ...]) -> None:
    """And every byte for the checksum once, on rank 0, which alone looks at the headers before the run begins."""
    run = succeeded(train(1, "train.zero_stage=1", *settings))
    copy = Path(shutil.copytree(run.directory, tmp_path / "run"))
    folder = find_checkpoint(copy)
    words, environment = ("train", "--resume", copy, "train.max_steps=5"), {"READS": str(tmp_path)}
    resumed = finished(*words, ranks=2, environment=environment, program=COUNTED_RUN)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    files = {f"{folder.name}/{name}": load_file(folder / name) for name in (WEIGHTS, TRAINING)}
    tensors = {f"{file}/{name}": 1 for file, content in files.items() for name in content}
    for rank in (0, 1):
        reads = json.loads((tmp_path / f"rank{rank}.json").read_text())
        of_it = {kind: {file: n for file, n in counts.items() if folder.name in file} for kind, counts in reads.items()}
        assert of_it["tensor"] == tensors
        assert of_it["open"] == dict.fromkeys(files, 2 - rank)
        assert of_it["checksum"] == (dict.fromkeys(files, 1) if rank == 0 else {})
