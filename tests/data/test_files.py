"""A file has its name only when it is whole, whatever happens to who writes it."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from ddetr.data.files import unfinished, write_whole


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    for data in (b"first", b"", b"second" * 100_000):
        write_whole(tmp_path / "file", data)
        assert (tmp_path / "file").read_bytes() == data
        assert os.listdir(tmp_path) == ["file"]


def test_the_longest_name_of_a_file_system_is_taken(tmp_path: Path) -> None:
    path = tmp_path / ("ä" * 127 + "x")
    write_whole(path, b"data")
    assert os.listdir(tmp_path) == [path.name]


def test_a_disk_that_is_full_is_told_with_the_name_and_the_old_file_stays(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            write_whole(path, bytes(1001))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (error.value.errno, error.value.filename) == (errno.EFBIG, str(path))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_that_is_not_there_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        write_whole(tmp_path / "absent/file", b"data")
    assert error.value.filename == str(tmp_path / "absent/file")


def test_nothing_is_written_through_a_link(tmp_path: Path) -> None:
    victim, linked = tmp_path / "victim", tmp_path / "run/file"
    victim.write_text("mine")
    linked.parent.mkdir()
    linked.symlink_to(victim)
    (tmp_path / f"run/.file.{os.getpid()}.partial").symlink_to(victim)
    write_whole(linked, b"data")
    assert victim.read_text() == "mine"
    assert not linked.is_symlink()
    assert os.listdir(tmp_path / "run") == ["file"]


def test_a_block_that_fails_or_gives_up_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(UnicodeEncodeError), unfinished(path) as partial, partial.open("x", encoding="ascii") as file:
        file.writelines(["half", "\u00e4"])
    with unfinished(path) as partial:
        partial.write_text("bad")
        partial.unlink()
    other = OSError(errno.EIO, "of another file", "other")
    with pytest.raises(OSError, match="'other'") as error, unfinished(path):
        raise other
    assert error.value is other
    assert (os.listdir(tmp_path), path.read_text()) == (["file"], "old")


@pytest.mark.integration
def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    script = (
        "import os, signal, sys; from pathlib import Path; from ddetr.data.files import unfinished\n"
        "with unfinished(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path / "file")], check=False).returncode == -9
    assert (tmp_path / "file").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 2
