"""The manifests of the training job: valid for the API server, consistent in themselves, and what the pods run runs."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from ddetr.core.config import load
from ddetr.launch.identity import identify

from tests.core.runs import SMALL, collect, kill
from tests.launch.manifests import VERSIONS, manifests, mistake, names
from tests.launch.nodes import DEVICES, FIRST, NODES, on


@pytest.mark.parametrize("version", VERSIONS)
def test_the_training_job_is_valid(version: str) -> None:
    for manifest in manifests("train.yaml"):
        assert mistake(manifest, version) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_network_policies_are_valid(version: str) -> None:
    for manifest in manifests("network.yaml"):
        assert manifest["kind"] == "NetworkPolicy"
        assert mistake(manifest, version) is None


def test_only_pods_of_the_run_reach_each_other() -> None:
    """And Prometheus the metrics' ports, of as many ranks as a pod has."""
    job, policy = manifests("train.yaml")[1], manifests("network.yaml")[0]
    pod = job["spec"]["template"]
    selector = policy["spec"]["podSelector"]
    assert selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
    among, prometheus = policy["spec"]["ingress"]
    assert among == {"from": [{"podSelector": selector}]}
    (ports,) = prometheus["ports"]
    (container,) = pod["spec"]["containers"]
    metrics = next(port["containerPort"] for port in container["ports"] if port["name"] == "metrics")
    ranks = int(next(part for part in container["command"] if "nproc" in part).partition("=")[2])
    assert (ports["port"], ports["endPort"]) == (metrics, metrics + ranks - 1)


def test_the_schemas_find_mistakes() -> None:
    job = manifests("train.yaml")[1]
    for path, value in (
        (("spec", "paralelism"), 2),
        (("spec", "completions"), "two"),
        (("spec", "template", "spec", "restartPolicy"), ["OnFailure"]),
        (("spec", "template", "spec", "containers", 0, "volumeMount"), []),
        (("spec", "template", "spec", "containers", 0, "ports", 0, "containerPort"), "rendezvous"),
    ):
        wrong = copy.deepcopy(job)
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        assert mistake(wrong, VERSIONS[-1]) is not None, path


def test_the_training_job_meets_at_its_service() -> None:
    service, job = manifests("train.yaml")
    assert (service["kind"], service["spec"]["clusterIP"]) == ("Service", "None")
    assert job["kind"] == "Job"
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"]
    pod = job["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = dict(part.lstrip("-").split("=", 1) for part in container["command"] if "=" in part)
    assert int(options["nnodes"]) == job["spec"]["completions"]
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    # the host name of pod 0 of an Indexed Job is NAME-0, resolved inside the headless Service
    assert options["master-addr"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    ports = {port["name"]: port["port"] for port in service["spec"]["ports"]}
    assert ports == {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports["rendezvous"] == int(options["master-port"])
    assert int(options["nproc-per-node"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert names(container["volumeMounts"]) == names(pod["spec"]["volumes"])
    variables = {item["name"]: item.get("value") for item in container["env"]}
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < pod["spec"]["terminationGracePeriodSeconds"]


def test_the_settings_of_the_training_job_are_valid() -> None:
    (container,) = manifests("train.yaml")[1]["spec"]["template"]["spec"]["containers"]
    command, preset, *overrides = container["args"]
    assert command == "train"
    config = load(preset, overrides)
    assert config.train.auto_resume
    metrics = next(port["containerPort"] for port in container["ports"] if port["name"] == "metrics")
    assert metrics == config.monitor.port


def test_all_containers_run_the_image_of_this_version() -> None:
    import importlib.metadata

    pods = [manifests("train.yaml")[1]["spec"]["template"]]
    spec = manifests("ray.yaml")[0]["spec"]
    pods += [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    pods.append(manifests("evaluate.yaml")[0]["spec"]["submitterPodTemplate"])
    pods.append(manifests("follow.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"])
    images = {container["image"] for pod in pods for container in pod["spec"]["containers"]}
    assert images == {f"ddetr:{importlib.metadata.version('ddetr')}"}


@pytest.fixture
def pod_names(nodes: dict[str, str]) -> Iterator[None]:
    """What the cluster's DNS does: pod 0 has a name inside the headless Service. `ip netns exec` mounts these files."""
    folders = [Path("/etc/netns") / name for name in nodes]
    was_there = folders[0].parent.is_dir()
    try:
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{NODES[FIRST]} ddetr-train-0.ddetr-train\n")
        yield
    finally:
        for folder in folders:
            (folder / "hosts").unlink(missing_ok=True)
            folder.rmdir()
        if not was_there:
            folders[0].parent.rmdir()


@pytest.mark.slow
def test_the_pods_train_and_resume_after_an_eviction(pod_names: None, synthetic_shards: Path, tmp_path: Path) -> None:
    """The Job's command and arguments in two network namespaces; different are only GPUs, folders and the model."""
    job = manifests("train.yaml")[1]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    run = tmp_path / "runs/r50"
    settings = [item for item in SMALL if not item.startswith("monitor.")]
    settings += ["model.num_classes=3", "model.pretrained_backbone=false", "train.device=cpu", "train.epochs=10000"]
    settings += [f"data.train={synthetic_shards}", "data.validation=null", f"train.output={tmp_path}/runs"]
    settings += ["train.keep_checkpoints=2"]

    def pod(index: int, *more: str) -> subprocess.Popen[str]:
        command = [part.replace("$(JOB_COMPLETION_INDEX)", str(index)) for part in container["command"]]
        command = ["--nproc-per-node=1" if part.startswith("--nproc") else part for part in command]
        assert command[0] == "python"
        command = [*on(list(NODES)[index]), sys.executable, *command[1:], *container["args"], *settings, *more]
        variables = {item["name"]: item["value"] for item in container["env"] if "value" in item}
        variables |= {"GLOO_SOCKET_IFNAME": DEVICES[index], "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def ended(pods: list[subprocess.Popen[str]]) -> list[str]:
        return [process.communicate(timeout=180)[0] for process in pods]

    started: list[subprocess.Popen[str]] = []
    try:
        started = pods = [pod(index) for index in range(job["completions"])]
        deadline = time.monotonic() + 240
        while not (run / "metrics.jsonl").is_file() or len((run / "metrics.jsonl").read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            assert all(process.poll() is None for process in pods), ended(pods)
            time.sleep(0.2)
        fetch = "import sys, urllib.request as u; print(u.urlopen('http://' + sys.argv[1] + ':9400/metrics').read())"
        for index, address in enumerate(reversed(NODES.values())):  # each pod's exporter from the other pod
            scrape = [*on(list(NODES)[index]), sys.executable, "-c", fetch, address]
            scraped = subprocess.run(scrape, capture_output=True, text=True, check=True, timeout=60).stdout
            assert f'ddetr_current_step{{rank="{1 - index}",run="{identify(run).label}"}}' in scraped
        for process in pods:
            process.terminate()  # what the kubelet does first
        output = ended(pods)
        stopped = collect(run, "", 0)
        last = stopped.steps[-1]["step"]
        assert stopped.events[-1]["event"] == "stop", output
        assert (run / f"checkpoints/step_{last:08d}/checkpoint.json").is_file()
        assert f"stopped after step {last} as asked" in output[0]

        pods = [pod(index, f"train.max_steps={last + 3}") for index in range(job["completions"])]
        started = started + pods
        output = ended(pods)
    finally:
        for process in started:
            kill(process)
    assert [process.returncode for process in pods] == [0, 0], output
    resumed = collect(run, "", 0)
    assert [event["ranks"] for event in resumed.events if event["event"] == "resume"] == [2]
    assert [step["step"] for step in resumed.steps] == list(range(1, last + 4))
    assert json.loads((run / "targets.json").read_text()) == []
