"""Checkpoints that cannot be what they say: one message, before memory is taken."""

import re
import resource
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.checkpoint.weights import WEIGHTS
from safetensors import safe_open

from tests.launch.strangers import Stranger, rewritten, run

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "size",
    [
        "encoder_layers: 1000000000",
        "encoder_layers: 128",
        "decoder_layers: 128",
        "hidden_dim: 16777216",
        "hidden_dim: 4096",
        "feedforward_dim: 65536",
        "levels: 16",
        "num_classes: 1000000",
    ],
)
def test_no_model_larger_than_its_tensors(size: str, run_directory: Path, tmp_path: Path) -> None:
    """In a process whose memory ends at 4 GiB beyond what torch's import maps."""
    key = size.partition(":")[0]
    with safe_open(run_directory / "checkpoints/step_00000020" / WEIGHTS, framework="pt") as opened:
        config = re.sub(rf"{key}: \d+", size, opened.metadata()["config"])
    folder = rewritten(run_directory, tmp_path / "stranger", config=config)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    mapped = int(re.findall(r"VmSize:\s+(\d+)", Path("/proc/self/status").read_text())[0]) << 10
    resource.setrlimit(resource.RLIMIT_AS, (mapped + (4 << 30), hard))
    try:
        with pytest.raises(
            ValueError, match=rf"{key}: .*less than or equal|differ:\n  (missing|re-shaped|unexpected): "
        ):
            load_detector(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize(
    "metadata",
    [
        {"config": "a: &a [1, 1]\nb: &b [*a, *a]\nc: [*b, *b]"},
        {"config": "[" * 5_000},
        {"config": "model: !!python/object/apply:os.mkdir [executed]"},
        {"config": "3"},
        {"categories": "[" * 5_000},
        {"categories": '[{"id": 1}]'},
        {"categories": "{}"},
        {"step": "nan"},
        {"step": "9" * 5000},
    ],
    ids=lambda metadata: next(iter(metadata)) + ":" + next(iter(metadata.values()))[:12],
)
def test_metadata_that_cannot_be_used_is_one_message(
    metadata: dict[str, str], run_directory: Path, tmp_path: Path
) -> None:
    folder = rewritten(run_directory, tmp_path / "stranger", **metadata)
    for command in (["checkpoint", "inspect", folder], ["eval", folder]):
        error = run(*command).exception
        assert isinstance(error, ValueError)
        assert str(folder) in str(error)
        assert len(str(error)) < 1000


def published(change: Callable[[dict[str, Any]], object], run_directory: Path, file: Path) -> Path:
    assert run("checkpoint", "export", run_directory, file, "--format", "published").exception is None
    content = torch.load(file, weights_only=True)
    change(content)
    torch.save(content, file)
    return file


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["model"].update({"class_embed.0.bias": torch.zeros(1).expand(2**40)}), "claims the shape"),
        (lambda c: c["model"].update({"class_embed.0.bias": torch.empty(2**40, device="meta")}), "no plain tensor"),
        (lambda c: c["model"].update({"class_embed.0.bias": "text"}), "no plain tensor"),
        (lambda c: c["model"].update(dict.fromkeys(map(str, range(999)), torch.zeros(2**18))), "larger than the file"),
        (lambda c: c["args"].update(nheads=0), "fit no model"),
        (lambda c: c["args"].update(nheads="8"), "fit no model"),
        (lambda c: c["args"].update(num_queries=10**9), "no model that can be built"),
        (lambda c: c.update(args=[1]), "are no arguments"),
        (lambda c: c.update(args=Namespace(nheads=[])), "fit no model"),
    ],
)
def test_published_files_ask_for_no_more_than_they_hold(
    change: Callable[[dict[str, Any]], object], message: str, run_directory: Path, tmp_path: Path
) -> None:
    file = published(change, run_directory, tmp_path / "published.pth")
    with pytest.raises(ValueError, match=rf"{file}: .*{message}"):
        load_detector(file)


def test_a_second_table_of_contents_hides_nothing(tmp_path: Path) -> None:
    """Python's reader takes the one before the end, torch's the one that the end points to."""
    torch.save({"model": {"a": torch.zeros(2**20)}}, tmp_path / "plain.pth")
    plain = zipfile.ZipFile(tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    data = (tmp_path / "bomb.pth").read_bytes()
    start, end = zipfile.ZipFile(tmp_path / "bomb.pth").start_dir, len(data) - 22
    table = bytearray(data[start:end])
    position = 0
    while (position := table.find(b"PK\1\2", position)) >= 0:
        table[position + 10 : position + 12] = b"\0\0"  # stored, it says
        position += 4
    (tmp_path / "bomb.pth").write_bytes(data[:end] + table + data[end:])
    assert all(member.compress_type == 0 for member in zipfile.ZipFile(tmp_path / "bomb.pth").infolist())
    with pytest.raises(ValueError, match=r"bomb.pth: its table of contents is not where the archive says"):
        load_detector(tmp_path / "bomb.pth")


def test_a_compressed_archive_is_refused_unread(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(2**20)}}, tmp_path / "plain.pth")
    bomb = zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    with pytest.raises(ValueError, match=r"bomb.pth: its members are compressed"):
        load_detector(tmp_path / "bomb.pth")


@pytest.mark.parametrize(
    "text",
    ['{"AP": "x"}', "[" * 5_000, "3", '{"AP50": 0.1}', '{"version": 3}', '{"version": 2, "results": [1]}'],
)
def test_scores_that_cannot_be_read_are_said(text: str, stranger: Stranger) -> None:
    folder = stranger()
    (folder / "checkpoints/step_00000020/evaluation.json").write_text(text)
    result = run("checkpoint", "inspect", folder)
    assert result.exception is None
    assert "evaluation.json cannot be read" in result.output


def test_a_setting_that_is_none_any_more_can_be_given_anew(run_directory: Path, tmp_path: Path) -> None:
    """A checkpoint whose configuration an earlier version took."""
    with safe_open(run_directory / "checkpoints/step_00000020" / WEIGHTS, framework="pt") as opened:
        config = re.sub(r"\n  name: \S+", "\n  name: team/first", opened.metadata()["config"])
    folder = rewritten(run_directory, tmp_path / "old", config=config)
    with pytest.raises(ValueError, match=r"train.name"):
        load_detector(folder)
    assert load_detector(folder, overrides=["train.name=first"]).config.train.name == "first"
