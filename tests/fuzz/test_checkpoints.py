"""Weights of a stranger: a detector of the stated shape, or refused."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from ddetr.core.checkpoint.codec import TRAINING, Checkpoint
from ddetr.core.checkpoint.description import contents
from ddetr.core.checkpoint.manifest import MANIFEST
from ddetr.core.checkpoint.published import read_published
from ddetr.core.checkpoint.trained import load_detector, load_weights
from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.config import Config
from ddetr.core.model.detector import build
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.fuzz.checkpoint_files import CATEGORIES, STEP, header_of, with_header
from tests.fuzz.strategies import DAMAGES, WILD, Damage, Effort, changed, damaged, outcome, watched


@pytest.fixture
def weights_file(written: Path, tmp_path: Path) -> tuple[Path, bytes]:
    """A place for a file of weights, and the bytes of a valid one with few of its tensors."""
    whole = (written / STEP / WEIGHTS).read_bytes()
    header = header_of(whole)
    some = {name: header[name] for name in [*header][:4]}
    end = max(entry["data_offsets"][1] for name, entry in some.items() if name != "__metadata__")
    return tmp_path / "some.safetensors", with_header(whole, json.dumps(some).encode())[
        : 8 + len(json.dumps(some)) + end
    ]


def test_a_header_of_weights_is_what_it_says_or_refused(effort: Effort, weights_file: tuple[Path, bytes]) -> None:
    file, good = weights_file
    file.write_bytes(good)
    header = header_of(good)
    assert contents(file).step == 20

    def holds(data: bytes) -> None:
        file.write_bytes(data)
        with watched():
            found = outcome(lambda: contents(file), file, lines=True)
        if found is None:
            return
        said = header_of(data)
        assert found.shapes == {name: tuple(entry["shape"]) for name, entry in said.items() if name != "__metadata__"}
        assert (found.step, found.epochs) == (int(said["__metadata__"]["step"]), int(said["__metadata__"]["epoch"]))
        assert all(number is not None and number >= 0 for number in (found.step, found.epochs))
        assert found.categories is not None
        assert found.categories.to_json() == json.loads(said["__metadata__"]["categories"])

    headers = changed(header, values=WILD | WILD.map(json.dumps)).map(
        lambda values: with_header(good, json.dumps(values).encode())
    )
    effort(holds, headers | DAMAGES.map(lambda damage: damaged(good, damage)))


def test_metadata_is_what_it_says_or_refused(effort: Effort, weights_file: tuple[Path, bytes], config: Config) -> None:
    file, good = weights_file
    metadata = header_of(good)["__metadata__"]
    values = config.model_dump(mode="json")

    def holds(kind: str, text: str) -> None:
        header = header_of(good)
        header["__metadata__"][kind] = text
        file.write_bytes(with_header(good, json.dumps(header).encode()))
        with watched():
            found = outcome(lambda: contents(file), file, lines=True)
        if found is not None and kind == "categories":
            said = json.loads(text)
            assert [(c.ids, c.names) for c in [found.categories]] == [
                (tuple(item["id"] for item in said), tuple(item["name"] for item in said))
            ]

    documents = {"config": values, "categories": CATEGORIES.to_json()}
    texts = st.one_of(
        *(st.tuples(st.just(kind), changed(document).map(json.dumps)) for kind, document in documents.items()),
        *(
            st.tuples(st.just(kind), DAMAGES.map(lambda d, t=text: damaged(t.encode(), d).decode(errors="replace")))
            for kind, text in metadata.items()
        ),
        st.tuples(
            st.sampled_from(sorted(metadata)), WILD.map(lambda value: value if isinstance(value, str) else repr(value))
        ),
    )
    effort(lambda drawn: holds(*drawn), texts)


def test_what_training_keeps_is_read_or_refused(effort: Effort, run_directory: Path) -> None:
    folder = run_directory / STEP
    good = (folder / TRAINING).read_bytes()
    header = header_of(good)
    shapes = {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}

    def holds(data: bytes) -> None:
        rewrite(folder, data)
        for kind in ("weights", "average", "exp_avg", "exp_avg_sq"):
            with watched():
                found = outcome(lambda kind=kind: dict(Checkpoint.read(folder).beside(kind)), folder)
            if found is not None:
                said = header_of(data)
                assert {name: said[name]["shape"] for name in shapes} == shapes
                assert {f"exp_avg/{name}" for name in found} == {name for name in shapes if name.startswith("exp_avg/")}
                assert all(tensor.isfinite().all() for tensor in found.values())

    headers = changed(header).map(lambda values: with_header(good, json.dumps(values).encode()))
    effort(holds, headers | DAMAGES.map(lambda damage: damaged(good, damage)))


def rewrite(folder: Path, data: bytes) -> None:
    """What training keeps, of the size that the manifest states: so nothing but the bytes tells."""
    (folder / TRAINING).write_bytes(data)
    values = json.loads((folder / MANIFEST).read_text())
    values["files"][TRAINING]["bytes"] = len(data)
    (folder / MANIFEST).write_text(json.dumps(values))


def test_damaged_weights_make_a_sound_detector_or_none(effort: Effort, run_directory: Path) -> None:
    file = run_directory / STEP / WEIGHTS
    good = file.read_bytes()
    shapes = {name: tuple(tensor.shape) for name, tensor in load_detector(file).model.state_dict().items()}

    def holds(damage: Damage) -> None:
        file.write_bytes(damaged(good, damage))
        with watched():
            loaded = outcome(lambda: load_detector(file), file, lines=True)
        if loaded is not None:
            assert {name: tuple(tensor.shape) for name, tensor in loaded.model.state_dict().items()} == shapes
            assert all(tensor.isfinite().all() for tensor in loaded.model.state_dict().values())

    effort(holds, DAMAGES, cost=4)


def test_weights_of_a_stranger_fill_a_model_or_leave_it(effort: Effort, run_directory: Path, config: Config) -> None:
    file = run_directory / STEP / WEIGHTS
    good = file.read_bytes()
    header = header_of(good)
    model = build(config.model)
    names = [name for name in header if name != "__metadata__"]
    few = {name: header[name] for name in ["__metadata__", *names[:2], *names[-4:]]}
    others = {name: entry for name, entry in header.items() if name not in few}

    def holds(values: Any, damage: Damage) -> None:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        text = json.dumps({**others, **values} if isinstance(values, dict) else values).encode()
        file.write_bytes(damaged(with_header(good, text), damage))
        with watched():
            filled = outcome(
                lambda: load_weights(model, file, categories=CATEGORIES, tell=lambda line: None), file, lines=True
            )
        after = model.state_dict()
        if filled is None:
            assert all(torch.equal(before[name], after[name]) for name in after)
        assert all(tensor.isfinite().all() for tensor in after.values())

    effort(holds, changed(few), st.just([]) | st.just([]) | DAMAGES)


def test_a_file_of_torch_gives_plain_tensors_or_is_refused(effort: Effort, tmp_path: Path) -> None:
    """The archive that torch writes now and the pickle that it wrote before, as published checkpoints are."""
    file = tmp_path / "published.pth"
    content = {"model": {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}, "args": Namespace(nheads=8)}
    whole = []
    for new in (True, False):
        torch.save(content, file, _use_new_zipfile_serialization=new)
        whole.append(file.read_bytes())
        assert read_published(file).arguments == {"nheads": 8}

    def holds(number: int, damage: Damage) -> None:
        # torch looks through its own message for a pattern in a time that grows with the square of a name's length.
        short = [(kind, position, size, piece[:64]) for kind, position, size, piece in damage]
        file.write_bytes(damaged(whole[number], short))
        with watched():
            found = outcome(lambda: read_published(file), file)
        if found is not None:
            assert isinstance(found.arguments, dict)
            assert all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in found.weights.items())
            assert sum(tensor.nbytes for tensor in found.weights.values()) <= file.stat().st_size

    effort(holds, st.integers(0, 1), DAMAGES)


def test_training_state_without_an_average_is_damage(run_directory: Path, tmp_path: Path) -> None:
    folder = run_directory / STEP
    for name, message in (
        ("weights/a", rf"'slots' holds 'exp_avg', of which {TRAINING} has nothing"),
        ("exp_avg/a", r"'slots' holds 'exp_avg_sq', of which"),
    ):
        save_file({name: torch.ones(1)}, tmp_path / TRAINING)
        rewrite(folder, (tmp_path / TRAINING).read_bytes())
        with pytest.raises(ValueError, match=rf"{STEP} is damaged: .*{message}"):
            Checkpoint.read(folder)
    save_file({"exp_avg/a": torch.ones(1), "exp_avg_sq/a": torch.ones(1)}, tmp_path / TRAINING)
    rewrite(folder, (tmp_path / TRAINING).read_bytes())
    with pytest.raises(ValueError, match=rf"{STEP} is damaged: {TRAINING} has no exp_avg/class_embed\.0\.\S+ of shape"):
        Checkpoint.read(folder)


@pytest.mark.parametrize("step", ["-5", "", "1.5", "9" * 4000])
def test_a_step_that_is_none_is_refused(step: str, run_directory: Path) -> None:
    file = run_directory / STEP / WEIGHTS
    good = file.read_bytes()
    header = header_of(good)
    header["__metadata__"]["step"] = step
    file.write_bytes(with_header(good, json.dumps(header).encode()))
    assert outcome(lambda: contents(file), f"{file}: its metadata cannot be used") is None


def test_a_flipped_bit_of_a_torch_file_is_no_error_of_its_reader(tmp_path: Path) -> None:
    file = tmp_path / "published.pth"
    torch.save({"model": {"a": torch.ones(2)}}, file)
    file.write_bytes(damaged(file.read_bytes(), [("flip", 0, 0, b"")]))
    with pytest.raises(ValueError, match=rf"{file}: neither safetensors nor a checkpoint of plain tensors"):
        read_published(file)


def test_a_tar_is_no_checkpoint_and_unpacked_nowhere(tmp_path: Path) -> None:
    """Two empty blocks are one."""
    file = tmp_path / "published.pth"
    file.write_bytes(bytes(1024))
    with watched():
        assert outcome(lambda: read_published(file), f"{file}: neither safetensors nor a checkpoint") is None
