"""docs/extending.md: the files that it shows are put into a folder and train together, started by its launcher."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.runs import Run, collect, free_port
from tests.launch.documents import Document

DOCUMENT = Document(Path("docs/extending.md"))
FILES = ("sides.py", "found.py", "steps.py", "program.py", "plain.py", "two_ranks.sh", "sitecustomize.py")
# Two steps of 8 images, each rank four of them, of the preset that the page names.
SETTINGS = ("train.max_steps=2", "train.log_every_steps=1", "train.threads=1", "train.bandwidth_test_seconds=0")


def command(line: str) -> list[str]:
    """The one command of the page that holds this text, with this interpreter."""
    (words,) = [words for words in DOCUMENT.shell_lines if line in " ".join(words)]
    return [{"python": sys.executable, "ddetr": str(Path(sys.executable).with_name("ddetr"))}.get(w, w) for w in words]


def done(words: list[str], folder: Path, **variables: str) -> str:
    result = subprocess.run(
        words,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **variables},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, synthetic_shards: Path) -> Path:
    """The page's files, and the shards that its commands name."""
    folder = tmp_path_factory.mktemp("extending")
    for block in DOCUMENT.blocks("python", "sh"):
        if name := re.match(r"(?:#!.*\n)?# ([\w.]+)", block):
            (folder / name[1]).write_text(block)
    assert {path.name for path in folder.iterdir()} == set(FILES)
    (folder / "shards").mkdir()
    for part in ("train", "val"):
        (folder / "shards" / part).symlink_to(synthetic_shards)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """The page's last line of the launcher: its program in two ranks, with all that it adds."""
    words = [*command("bash two_ranks.sh python program.py"), *SETTINGS, "train.name=mine", "monitor.port=0"]
    said = done(words, folder, MASTER_PORT=str(free_port()))
    return collect(folder / "runs/mine", said, 0)


@pytest.mark.integration
def test_a_part_of_the_loss(run: Run) -> None:
    for step in run.steps:
        losses = step["losses"]
        assert step["parts"] == ["class", "l1", "giou", "sides"]
        assert losses["sides"] > 0
        assert losses["total"] == pytest.approx(sum(losses[part] for part in step["parts"]))


@pytest.mark.integration
def test_a_score(run: Run) -> None:
    lines = [json.loads(line) for line in (run.directory / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [line for line in lines if line["kind"] == "evaluation"]
    (result,) = run.directory.glob("checkpoints/*/evaluation.json")
    assert 0 <= evaluation["metrics"]["found"] <= 1
    assert f'"found": {evaluation["metrics"]["found"]}' in result.read_text()
    assert re.search(r"evaluated step 2 on 24 images .* found \d\.\d{3}", run.output)


@pytest.mark.integration
def test_an_observer(run: Run, folder: Path) -> None:
    first, second, evaluation = (folder / "steps.txt").read_text().splitlines()
    assert re.fullmatch(r"step 1: loss \d+\.\d{3}, 8 images", first)
    assert re.fullmatch(r"step 2: loss \d+\.\d{3}, 8 images", second)
    assert re.fullmatch(r"evaluation after step 2: found [01]\.\d{3}", evaluation)
    assert len(run.steps) == 2


@pytest.mark.integration
def test_a_backbone(run: Run) -> None:
    from ddetr.core.checkpoint import contents

    found = contents(run.directory)
    stages = {name: shape for name, shape in found.shapes.items() if name.startswith("backbone.body.stages")}
    assert [stages[f"backbone.body.stages.{i}.0.weight"] for i in (0, 4)] == [(16, 3, 3, 3), (96, 64, 3, 3)]
    assert found.config.model.backbone == "plain"


@pytest.mark.integration
def test_a_launcher(run: Run) -> None:
    """Both of its ranks have trained: each has half of the step's images, and the store of one port for each."""
    assert [event["ranks"] for event in run.events if "ranks" in event] == [2]
    assert [step["images"] for step in run.steps] == [8, 8]


@pytest.mark.integration
def test_the_commands_with_what_was_added(run: Run, folder: Path) -> None:
    words = command("ddetr eval runs/mine")
    variable, _, value = words[0].partition("=")
    (run.directory / "checkpoints/step_00000002/evaluation.json").unlink()
    said = done([*words[1:], "train.device=cpu"], folder, **{variable: value})
    assert re.search(r"found\D+[01]\.\d", said), said


def test_a_backbone_of_timm() -> None:
    from ddetr.core.config import load
    from ddetr.core.model.backbone import Backbone

    _, _, preset, *overrides = command("ddetr model r50")
    assert Backbone(load(preset, overrides).model).channels == (16, 24, 288)
