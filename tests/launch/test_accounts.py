"""Accounts that may write little: another user without a home, or without a name, as a container may have."""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from ddetr.data.folders import obstacle

from tests.confinement import become
from tests.core.runs import SMALL
from tests.data.file_server import FileServer
from tests.processes import finished

NOBODY = 54321  # no account of any system
READS = ["--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"]  # as `become` has it


@pytest.fixture
def open_folder(tmp_path: Path) -> Path:
    """One that anybody may write to; tests in it need root, to become somebody else."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("becoming another account needs root and setpriv")
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    return folder


def train_as_nobody(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return finished("train", "tiny", *SMALL, *arguments, folder=folder, first=partial(become, NOBODY, variables))


def refused(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    message = result.stderr.splitlines()[-1]
    assert message.startswith("ddetr: "), result.stderr
    for part in parts:
        assert part in message, result.stderr
    assert "Traceback" not in result.stderr


def test_what_keeps_a_folder_from_being_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert obstacle(tmp_path / "not/there/yet") is None
    assert obstacle(tmp_path / "file/below") == f"{tmp_path}/file is not a folder"
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    assert obstacle(tmp_path / "dangling/below") == f"{tmp_path}/dangling is not a folder"


@pytest.mark.parametrize("variables", [{"HOME": "/nonexistent"}, {}], ids=["home that is not there", "no home at all"])
@pytest.mark.slow
def test_training_needs_no_home(
    variables: dict[str, str], synthetic_shards: Path, open_folder: Path, tmp_path: Path
) -> None:
    settings = [f"data.train={synthetic_shards}", "train.max_steps=1", f"train.output={open_folder}/runs"]
    result = train_as_nobody(*settings, folder=tmp_path, **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "XDG_STATE_HOME names another place" in result.stdout + result.stderr  # monitor.port is remembered


@pytest.mark.integration
def test_a_folder_that_an_import_makes_is_named_with_its_variable(synthetic_shards: Path, open_folder: Path) -> None:
    become = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *READS]
    line = [*become, sys.executable, "-m", "ddetr.launch.cli", "train", "tiny", f"data.train={synthetic_shards}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = "/nowhere/a"
    result = subprocess.run(line, env=environment, cwd=open_folder, capture_output=True, text=True, check=False)
    refused(result, "/nowhere: Permission denied; TORCHINDUCTOR_CACHE_DIR=/nowhere/a names this place: set it")


@pytest.mark.integration
def test_folders_that_cannot_be_written_are_named_with_their_settings(
    synthetic_shards: Path, open_folder: Path, tmp_path: Path
) -> None:
    tmp_path.chmod(0o755)
    dry_run = partial(train_as_nobody, "--dry-run")
    here = f"data.train={synthetic_shards}"
    result = dry_run(here, folder=tmp_path)
    refused(result, "train.output=runs", f"{tmp_path} cannot be written to by this account (uid {NOBODY})")
    there = {"TORCHINDUCTOR_CACHE_DIR": str(open_folder), "TRITON_CACHE_DIR": "/nowhere/a"}
    result = dry_run(here, "train.compile=true", folder=open_folder, **there)
    refused(result, "train.compile=true: / cannot be written", "set TRITON_CACHE_DIR")
    server = FileServer(synthetic_shards)
    try:
        remote = f"data.train={server.url}"
        result = dry_run(remote, folder=open_folder, HOME="/nonexistent")
        refused(result, "data.cache=/nonexistent/.cache/ddetr/shards", "/ cannot be written", "data.fetch=samples")
        result = dry_run(remote, folder=open_folder)
        refused(result, "data.cache=~/.cache/ddetr/shards", "no home is known for ~", "Set data.cache to another")
        result = dry_run(remote, "data.fetch=samples", folder=open_folder)
        assert result.returncode == 0, result.stderr
    finally:
        server.close()
