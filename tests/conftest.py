"""Fixtures that several folders of tests use: real images, a small set of real shards, lvis-api, the wheel."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from types import ModuleType

import pytest

# Tests start processes that share few cores; OpenMP threads that spin while they wait would slow all by ten times.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if "PYTEST_XDIST_WORKER" in os.environ:  # what is not told how many threads to have shares the cores with other tests
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a run of this account was trained with is remembered there: not in the home of who runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="ddetr-state-")

STARTS = frozenset(("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"))  # events of sys.audit
_alone: list[str] = []  # the test at hand, if it is one of `make unit`


def _refuse_processes(event: str, arguments: tuple) -> None:
    if event in STARTS and _alone and arguments[:1] != ("fc-list",):  # Matplotlib's first import lists the fonts
        raise AssertionError(f"{_alone[0]} starts a process ({event}): mark it with pytest.mark.integration")


sys.addaudithook(_refuse_processes)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Tests of `make unit` start no process."""
    if not any(map(item.get_closest_marker, ("integration", "slow", "gpu"))):
        _alone.append(item.nodeid)
    try:
        return (yield)
    finally:
        _alone.clear()


REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture
def new_account(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """An account whose earlier runs were given nothing: what other tests have given to theirs is own, too."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))


@pytest.fixture(scope="session")
def coco_free() -> Path:
    """121 real COCO images with annotations.json, annotations_train.json, annotations_val.json and images/."""
    path = Path(os.environ.get("DDETR_COCO_FREE", REPOSITORY.parent / "shared/coco/coco_free"))
    if not path.is_dir():
        pytest.skip(f"{path} is absent; put the data there or set DDETR_COCO_FREE to its folder")
    return path


@pytest.fixture(scope="session")
def synthetic_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards with 24 procedural images of 96 pixels and 3 classes."""
    from ddetr.data.shards import pack
    from ddetr.data.synthetic import draw_set

    folder = tmp_path_factory.mktemp("synthetic")
    draw_set(folder / "coco", images=24, size=96, classes=3, seed=7, workers=1)
    shards = folder / "shards"
    pack(folder / "coco/annotations.json", folder / "coco/images", shards, workers=1, shard_bytes=64 << 10)
    return shards


@pytest.fixture(scope="module")
def lvis_api() -> Iterator[ModuleType]:
    """The published evaluation of LVIS: its drawing wants OpenCV, its numbers np.float, which numpy 1.24 took away."""
    import numpy as np

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "cv2", ModuleType("cv2"))
        patch.setattr(np, "float", float, raising=False)
        lvis = pytest.importorskip("lvis", reason="lvis is absent: pip install -c constraints.txt --no-deps lvis")
        logging.getLogger("lvis").setLevel(logging.ERROR)
        yield lvis


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make wheel` builds."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(REPOSITORY)]
    subprocess.run([sys.executable, "-m", *build], check=True, timeout=1800)
    (built,) = folder.glob("*.whl")
    return built
