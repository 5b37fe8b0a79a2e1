"""What keeps an account from writing to a folder is said in words."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from ddetr.data.folders import obstacle


def test_nothing_is_in_the_way_of_a_folder_that_can_be_made(tmp_path: Path) -> None:
    assert obstacle(tmp_path / "new" / "folder") is None
    assert not list(tmp_path.iterdir())


def test_a_file_on_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert obstacle(tmp_path / "file" / "new" / "folder") == f"{tmp_path}/file is not a folder"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (0, f"cannot be written to by this account (uid {os.geteuid()})"),
        (os.ST_RDONLY, "is on a read-only file system"),
    ],
)
def test_why_a_folder_cannot_be_written_to(flags: int, reason: str, tmp_path: Path, monkeypatch) -> None:
    """As another account is told: root may write nearly everywhere."""
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_flag=flags))
    assert obstacle(tmp_path / "new") == f"{tmp_path} {reason}"
