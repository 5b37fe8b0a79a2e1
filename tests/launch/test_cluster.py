"""A Ray cluster of our own: on loopback alone, with files that only this user reads, and nothing left in the home."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from ddetr.launch.cluster import reachable

from tests.core.runs import SMALL, kill
from tests.launch.listening import beyond_loopback, listening_until

pytestmark = pytest.mark.integration


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Runs `ddetr` on a Ray of its own until it has left `result`, and looks at that Ray all the time."""
    temporary = Path(tempfile.mkdtemp(prefix="ray_"))  # short: the paths of Ray's sockets go into 107 characters
    (tmp_path / "home").mkdir()

    def run(result: Path, *arguments: str | Path) -> None:
        line = [sys.executable, "-m", "ddetr.launch.cli", *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"HOME": f"{tmp_path}/home", "RAY_TMPDIR": str(temporary)}
        with (tmp_path / "log").open("w") as log:
            process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, cwd=tmp_path)
        modes = set()

        def ended() -> bool:
            modes.update(folder.stat().st_mode & 0o777 for folder in temporary.iterdir())
            return process.poll() is not None

        try:
            sockets = listening_until(process.pid, ended)
        finally:
            kill(process)
        output = (tmp_path / "log").read_text()
        assert result.is_file(), output
        assert {"gcs_server", "raylet"} <= {name for _, _, name in sockets}, f"no Ray ran:\n{output}"
        assert beyond_loopback(sockets) == set()
        assert modes == {0o700}
        assert list(temporary.iterdir()) == []
        assert not (tmp_path / "home/.ray").exists()

    yield run
    shutil.rmtree(temporary)


@pytest.mark.slow
def test_evaluation(own: Callable[..., None], run_directory: Path, tmp_path: Path) -> None:
    own(tmp_path / "out/evaluation.json", "eval", run_directory, "--ray", "--output", tmp_path / "out")


@pytest.mark.slow
def test_training(own: Callable[..., None], synthetic_shards: Path, tmp_path: Path) -> None:
    settings = [*SMALL, f"data.train={synthetic_shards}", "train.output=runs", "train.name=run", "train.max_steps=3"]
    saved = tmp_path / "runs/run/checkpoints/step_00000003/checkpoint.json"
    own(saved, "train", "tiny", *settings, "--ray", "--ranks", "2")


@pytest.mark.slow
def test_search(own: Callable[..., None], synthetic_shards: Path, tmp_path: Path) -> None:
    """Also a path that is relative to where the command runs, which is not where Ray runs a trial."""
    overrides = [*SMALL, "data.train=shards", "data.validation=shards"]
    overrides += ["train.epochs=1", "train.evaluate_every_epochs=1"]
    search = {"optim.clip_norm": {"choice": [0.1, 0.2]}}
    sweep = {"base": "tiny", "overrides": overrides, "samples": 1, "search": search, "output": "out"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    (tmp_path / "shards").symlink_to(synthetic_shards)
    own(tmp_path / "out/trials/trial_00000/checkpoints/step_00000006/checkpoint.json", "tune", "sweep.yaml")


def test_the_object_store_is_small() -> None:
    """Ray by itself takes 30 % of the memory."""
    code = (
        "from ddetr.launch.cluster import cluster; import os, ray\n"
        "with cluster('local'):\n"
        "    print(ray.cluster_resources()['object_store_memory'])\n"
        "    print(os.environ['RAY_AUTH_MODE'], len(os.environ['RAY_AUTH_TOKEN']))\n"
        "print([name for name in os.environ if name.startswith('RAY_AUTH')])\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    size, token, left = result.stdout.splitlines()
    assert float(size) <= min(2 << 30, 0.31 * psutil.virtual_memory().total)
    assert token == "token 64"
    assert left == "[]", "the caller's environment is as it was"


@pytest.mark.parametrize("named", ["http://127.0.0.1:8265/", "10.0.0.1", "local"])
def test_an_address_of_another_form_in_the_environment_is_named(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", named)
    said = rf"^RAY_ADDRESS={re.escape(named)}: expected HOST:PORT, ray://HOST:PORT"
    with pytest.raises(ValueError, match=said), reachable("auto"):
        pass
