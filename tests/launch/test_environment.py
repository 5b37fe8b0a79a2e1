"""What the ranks find out about each other, with real processes that really differ."""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import ddetr.core
import pytest
from ddetr.launch.environment import SharedMemory, check_compiler_cache, check_shared_memory

from tests.confinement import mount_memory, need_mounts
from tests.core.runs import SMALL, free_port
from tests.processes import Command, finished

HOST = socket.gethostname()
PACKAGE = Path(ddetr.core.__path__[0]).parent


@pytest.mark.integration
def test_what_a_run_says_of_its_machines(synthetic_shards: Path, tmp_path: Path) -> None:
    (status, output), (other, _) = pair(tmp_path, synthetic_shards, everyone=["train.bandwidth_test_seconds=0.5"])
    assert (status, other) == (0, 0), output
    assert f"2 ranks: {HOST} with 2 x CPU, " in output
    assert re.search(r"^ddetr \d\S+ \(\w{8}\), torch \d\S+, deepspeed \d", output, re.MULTILINE)
    assert re.search(r"^all-reduce of 40 MB among 2 ranks: \d+\.\d\d GB/s", output, re.MULTILINE)
    assert "differs" not in output


def pair(
    folder: Path,
    shards: Path,
    *,
    python: Path | None = None,
    everyone: Sequence[str] = (),
    second: Sequence[str] = (),
    environment_of_second: Mapping[str, str] | None = None,
) -> list[tuple[int, str]]:
    """Exit status and output of two ranks, of which the second has further arguments and another environment.

    python: an interpreter to start them with.
    """
    port = str(free_port())
    processes: list[Command | subprocess.Popen[str]] = []
    for rank in range(2):
        environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment |= (environment_of_second or {}) if rank else {}
        arguments = ["train", "tiny", *SMALL, f"data.train={shards}", f"train.output={folder}", "train.name=pair"]
        arguments += ["train.max_steps=1", *everyone, *(second if rank else ())]
        if python is None:
            processes.append(Command(*arguments, environment=environment))
            continue
        line = [python, "-m", "ddetr.launch.cli", *arguments]
        environment, pipe = os.environ | environment, subprocess.PIPE
        processes.append(subprocess.Popen(line, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.wait(), output) for process, output in zip(processes, outputs, strict=True)]


@pytest.mark.slow
def test_ranks_with_other_settings_are_refused(synthetic_shards: Path, tmp_path: Path) -> None:
    for status, output in pair(tmp_path, synthetic_shards, second=["optim.learning_rate=2e-4"]):
        assert status == 2
        assert f"the ranks differ in optim.learning_rate: 0.0001 on {HOST}, 0.0002 on {HOST}. Make" in output, output
        assert "Traceback" not in output
    assert not (tmp_path / "pair").exists()


@pytest.mark.slow
def test_ranks_with_other_code_are_refused(synthetic_shards: Path, tmp_path: Path) -> None:
    """A checkout that was not updated on one of the hosts."""
    package = tmp_path / "stale/ddetr"
    for folder in ("core", "data", "launch", "monitoring", "ops"):
        shutil.copytree(PACKAGE / folder, package / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "core/config.py").open("a").write("\n# an older version\n")
    blocker = tmp_path / "stale/sitecustomize.py"  # the editable install's import hook would come first
    blocker.write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"
    )
    other = {"PYTHONPATH": str(tmp_path / "stale")}
    imported = Path(sys.executable)  # anew by each: a forked process has the code of this one
    for status, output in pair(tmp_path, synthetic_shards, python=imported, environment_of_second=other):
        assert status == 2, output
        assert "the ranks differ in ddetr: " in output


@pytest.mark.slow
def test_an_output_folder_that_is_not_shared_is_refused(synthetic_shards: Path, tmp_path: Path) -> None:
    """The second rank has a file system of its own mounted there."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a mount of its own needs root and unshare")
    folder = tmp_path / "runs"
    folder.mkdir()
    wrapper = tmp_path / "python"
    wrapper.write_text(
        f'#!/bin/sh\n[ "$RANK" = 1 ] && exec unshare --mount sh -c \'mount -t tmpfs none {folder} && exec "$@"\' sh '
        f'{sys.executable} "$@"\nexec {sys.executable} "$@"\n'
    )
    wrapper.chmod(0o755)
    for status, output in pair(folder, synthetic_shards, python=wrapper):
        assert status == 2, output
        assert f"train.output={folder} on {HOST} is not the folder that {HOST} has there" in output
    assert not list(folder.iterdir())


@pytest.mark.integration
@pytest.mark.parametrize("options", [["--dry-run"], pytest.param([], marks=pytest.mark.slow)], ids=["dry run", "run"])
def test_too_little_shared_memory_is_refused_with_the_remedies(
    options: list[str], synthetic_shards: Path, tmp_path: Path
) -> None:
    """A container's 64 MiB: at 800 pixels batches of 8 need twice that; at 96 they have room."""
    need_mounts()
    line = ["train", "tiny", *SMALL, *options]
    line += [f"data.train={synthetic_shards}", f"train.output={tmp_path}", "train.batch_size=8", "train.max_steps=3"]
    line += ["data.workers=2"]
    confined = partial(finished, *line, first=partial(mount_memory, Path("/dev/shm"), 64 << 20))
    large = ["data.short_sides=[800]", "data.long_side=1333", "data.crop=false"]
    result = confined(*large)
    assert result.returncode == 2, result.stdout + result.stderr
    message = result.stderr.splitlines()[-1]
    said = f"ddetr: /dev/shm of {HOST} has 64.0 MiB free, the batches that loader processes"
    assert message.startswith(said), message
    needed = re.search(r"need (\d+\.\d) MiB\. Give", message)
    assert needed
    # Six batches: two of each loader process, and those of two steps; short sides 800, long sides up to 1333.
    assert 6 * 8 * 3 * 800**2 / 2**20 <= float(needed[1]) <= 6 * 8 * 3 * 800 * 1333 / 2**20
    for remedy in ("--ipc=host", "--shm-size", "emptyDir", "data.workers"):
        assert remedy in message
    assert not list(tmp_path.iterdir())
    small = confined()
    assert small.returncode == 0, small.stdout + small.stderr


def test_ranks_of_one_machine_share_what_is_there() -> None:
    def rank(place: str, needed: int, free: int | None = 64 << 20) -> SharedMemory:
        return SharedMemory(place, f"host of {place}", needed << 20, free)

    check_shared_memory([rank("a", 32), rank("a", 32), rank("b", 60), rank("c", 999, None)])
    with pytest.raises(OSError, match=r"/dev/shm of host of b has 64\.0 MiB free, .* for the 2 ranks there need 65\.0"):
        check_shared_memory([rank("a", 40), rank("b", 40), rank("b", 25)])
    with pytest.raises(OSError, match=r"has 0\.0 MiB free, .* for the rank there need 1\.0 MiB"):
        check_shared_memory([rank("a", 1, 0)])


@pytest.mark.parametrize("variable", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_cache_where_nothing_can_be_compiled_is_named(variable: str, tmp_path: Path, monkeypatch) -> None:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    check_compiler_cache()
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    message = rf"train.compile=true: {tmp_path}/file is not a folder, where its cache should be; set {variable} to"
    with pytest.raises(OSError, match=message):
        check_compiler_cache()
