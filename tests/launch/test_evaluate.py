"""`ddetr eval`: real processes, a real Ray, real files."""

import contextlib
import io
import json
import math
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from ddetr.core.checkpoint.trained import load_detector
from ddetr.core.checkpoint.weights import WEIGHTS
from ddetr.core.config import ConfigError
from ddetr.core.evaluation import result
from ddetr.core.evaluation.coco import MEANINGS
from ddetr.core.evaluation.columns import to_coco
from ddetr.data.index import ShardIndex
from ddetr.data.location import Location
from ddetr.launch import history
from ddetr.launch.cluster import cluster
from ddetr.launch.evaluate import evaluate, named_sets
from ddetr.launch.evaluators import CPU_THREADS
from ddetr.launch.explain import explain
from ddetr.launch.predict import predict
from ddetr.launch.versions import check_nodes
from ddetr.launch.workers import ShardWorkers
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.core.runs import strict_json
from tests.launch.nodes import two_ray_nodes
from tests.processes import finished

pytestmark = pytest.mark.integration


def by_hand(folder: Path) -> list[float]:
    """pycocotools on the written files, as anyone would use it."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(folder / "ground_truth.json"))
        evaluation = COCOeval(truth, truth.loadRes(str(folder / "detections.json")), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def written(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("detections.json", "ground_truth.json")}


def metrics_of(folder: Path) -> dict[str, float]:
    """Of the one result in a folder."""
    (found,) = result.read(folder)
    return found.metrics


@pytest.fixture(scope="module")
def local(run_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of results of an evaluation in this process."""
    folder = tmp_path_factory.mktemp("local")
    evaluate(run_directory, [], output=folder)
    return folder


def test_the_written_files_give_the_numbers_by_hand(local: Path) -> None:
    metrics = metrics_of(local)
    assert list(metrics) == list(MEANINGS)
    assert list(metrics.values()) == by_hand(local)
    assert 0.05 < metrics["AP"] < 0.95, "the set is made so that a wrong box or label changes AP"
    ids = {row["category_id"] for row in json.loads((local / "detections.json").read_text())}
    truth = json.loads((local / "ground_truth.json").read_text())
    assert ids <= {category["id"] for category in truth["categories"]}
    assert ids != set(range(len(ids))), "labels instead of category ids would show"


def test_every_checkpoint_is_evaluated_into_the_run(run_directory: Path, local: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(run_directory / "checkpoints", run / "checkpoints")
    newest = evaluate(run, [], all_checkpoints=True)
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["step_00000010", "step_00000020"]
    assert written(run / "eval/step_00000020") == written(local)
    assert newest == metrics_of(local) == metrics_of(run / "checkpoints/step_00000020")
    found = {record["step"]: record["metrics"] for record in history.read(run).evaluations}  # as the report has them
    assert found == {step: metrics_of(run / f"checkpoints/step_{step:08d}") for step in (10, 20)}
    assert written(run / "eval/step_00000010")["detections.json"] != written(local)["detections.json"]


def test_checkpoints_come_go_and_are_damaged_meanwhile(run_directory: Path, local: Path, tmp_path: Path) -> None:
    """The shards' command, first called when step 10 is loaded, does what a training run does: deletes and saves."""
    run = tmp_path / "run"
    shutil.copytree(run_directory / "checkpoints", run / "checkpoints")
    for step in (15, 30):
        shutil.copytree(run / "checkpoints/step_00000020", run / f"checkpoints/step_{step:08d}")
    with (run / "checkpoints/step_00000015/model.safetensors").open("r+b") as file:
        file.truncate(1000)
    (run / "checkpoints/step_00000030").rename(tmp_path / "saved")
    shards = load_detector(run_directory).config.data.validation
    (tmp_path / "give").write_text(
        f"cd {tmp_path} && if [ -d saved ]; then\n"
        "  for step in 10 20; do mv run/checkpoints/step_000000$step .gone && rm -r .gone; done\n"
        "  mv saved run/checkpoints/step_00000030\n"
        f"fi\ncat {shards}/$1\n"
    )
    source = f"pipe:sh {tmp_path}/give {{}}"
    done = finished("eval", run, "--all", f"data.cache={tmp_path}/cache", "--data", source)
    assert sorted(path.name for path in (run / "eval").iterdir()) == ["step_00000010", "step_00000030"], done.stderr
    assert written(run / "eval/step_00000030") == written(local)
    assert written(run / "eval/step_00000010")["detections.json"] != written(local)["detections.json"]
    assert metrics_of(run / "eval/step_00000010")["AP"] != metrics_of(local)["AP"]  # of one deleted meanwhile
    assert f"{run}/checkpoints/step_00000020 was deleted meanwhile: left out" in done.stdout
    assert f"{run}/checkpoints/step_00000015 cannot be evaluated, the others go on: " in done.stdout
    assert done.returncode == 2
    head, *damaged = done.stderr.splitlines()[-2:]
    assert head == "ddetr: 1 checkpoint(s) could not be evaluated:"
    assert "step_00000015/model.safetensors: not a readable safetensors file" in damaged[0]


def test_what_keeps_results_from_being_written_is_told_before_the_work(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=re.escape(f"cannot be written: {tmp_path}/file is not a folder; give --output")):
        evaluate(run_directory, [], output=tmp_path / "file/results")
    run = tmp_path / "run"
    shutil.copytree(run_directory / "checkpoints", run / "checkpoints")
    (run / "checkpoints/step_00000020/evaluation.json").write_text("{")
    with pytest.raises(ValueError, match=r"evaluation\.json cannot be read .*: move it away, then evaluate anew"):
        evaluate(run, [])
    assert "images of" not in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1 checkpoint\(s\) could not be evaluated"):
        evaluate(run, [], all_checkpoints=True)
    assert metrics_of(run / "checkpoints/step_00000010")["AP"] > 0


def test_a_mistake_in_the_settings_of_all_is_told_once(run_directory: Path, tmp_path: Path) -> None:
    for override, message in (("eval.topk=3", "no such key"), ("model.queries=31", "fix the model")):
        with pytest.raises(ConfigError, match=message):
            evaluate(run_directory, [override], output=tmp_path, all_checkpoints=True)


def test_ray_gives_the_local_files_and_is_shut_down(run_directory: Path, local: Path, tmp_path: Path) -> None:
    evaluate(run_directory, [], ray_address="local", output=tmp_path)
    assert written(tmp_path) == written(local)
    assert metrics_of(tmp_path) == metrics_of(local)
    assert not ray.is_initialized()


def test_numbers_that_overflow_leave_no_score_and_no_bare_nan(
    run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights of a diverged run are finite and huge: products of them are not."""
    run = tmp_path / "run"
    shutil.copytree(run_directory / "checkpoints", run / "checkpoints")
    rewritten_weights(run / "checkpoints/step_00000010", lambda name: 1e38 if "linear1.weight" in name else None)
    with pytest.raises(FloatingPointError, match=r"step_00000010.*queries gave infinities or NaN") as refusal:
        evaluate(run, [], all_checkpoints=True)
    assert "step_00000020" not in str(refusal.value)
    found = {name: strict_json(data.decode()) for name, data in written(run / "eval/step_00000010").items()}
    (stored,) = strict_json((run / "checkpoints/step_00000010/evaluation.json").read_text())["results"]
    assert stored["metrics"] == dict.fromkeys(MEANINGS)
    assert all(math.isfinite(value) for row in found["detections.json"] for value in (*row["bbox"], row["score"]))
    assert metrics_of(run / "checkpoints/step_00000020")["AP"] > 0.05
    assert capsys.readouterr().out.count("not finite") == len(MEANINGS)

    image = sorted((run_directory.parent / "coco/images").iterdir())[0]
    with pytest.raises(FloatingPointError, match=f"{image.name}: [0-9]+ queries"):
        predict(run / "checkpoints/step_00000010", [image], tmp_path / "out", [])
    strict_json((tmp_path / "out/predictions.json").read_text())
    with pytest.raises(FloatingPointError, match=r"query [0-9]+: .* gives infinities or NaN"):
        explain(run / "checkpoints/step_00000010", image, tmp_path / "picture.png")


def rewritten_weights(checkpoint: Path, value: Callable[[str], float | None]) -> None:
    """Fill the tensors whose names have a value with it."""
    file = checkpoint / WEIGHTS
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    weights = load_file(file)
    for name, tensor in weights.items():
        if (filled := value(name)) is not None:
            tensor.fill_(filled)
    save_file(weights, file, metadata=metadata)


@pytest.mark.slow
class TestTwoNodes:
    """One cluster of two nodes on loopback for all of these; each node offers one CPU, so each holds one worker."""

    @pytest.fixture(scope="class")
    def address(self) -> Iterator[str]:
        with two_ray_nodes() as address:
            yield address

    def test_same_files_as_local(
        self, address: str, run_directory: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        evaluate(run_directory, [], ray_address=address, output=tmp_path)
        assert written(tmp_path) == written(local)
        assert "2 worker(s)" in capsys.readouterr().out
        assert not ray.is_initialized(), "the command leaves the cluster"

    def test_a_killed_workers_shard_is_evaluated_elsewhere(
        self, address: str, run_directory: Path, local: Path
    ) -> None:
        detector = load_detector(run_directory)
        index = ShardIndex.load(str(detector.config.data.validation))
        reports: list[str] = []
        killed: list[str] = []
        with cluster(address):
            workers = ShardWorkers("cpu", 1.0, None, CPU_THREADS, reports.append)

            def kill_one() -> None:
                while not (running := list(workers.running.values())):
                    time.sleep(0.001)
                worker, shard = running[0]
                os.kill(worker.process, signal.SIGKILL)
                killed.append(index.shards[shard].name)

            killer = threading.Thread(target=kill_one, daemon=True)  # a shard takes less than the progress is told
            killer.start()
            try:
                results = list(workers.evaluate(detector, index, lambda images: None))
            finally:
                workers.close()
        assert killed
        assert any(killed[0] in report and "died" in report for report in reports), reports
        assert sorted(result.shard for result in results) == list(range(len(index.shards)))
        rows = [row for found in sorted(results, key=lambda found: found.shard) for row in to_coco(found.detections)]
        assert rows == json.loads((local / "detections.json").read_text())

    def test_nothing_of_an_evaluation_that_ends_early_comes_into_the_next(
        self, address: str, run_directory: Path, local: Path
    ) -> None:
        detector = load_detector(run_directory)
        index = ShardIndex.load(str(detector.config.data.validation))
        with cluster(address):
            workers = ShardWorkers("cpu", 1.0, None, CPU_THREADS, print)
            try:
                first = workers.evaluate(detector, index, lambda images: None)
                next(first)
                assert workers.running, "more shards than workers"
                first.close()  # as an error of who counts does
                assert not workers.running
                results = list(workers.evaluate(detector, index, lambda images: None))
            finally:
                workers.close()
        assert sorted(result.shard for result in results) == list(range(len(index.shards)))
        rows = [row for found in sorted(results, key=lambda found: found.shard) for row in to_coco(found.detections)]
        assert rows == json.loads((local / "detections.json").read_text())

    def test_nodes_are_known_when_they_have_answered(self, address: str) -> None:
        with cluster(address):
            nodes = ray.nodes()
            assert check_nodes(nodes) == {node["NodeID"] for node in nodes}
            assert check_nodes([{**nodes[0], "NodeID": "01" * 28}]) == set(), "it is lost"

    def test_a_node_without_the_shards_is_named(self, address: str, run_directory: Path, tmp_path: Path) -> None:
        detector = load_detector(run_directory)
        index = ShardIndex.load(str(detector.config.data.validation))
        index.real_location = Location(tmp_path / "elsewhere")
        with cluster(address):
            workers = ShardWorkers("cpu", 1.0, None, CPU_THREADS, print)
            try:
                with pytest.raises(
                    OSError, match=r"node \S+ cannot read the shards; every node .*elsewhere: no such folder"
                ):
                    list(workers.evaluate(detector, index, lambda images: None))
            finally:
                workers.close()


@pytest.mark.slow
def test_weights_that_do_not_fit_into_the_object_store_go_to_the_disk(
    make_run: Callable[..., Path], synthetic_shards: Path, tmp_path: Path
) -> None:
    """ResNet-50's are 100 MB; a node's store has 78 MB, the least that Ray allows."""
    backbone = ["model.backbone=resnet50.tv_in1k", "model.pretrained_backbone=false"]
    run = make_run(tmp_path / "run", synthetic_shards, (10,), *backbone)
    assert (run / "checkpoints/step_00000010" / WEIGHTS).stat().st_size > 90 << 20
    evaluate(run, [], output=tmp_path / "here")
    with two_ray_nodes(object_store_memory=78_643_200) as address:
        evaluate(run, [], ray_address=address, output=tmp_path / "there")
    assert written(tmp_path / "there") == written(tmp_path / "here")


@pytest.mark.slow
def test_workers_share_a_gpu(
    run_directory: Path, local: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The GPU is one that Ray is told of; torch sees none here, and the workers take the CPU."""
    with two_ray_nodes(num_gpus=1) as address:
        evaluate(run_directory, ["train.device=auto", "eval.gpus=0.5"], ray_address=address, output=tmp_path)
    assert "Ray: 2 worker(s) for " in (said := capsys.readouterr().out)
    assert "each with 0.5 GPU" in said
    assert written(tmp_path) == written(local)


def test_each_of_several_sets_has_a_name() -> None:
    assert named_sets([]) == {"": None}
    assert named_sets(["a/val"]) == {"": "a/val"}
    several = ["a/val/", "s3://bucket/test", "pipe:cat /shards/{}", "somewhere/worst", "https://host/x?y"]
    assert list(named_sets(several)) == ["val", "test", "set3", "set4", "set5"]
    with pytest.raises(ValueError, match=r"--data a/val and b/val: both would be called val"):
        named_sets(["a/val", "b/val"])


def test_an_address_without_ray_is_one_message(run_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 .*ray start --head"):
        evaluate(run_directory, [], ray_address="127.0.0.1:1", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_categories_are_named(run_directory: Path, tmp_path: Path) -> None:
    shards = Path(str(load_detector(run_directory).config.data.validation))
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    values = json.loads((other / "index.json").read_text())
    values["categories"][1] = {"id": 77, "name": "zebra"}
    (other / "index.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"'zebra' \(id 77\) is not in the checkpoint"):
        evaluate(run_directory, [], data=[other], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_mistakes_of_the_user_are_named(run_directory: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"eval\.topk: no such key\. Did you mean eval\.top_k"):
        evaluate(run_directory, ["eval.topk=3"])
    with pytest.raises(ValueError, match=r"model\.queries: the weights in .* fix the model"):
        evaluate(run_directory, ["model.queries=31"])
    with pytest.raises(ValueError, match=r"--data SHARDS"):
        evaluate(run_directory, ["data.validation=null"])
    with pytest.raises(FileNotFoundError, match="no such folder"):
        evaluate(run_directory, [], data=[tmp_path / "missing"])
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        evaluate(tmp_path, [])
