"""`ddetr eval` on a Ray cluster that scales itself; its nodes are processes, as in the tests of Ray's autoscaler."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from ddetr.launch.cluster import cluster
from ddetr.launch.evaluate import evaluate

from tests.core.runs import free_port, kill

pytestmark = pytest.mark.slow

EMPTY = ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands", "setup_commands")
EMPTY += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def configuration(gcs: str) -> dict:
    """At most two nodes with a CPU, each given back when it was idle for six seconds."""
    node = {"resources": {"CPU": 1, "object_store_memory": 100_000_000}, "node_config": {}, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    provider = {"type": "fake_multinode", "gcs_address": gcs, "use_node_id_as_ip": True}
    provider |= dict.fromkeys(("disable_node_updaters", "disable_launch_config_check", "foreground_node_launch"), True)
    return {
        "cluster_name": "ddetr",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "upscaling_speed": 1.0,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {"ray.head.default": head, "cpu": {**node, "min_workers": 0}},
        "file_mounts_sync_continuously": False,
        **{name: {} for name in ("docker", "auth", "file_mounts", "head_node", "worker_nodes")},
        **{name: [] for name in EMPTY},
    }


@pytest.fixture
def scaling() -> Iterator[str]:
    """The address of a cluster that is a head without CPUs, and its autoscaler."""
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        address, file, printed = f"127.0.0.1:{free_port()}", Path(folder, "cluster.json"), Path(folder, "log")
        file.write_text(json.dumps(configuration(address)))
        line = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0"]
        line += [f"--port={address.partition(':')[2]}", f"--ray-client-server-port={free_port()}"]
        line += ["--node-ip-address=127.0.0.1", "--include-dashboard=false", "--object-store-memory=100000000"]
        line += [f"--temp-dir={folder}/ray", f"--autoscaling-config={file}"]
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        environment |= {"AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1", "RAY_USAGE_STATS_ENABLED": "0"}
        with printed.open("wb") as log:
            process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + 300
            while "Ray runtime started" not in printed.read_text():
                assert process.poll() is None, printed.read_text()
                assert time.monotonic() < deadline, printed.read_text()
                time.sleep(0.2)
            yield address
        finally:
            kill(process)


def num_nodes() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def test_workers_ask_for_nodes_and_give_them_back(
    scaling: str, run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConnectionError, match=r"no node of the Ray cluster offers a CPU.*set eval\.workers"):
        evaluate(run_directory, [], ray_address=scaling, output=tmp_path / "none")
    found = evaluate(run_directory, ["eval.workers=2"], ray_address=scaling, output=tmp_path / "scaled")
    assert found == evaluate(run_directory, [], output=tmp_path / "here")
    for name in ("detections.json", "ground_truth.json"):
        assert (tmp_path / "scaled" / name).read_bytes() == (tmp_path / "here" / name).read_bytes()
    assert "Ray: 2 worker(s) for " in capsys.readouterr().out
    with cluster(scaling):
        deadline = time.monotonic() + 300
        while num_nodes() > 1:
            assert time.monotonic() < deadline, "idle nodes are not given back"
            time.sleep(0.5)
