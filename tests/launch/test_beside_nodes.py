"""A run of two ranks, and a Ray cluster of two nodes that evaluates its checkpoints while all kinds of things fail.

Each checkpoint that is due gets its number once, or is said to have none; training takes its steps meanwhile.
"""

import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from ddetr.core.evaluation import result
from ddetr.data.shards import pack
from ddetr.data.synthetic import draw_set
from ddetr.launch.evaluate import evaluate

from tests.core.runs import SMALL, collect, command, kill
from tests.launch.nodes import ENVIRONMENT, FIRST, RAY_TOKEN, SECOND, RayNodes, on

pytestmark = pytest.mark.slow

EVERY = 60  # steps between evaluations


@pytest.fixture(scope="module")
def validation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """240 images of 96 pixels in about 20 shards."""
    folder = tmp_path_factory.mktemp("validation")
    draw_set(folder / "coco", images=240, size=96, classes=3, seed=11, workers=1)
    shards = folder / "shards"
    pack(folder / "coco/annotations.json", folder / "coco/images", shards, workers=1, shard_bytes=100 << 10)
    return shards


@pytest.fixture
def ray_nodes(nodes: dict[str, str]) -> Iterator[RayNodes]:
    with RayNodes(nodes) as started:
        yield started


class Training:
    """`ddetr train` with two ranks in the first namespace, and what it has recorded so far."""

    def __init__(self, folder: Path, address: str, *settings: str) -> None:
        self.folder, self.directory = folder, folder / "run"
        self._settings = ["train.name=run", f"train.output={folder}", f"eval.ray={address}", *settings]
        self._settings += ["train.auto_resume=true", "train.keep_checkpoints=2", "train.evaluate_every_epochs=10"]
        self._settings += ["train.checkpoint_every_epochs=10", "eval.most_waiting=3"]
        self._starts = 0
        self.start()

    def start(self) -> None:
        self._starts += 1
        line = [*on(FIRST), *command(2, "tiny", *SMALL, *self._settings)]
        with (self.folder / f"training.{self._starts}.log").open("w") as log:
            self.process = subprocess.Popen(
                line, env=ENVIRONMENT | RAY_TOKEN, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def printed(self) -> str:
        return "".join(log.read_text() for log in sorted(self.folder.glob("training.*.log")))

    @property
    def step(self) -> int:
        steps = collect(self.directory, "", 0).steps
        return steps[-1]["step"] if steps else 0

    def events(self, name: str) -> list[dict]:
        return [event for event in collect(self.directory, "", 0).events if event["event"] == name]

    @property
    def evaluated(self) -> list[int]:
        return [event["step"] for event in self.events("evaluation")]

    def until(self, done: Callable[[], object], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not done():
            assert self.process.poll() is None, self.printed[-5000:]
            assert time.monotonic() < deadline, f"{what}: {self.printed[-5000:]}"
            time.sleep(0.3)

    def until_evaluated(self, more: int = 1) -> None:
        """Until so many checkpoints more, that are saved from now on, have their number."""
        step = self.step
        self.until(lambda: sum(found > step for found in self.evaluated) >= more, f"evaluations after step {step}")

    def stop(self) -> None:
        """Ends the run, and looks at what has become of every checkpoint that was due."""
        self.until(lambda: not any(step > max(self.evaluated) for step in self.due), "the last evaluation")
        self.process.send_signal(signal.SIGTERM)
        assert self.process.wait(120) == 128 + signal.SIGTERM, self.printed[-3000:]  # torchrun's way
        assert "stopped after step" in self.printed
        self.account()

    @property
    def due(self) -> set[int]:
        return {event["step"] for event in self.events("checkpoint") if event["step"] % EVERY == 0}

    @property
    def left(self) -> set[int]:
        """Said to have no number."""
        return {event["step"] for event in self.events("evaluation_missed") if not event["again"]}

    def account(self) -> None:
        ended, left = Counter(self.evaluated), self.left
        assert all(count == 1 for count in ended.values()), ended
        assert self.due, "no checkpoint was due"
        assert not left & set(ended)
        held = {
            int(path.name[5:]) for path in self.directory.glob("checkpoints/step_*")
        }  # of these a resume takes care
        assert self.due <= left | set(ended) | held


@contextlib.contextmanager
def running(training: Training) -> Iterator[Training]:
    try:
        yield training
    finally:
        kill(training.process)


@pytest.fixture
def settings(synthetic_shards: Path, validation: Path) -> list[str]:
    return [f"data.train={synthetic_shards}", f"data.validation={validation}", "train.epochs=100000"]


def workers(tree: subprocess.Popen) -> list[psutil.Process]:
    """The Ray workers of a node that evaluate."""
    found = []
    for process in psutil.Process(tree.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "ray::ShardWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_workers_a_node_and_the_head_are_lost(
    ray_nodes: RayNodes, settings: list[str], validation: Path, tmp_path: Path
) -> None:
    ray_nodes.start(FIRST)
    ray_nodes.start(SECOND)
    with running(Training(tmp_path, ray_nodes.address, *settings)) as training:
        training.until(lambda: training.evaluated, "the first evaluation")
        assert (result.read(training.directory / f"eval/step_{training.evaluated[0]:08d}")[0].by) == "train"

        training.until(lambda: workers(ray_nodes.processes[SECOND]), "a worker on the second node")
        for worker in workers(ray_nodes.processes[SECOND]):
            worker.kill()
        training.until_evaluated()

        ray_nodes.kill(SECOND)
        training.until_evaluated(2)
        ray_nodes.start(SECOND)
        training.until_evaluated()

        ray_nodes.kill(FIRST)
        gone, step = time.monotonic(), training.step
        training.until(lambda: training.events("evaluation_missed"), "what is missed")
        training.until(lambda: time.monotonic() - gone > 120, "two minutes")
        assert training.step > step + EVERY, "training waits"
        kinds = {event["kind"] for event in training.events("evaluation_missed")}
        assert "unreachable" in kinds
        assert kinds <= {"unreachable", "failed", "left_out"}
        ray_nodes.kill(SECOND)  # its raylet has given up by now, or is about to
        ray_nodes.start(FIRST)
        ray_nodes.start(SECOND)
        training.until_evaluated(2)
        training.stop()
        newest = max(training.evaluated)
        kept = training.directory / f"checkpoints/step_{newest:08d}"
        if kept.exists():
            expected = evaluate(kept, [], data=[validation], output=tmp_path / "here")
            assert result.read(kept)[-1].metrics == expected
            for name in ("detections.json", "ground_truth.json"):
                there = training.directory / "eval" / kept.name / name
                assert there.read_bytes() == (tmp_path / "here" / name).read_bytes()


def test_a_machine_that_is_no_node_is_told_of_the_proxy(
    ray_nodes: RayNodes, run_directory: Path, tmp_path: Path
) -> None:
    """Ray itself would end the process, with a stack."""
    ray_nodes.start(FIRST)
    line = [*on(SECOND), sys.executable, "-m", "ddetr.launch.cli", "eval", str(run_directory), "--ray"]
    line += [ray_nodes.address, "--output", str(tmp_path)]
    ended = subprocess.run(line, env=ENVIRONMENT | RAY_TOKEN, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2, ended.stderr
    assert "this machine is no node of the Ray cluster at 10.117.0.1:6379: join it" in ended.stderr
    assert "ray://10.117.0.1:10001" in ended.stderr


def test_a_killed_trainer_goes_on_with_what_it_had_handed_over(
    ray_nodes: RayNodes, settings: list[str], tmp_path: Path
) -> None:
    ray_nodes.start(FIRST)
    with running(Training(tmp_path, ray_nodes.address, *settings)) as training:
        training.until(lambda: workers(ray_nodes.processes[FIRST]), "a worker")
        kill(training.process)
        deadline = time.monotonic() + 60
        while workers(ray_nodes.processes[FIRST]):  # they end with the process beside rank 0, and that with rank 0
            assert time.monotonic() < deadline
            time.sleep(0.2)
        handed_over = training.due - set(training.evaluated)
        training.start()
        training.until(lambda: handed_over <= set(training.evaluated) | training.left, "what was handed over")
        training.until_evaluated()
        training.stop()


def test_a_node_that_lacks_the_shards_is_named(
    ray_nodes: RayNodes, settings: list[str], validation: Path, tmp_path: Path
) -> None:
    ray_nodes.start(FIRST)
    ray_nodes.start(SECOND, before=f"mount -t tmpfs none {validation}")
    limits = ["train.epochs=20", "eval.wait_minutes=5"]
    with running(Training(tmp_path, ray_nodes.address, *settings, *limits)) as training:
        assert training.process.wait(400) == 0, training.printed  # with another status torchrun would start it again
        assert "is trained, but the evaluation of step 120 is missing" in training.printed
        assert training.step == 120
        missed = training.events("evaluation_missed")
        assert all("cannot read the shards" in event["reason"] for event in missed if event["kind"] == "failed")
        assert [(event["step"], event["again"]) for event in missed if event["step"] == 120][-1] == (120, False)
        training.account()


def test_a_node_with_other_programs_is_named_before_anything_starts(
    ray_nodes: RayNodes, settings: list[str], nodes: dict[str, str], tmp_path: Path
) -> None:
    other = tmp_path / "other/torch-1.0.dist-info/METADATA"
    other.parent.mkdir(parents=True)
    other.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    ray_nodes.start(FIRST)
    ray_nodes.start(SECOND, PYTHONPATH=str(other.parent.parent))
    limits = ["train.epochs=20", "eval.wait_minutes=0.3"]
    with running(Training(tmp_path, ray_nodes.address, *settings, *limits)) as training:
        assert training.process.wait(400) == 0, training.printed
        missed = training.events("evaluation_missed")
        assert any(f"node {nodes[SECOND]} has torch 1.0, here " in event["reason"] for event in missed), missed
        assert not training.evaluated
        assert training.step == 120
        training.account()
