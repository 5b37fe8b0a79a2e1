"""Which run it is, for Prometheus: runs of one name are told apart, a run stays itself through resumes and moves."""

import shutil
from pathlib import Path

import pytest
from ddetr.launch.identity import FILE, Identity, identify


@pytest.fixture
def run(tmp_path: Path) -> Identity:
    (tmp_path / "mine/coco").mkdir(parents=True)
    begun = identify(tmp_path / "mine/coco")
    begun.write()
    return begun


def test_runs_of_one_name_differ_and_a_resumed_one_is_the_same(run: Identity, tmp_path: Path) -> None:
    assert run.label == f"coco@{run.identity}"
    other = identify(tmp_path / "theirs/coco")
    assert other.label.startswith("coco@")
    assert other.label != run.label
    assert identify(tmp_path / "mine/coco") == run


def test_a_moved_run_is_the_same_and_a_copy_another(run: Identity, tmp_path: Path) -> None:
    shutil.copytree(tmp_path / "mine", tmp_path / "copied")
    copied = identify(tmp_path / "copied/coco")
    assert copied.identity != run.identity
    shutil.rmtree(tmp_path / "copied")
    (tmp_path / "mine").rename(tmp_path / "moved")
    moved = identify(tmp_path / "moved/coco")
    assert moved.label == run.label
    moved.write()
    assert identify(tmp_path / "moved/coco") == moved


@pytest.mark.parametrize(
    "content", ["", "[]", '{"identity": "0123456789", "folder": "/"}', '{"identity": "a\\nb", "folder": "/"}', "{}"]
)
def test_an_unreadable_identity_is_told_and_replaced(
    run: Identity, content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "mine/coco" / FILE).write_text(content)
    with caplog.at_level("WARNING"):
        assert identify(tmp_path / "mine/coco").identity != run.identity
    assert f"{FILE} cannot be read" in caplog.text
