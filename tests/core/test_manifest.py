"""A checkpoint is whole or not there: what a save leaves behind that fails or was killed."""

import errno
import os
from pathlib import Path

import pytest
from ddetr.core.checkpoint.manifest import LATEST, MANIFEST, read_manifest, verify, write_checkpoint
from safetensors import SafetensorError


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """The folder of a checkpoint that is there."""
    folder = tmp_path / "checkpoints" / "step_00000004"
    write_checkpoint(folder, 1, lambda unfinished: (unfinished / "weights").write_text("old"), {"step": 4})
    return folder


def names(step: Path) -> set[str]:
    return {path.name for path in step.parent.iterdir()}


def test_what_killed_saves_left_is_deleted_and_nothing_behind_a_link(step: Path, tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    (outside / "file").write_text("mine")
    (step.parent / ".step_00000003").mkdir()
    (step.parent / ".step_00000003" / "weights").write_text("half")
    (step.parent / ".step_00000009").symlink_to(outside)
    write_checkpoint(step.with_name("step_00000005"), 1, lambda unfinished: None, {})
    assert names(step) == {"step_00000004", "step_00000005", LATEST}
    assert (outside / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "weights"), r"No space left on device: 'weights'"),
        (
            SafetensorError("I/O error: No space left"),
            r"the checkpoint cannot be written \(I/O error: No space left\): '",
        ),
    ],
)
@pytest.mark.parametrize("name", ["step_00000004", "step_00000005"])
def test_a_save_that_fails_leaves_what_was_there(error: Exception, message: str, name: str, step: Path) -> None:
    def write(unfinished: Path) -> None:
        (unfinished / "weights").write_text("half")
        raise error

    with pytest.raises(OSError, match=message):
        write_checkpoint(step.with_name(name), 1, write, {})
    assert names(step) == {"step_00000004", LATEST}
    assert verify(step)["step"] == 4


def test_a_checkpoint_that_cannot_be_replaced_stays(step: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == ".step_00000004":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        write_checkpoint(step, 1, lambda unfinished: (unfinished / "weights").write_text("new"), {})
    assert names(step) == {"step_00000004", LATEST}
    assert (step / "weights").read_text() == "old"


def test_a_manifest_without_end_is_not_read(step: Path) -> None:
    os.truncate(step / MANIFEST, (16 << 20) + 1)
    with pytest.raises(
        ValueError, match=rf"{step / MANIFEST}: not a usable manifest \(it has more than 16777216 bytes\)"
    ):
        read_manifest(step)
