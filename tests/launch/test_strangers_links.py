"""Links in a stranger's run directory: nothing is written, deleted or shown through one that leads out of it."""

import os
import shutil
from pathlib import Path

import pytest
from ddetr.core.checkpoint.manifest import write_checkpoint
from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.evaluation import result
from ddetr.core.ownership import ForeignSettingError, check_links
from ddetr.data.files import write_whole
from ddetr.launch.record import write_targets
from PIL import Image

from tests.launch.strangers import Stranger, everything, refusal, rewritten, run
from tests.processes import finished

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("new_account")]


def test_weights_alone_write_beside_them_through_no_link(run_directory: Path, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "theirs", tmp_path / "projects"
    folder.mkdir()
    elsewhere.mkdir()
    shutil.copy(run_directory / "checkpoints/step_00000020" / WEIGHTS, folder)
    (folder / "model_eval").symlink_to(elsewhere)
    assert f"model_eval is a link to {elsewhere}" in refusal(run("eval", folder / WEIGHTS))
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("link", ["eval", "eval/photo.png"])
def test_a_report_shows_no_picture_from_elsewhere(link: str, stranger: Stranger, tmp_path: Path) -> None:
    folder, photos = stranger(), tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (32, 32)).save(photos / "photo.png")
    (folder / link).parent.mkdir(exist_ok=True)
    (folder / link).symlink_to(photos if link == "eval" else photos / "photo.png")
    assert run("report", folder).exception is None
    assert "photo.png" not in (folder / "report.html").read_text()
    (folder / link).unlink()
    (folder / "eval").mkdir(exist_ok=True)
    shutil.copy(photos / "photo.png", folder / "eval")
    assert run("report", folder).exception is None
    assert "photo.png" in (folder / "report.html").read_text()


def test_files_are_written_aside_through_no_link(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    checkpoint, pid = tmp_path / "run/checkpoints/step_00000001", os.getpid()
    checkpoint.mkdir(parents=True)
    names = [f"run/{name}" for name in ("config.yaml", "targets.json", "report.html", "checkpoints/latest")]
    for path in (*(tmp_path / name for name in names), checkpoint / "evaluation.json"):
        path.with_name(f".{path.name}.{pid}.partial").symlink_to(victim)
    measure = result.Measure("0" * 64, "1" * 64)
    result.write(checkpoint, result.Result({"AP": 0.5}, "AP", 24, 0, 1.5, 1e9, 1, 1, None, measure))
    write_whole(tmp_path / "run/config.yaml", b"model: {}\n")
    write_targets(tmp_path / "run/targets.json", [])
    assert run("report", tmp_path / "run").exception is None
    write_checkpoint(checkpoint, 0, lambda folder: (folder / "weights").touch(), {})
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["eval", "eval/step_00000020"])
def test_nothing_is_written_through_a_link(name: str, stranger: Stranger, tmp_path: Path) -> None:
    folder, elsewhere = stranger(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(elsewhere)
    assert f"{folder / name} is a link to {elsewhere}" in refusal(run("eval", folder))
    assert not list(elsewhere.iterdir())


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl", "events.jsonl", "checkpoints"])
def test_what_leads_out_of_a_run_is_named(name: str, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    folder.mkdir()
    (folder / name).symlink_to(elsewhere)
    with pytest.raises(ForeignSettingError, match=f"{name} is a link to {elsewhere}"):
        check_links(folder, folder / name)
    (folder / name).unlink()
    (folder / "kept").touch()
    (folder / name).symlink_to("kept")
    (tmp_path / "link").symlink_to(folder)  # of the whole run
    check_links(tmp_path / "link", tmp_path / "link" / name)
    os.mkfifo(folder / "pipe")
    with pytest.raises(
        ForeignSettingError, match=f"{folder}/pipe is neither a file nor a folder, and this command would"
    ):
        check_links(folder, folder / "pipe")


@pytest.mark.slow
def test_a_run_that_goes_on_writes_through_no_link(run_directory: Path, synthetic_shards: Path, tmp_path: Path) -> None:
    folder, elsewhere = rewritten(run_directory, tmp_path / "stranger"), tmp_path / "elsewhere"
    elsewhere.write_text("mine\n")
    (folder / "log.txt").symlink_to(elsewhere)
    before = everything(tmp_path)
    done = finished("train", "--resume", folder, f"data.train={synthetic_shards}")
    assert done.returncode == 2
    assert f"log.txt is a link to {elsewhere}" in done.stderr
    assert everything(tmp_path) == before
