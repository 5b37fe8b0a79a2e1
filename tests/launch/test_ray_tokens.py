"""A Ray cluster with a token, started by the recipe's own lines: `ddetr` with the right token, a wrong one and none.

The nodes are network namespaces; nothing outside of them is listened on.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.core.runs import SMALL, kill
from tests.launch.nodes import FIRST, NODES, SECOND, joined, named, on

REPOSITORY = Path(__file__).resolve().parent.parent.parent
BOTH = re.compile(r"RAY_AUTH_MODE=token RAY_AUTH_TOKEN=TOKEN")

Ddetr = Callable[..., subprocess.CompletedProcess[str]]
pytestmark = pytest.mark.slow


def recipe(beginning: str) -> str:
    """The one line of the recipes that begins so, without its remark."""
    lines = (REPOSITORY / "docs/recipes.md").read_text().splitlines()
    (line,) = {line.partition("   #")[0].strip() for line in lines if line.startswith(beginning)}
    return line


def environment(home: Path, **variables: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return clean | {"HOME": str(home)} | variables


@pytest.fixture(scope="module")
def token() -> Iterator[str]:
    """The token of a cluster of two nodes, which stands at node0:6379."""
    with joined() as nodes, named(nodes):
        folder = Path(tempfile.mkdtemp(prefix="ray_"))  # short: the paths of Ray's sockets go into 107 characters
        started = []
        try:
            export = subprocess.run(
                ["bash", "-c", f"{recipe('export RAY_AUTH_MODE')}; printf '%s %s' $RAY_AUTH_MODE $RAY_AUTH_TOKEN"],
                capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            mode, value = export.stdout.split()
            variables = environment(folder, RAY_AUTH_MODE=mode, RAY_AUTH_TOKEN=value, RAY_USAGE_STATS_ENABLED="0")
            for name, line in ((FIRST, recipe("ray start --head")), (SECOND, recipe("ray start --address"))):
                own = {"RAY_TMPDIR": f"{folder}/{name}"}
                command = f"{line} --num-cpus=1 --object-store-memory=100000000 --block"
                with (folder / f"{name}.log").open("w") as log:
                    process = subprocess.Popen(
                        [*on(name), "bash", "-c", f"exec {command}"], env=variables | own, stdout=log, stderr=log
                    )
                started.append(process)
                for _ in range(600):
                    text = (folder / f"{name}.log").read_text()
                    if "Ray runtime started" in text:
                        break
                    assert process.poll() is None, text
                    subprocess.run(["sleep", "0.2"], check=True)
                assert "Ray runtime started" in text
            yield value
        finally:
            for process in started:
                kill(process)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def ddetr(token: str, run_directory: Path, synthetic_shards: Path, tmp_path: Path) -> Ddetr:
    """Runs one line of the recipes on the first node, where `runs/coco`, `shards` and `sweep.yaml` are."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/coco").symlink_to(run_directory)
    (tmp_path / "shards").symlink_to(synthetic_shards)
    overrides = [
        *SMALL,
        "data.train=shards",
        "data.validation=shards",
        "train.epochs=1",
        "train.evaluate_every_epochs=1",
    ]
    search = {"optim.clip_norm": {"choice": [0.1, 0.2]}}
    sweep = {"base": "tiny", "overrides": overrides, "samples": 2, "concurrent": 2, "search": search, "output": "out"}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))

    def run(line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*on(FIRST), "bash", "-c", f"exec {line}"],
            env=environment(tmp_path, **variables), cwd=tmp_path,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip

    return run


def test_evaluation_with_the_token_alone(ddetr: Ddetr, token: str, tmp_path: Path) -> None:
    line = recipe("ddetr eval runs/coco --ray node0")
    result = ddetr(f"{line} --output out", RAY_AUTH_TOKEN=token)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 worker(s)" in result.stdout
    assert (tmp_path / "out/evaluation.json").is_file()


def test_search_with_both_variables(ddetr: Ddetr, token: str, tmp_path: Path) -> None:
    result = ddetr("ddetr tune sweep.yaml --ray node0:6379", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "out/results.json").is_file()
    assert "trials, the best first" in result.stdout


def test_training_with_a_token_in_the_home(ddetr: Ddetr, token: str, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray/auth_token").write_text(token)
    settings = " ".join([*SMALL, "train.max_steps=2", "train.name=run", "data.train=shards"])
    result = ddetr(f"ddetr train tiny {settings} --ray node0:6379 --ranks 2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"1 on {NODES[FIRST]}, 1 on {NODES[SECOND]}" in result.stdout
    assert (tmp_path / "runs/run/checkpoints/step_00000002/checkpoint.json").is_file()


def test_a_client_with_a_token_in_a_file(ddetr: Ddetr, token: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(token)
    result = ddetr("ddetr eval runs/coco --ray ray://127.0.0.1:10001 --output out", RAY_AUTH_TOKEN_PATH="token")
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "out/evaluation.json").is_file()


MISTAKES = (
    ({}, "wants a token, and there is none here"),
    ({"RAY_AUTH_TOKEN": "a" * 64}, "wants a token, and refuses the one that it gets from here"),
    ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}, "wants a token, and refuses the one"),
    ({"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "a" * 64}, "wants a token, but RAY_AUTH_MODE=disabled"),
    ({"RAY_AUTH_TOKEN_PATH": "absent"}, "RAY_AUTH_TOKEN_PATH is set but file cannot be opened"),
)


@pytest.mark.parametrize(
    ("address", "mistakes"), [("node0:6379", MISTAKES), ("ray://127.0.0.1:10001", MISTAKES[:2]), ("auto", MISTAKES[:2])]
)
def test_a_wrong_token_and_none_are_one_message(ddetr: Ddetr, address: str, mistakes: tuple) -> None:
    for variables, said in mistakes:
        result = ddetr(f"ddetr eval runs/coco --ray {address} --output out", RAY_ADDRESS="node0:6379", **variables)
        assert result.returncode == 2, result.stdout
        assert said in result.stderr
        assert BOTH.search(result.stderr)
        assert result.stderr.count("\n") == 1, result.stderr
