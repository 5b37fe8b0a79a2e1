"""The Kubernetes manifests: valid for the API server, consistent in themselves, and what the pods run really runs.

The schemas are Kubernetes' own. No package carries KubeRay's: the pod templates of a RayCluster and of a RayJob are
checked like any pod's, and the few fields around them against the tables below.
"""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from ddetr.core.config import load
from ddetr.launch.identity import identify

from tests.core.runs import SMALL, collect, kill
from tests.launch.nodes import DEVICES, FIRST, NODES, on
from tests.launch.parsing import parse

REPOSITORY = Path(__file__).resolve().parent.parent.parent
VERSIONS = ("1.29", "1.37")  # the oldest that these manifests are meant for, and the newest that is known here
# KubeRay 1.5: https://docs.ray.io/en/latest/cluster/kubernetes/references.html
RAY_CLUSTER = {
    "spec": {
        "rayVersion": str,
        "authOptions": dict,
        "gcsFaultToleranceOptions": dict,
        "headGroupSpec": dict,
        "workerGroupSpecs": list,
    },
    "head": {"rayStartParams": dict, "template": dict},
    "worker": {
        "groupName": str,
        "replicas": int,
        "minReplicas": int,
        "maxReplicas": int,
        "rayStartParams": dict,
        "template": dict,
    },
}
RAY_JOB = {
    "clusterSelector": dict,
    "rayClusterSpec": dict,
    "entrypoint": str,
    "entrypointNumCpus": int | float,
    "backoffLimit": int,
    "submitterConfig": dict,
    "submitterPodTemplate": dict,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
}
CLIENT = {"ddetr-ray-client": "true"}


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((REPOSITORY / "launch/kubernetes" / name).read_text()))


def with_redis() -> dict:
    """The Ray cluster with what is commented out in its manifest."""
    lines = (REPOSITORY / "launch/kubernetes/ray.yaml").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  # gcsFaultToleranceOptions:"))
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("  #"))
    lines[first:last] = [line.replace("# ", "", 1) for line in lines[first:last]]
    return yaml.safe_load("\n".join(lines))


def mistake(manifest: dict, version: str) -> str | None:
    """What the API server of this version would refuse the manifest for."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")

    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return error.message
    return None


def pod_template(template: dict) -> dict:
    return {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "pod"}, "template": template}


@pytest.mark.parametrize("version", VERSIONS)
def test_the_training_job_is_valid(version: str) -> None:
    for manifest in manifests("train.yaml"):
        assert mistake(manifest, version) is None


def fields_fit(part: dict, table: dict) -> None:
    for key, value in part.items():
        assert isinstance(value, table.get(key, ())), f"{key}: {value!r}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cluster", [*manifests("ray.yaml"), with_redis()], ids=["as it is", "with Redis"])
def test_the_ray_cluster_is_valid(cluster: dict, version: str) -> None:
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    head, workers = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    for part, kind in ((cluster["spec"], "spec"), (head, "head"), *((worker, "worker") for worker in workers)):
        fields_fit(part, RAY_CLUSTER[kind])
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        assert mistake(pod_template(group["template"]), version) is None
    for worker in workers:
        assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_ray_job_is_valid(version: str) -> None:
    (job,) = manifests("evaluate.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    fields_fit(job["spec"], RAY_JOB)
    fields_fit(job["spec"]["submitterConfig"], {"backoffLimit": int})
    template = job["spec"]["submitterPodTemplate"]
    assert mistake(pod_template(template), version) is None
    assert template["spec"]["restartPolicy"] in ("Never", "OnFailure")  # it becomes the pod of a Job
    assert "command" not in template["spec"]["containers"][0]  # the operator's own submits the job


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", ["follow.yaml", "redis.yaml"])
def test_manifests_of_kinds_built_in_are_valid(name: str, version: str) -> None:
    for manifest in manifests(name):
        assert mistake(manifest, version) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_the_network_policies_are_valid(version: str) -> None:
    for manifest in manifests("network.yaml"):
        assert manifest["kind"] == "NetworkPolicy"
        assert mistake(manifest, version) is None


def test_only_pods_of_the_run_reach_each_other() -> None:
    """And Prometheus the metrics' ports, of as many ranks as a pod has."""
    job, (policy, of_ray, _) = manifests("train.yaml")[1], manifests("network.yaml")
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
    (cluster,) = manifests("ray.yaml")
    selector = of_ray["spec"]["podSelector"]
    assert selector == {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}
    among, *others = of_ray["spec"]["ingress"]
    assert among == {"from": [{"podSelector": selector}]}
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: {"protocol": "TCP", "port": port["containerPort"]} for port in head["ports"]}
    assert others[0] == {
        "from": [{"podSelector": {"matchLabels": CLIENT}}],
        "ports": [ports["client"], ports["dashboard"]],
    }
    assert others[1]["ports"] == [ports["dashboard"]]
    assert all(rule["ports"] for rule in others)


def test_only_the_ray_cluster_reaches_redis() -> None:
    service, redis = manifests("redis.yaml")
    pod = redis["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    (port,) = container["ports"]
    policy = manifests("network.yaml")[2]["spec"]
    for selector in (policy["podSelector"], redis["spec"]["selector"], {"matchLabels": service["spec"]["selector"]}):
        assert selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
    (rule,) = policy["ingress"]
    cluster = with_redis()
    assert rule["from"] == [{"podSelector": {"matchLabels": {"ray.io/cluster": cluster["metadata"]["name"]}}}]
    assert rule["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]
    options = cluster["spec"]["gcsFaultToleranceOptions"]
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["ports"] == [{"name": port["name"], "port": port["containerPort"]}]
    assert redis["spec"]["serviceName"] == service["metadata"]["name"]
    # the password of the one is that of the other
    (password,) = container["env"]
    assert options["redisPassword"] == {"valueFrom": password["valueFrom"]}
    assert container["args"][container["args"].index("--requirepass") + 1] == f"$({password['name']})"
    text = (REPOSITORY / "launch/kubernetes/redis.yaml").read_text()
    secret = password["valueFrom"]["secretKeyRef"]
    assert f"kubectl create secret generic {secret['name']} --from-literal={secret['key']}=" in text
    claims = names([claim["metadata"] for claim in redis["spec"]["volumeClaimTemplates"]])
    assert names(container["volumeMounts"]) == claims


def test_evaluations_run_on_the_ray_cluster() -> None:
    (cluster,) = manifests("ray.yaml")
    name = cluster["metadata"]["name"]
    head = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in head["ports"]}
    (job,) = manifests("evaluate.yaml")
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": name}
    assert job["spec"]["backoffLimit"] == 0  # KubeRay 1.5 deletes the selected cluster before it tries again
    assert not job["spec"].keys() & {"shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
    assert CLIENT.items() <= job["spec"]["submitterPodTemplate"]["metadata"]["labels"].items()
    entrypoint = job["spec"]["entrypoint"].split()
    assert entrypoint[0] == "ddetr"
    evaluation = parse(entrypoint[1:])
    assert evaluation is not None
    assert (evaluation[0], evaluation[1]["ray"]) == ("ddetr eval", "auto")

    (cron,) = manifests("follow.yaml")
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    pod = cron["spec"]["jobTemplate"]["spec"]["template"]
    assert CLIENT.items() <= pod["metadata"]["labels"].items()
    (container,) = pod["spec"]["containers"]
    assert 'ENTRYPOINT ["ddetr"]' in (REPOSITORY / "Dockerfile").read_text()
    following = parse(container["args"])
    assert following is not None
    command, values = following
    assert command == "ddetr eval"
    assert values["checkpoints"] == evaluation[1]["checkpoints"]
    assert values["follow"]
    assert values["idle"] == 0
    assert values["ray"] == f"ray://{name}-head-svc:{ports['client']}"  # as KubeRay names the head's Service
    (token,) = container["env"]
    assert token == {
        "name": "RAY_AUTH_TOKEN",
        "valueFrom": {"secretKeyRef": {"name": name, "key": "auth_token"}},  # as KubeRay names the secret
    }


def test_evaluations_see_the_runs_of_the_training_job() -> None:
    (container,) = manifests("train.yaml")[1]["spec"]["template"]["spec"]["containers"]
    settings = dict(part.split("=", 1) for part in container["args"] if "=" in part)
    run = f"{settings['train.output']}/{settings['train.name']}"
    pod = manifests("follow.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert run in pod["containers"][0]["args"]
    cluster = manifests("ray.yaml")[0]["spec"]
    trained = manifests("train.yaml")[1]["spec"]["template"]["spec"]
    pods = [pod, trained]
    pods += [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:
        assert pod["securityContext"] == trained["securityContext"]
        (claim,) = [volume for volume in pod["volumes"] if "persistentVolumeClaim" in volume]
        assert claim["persistentVolumeClaim"] == {"claimName": "ddetr-data"}
        (mount,) = [mount for mount in pod["containers"][0]["volumeMounts"] if mount["name"] == claim["name"]]
        assert run.startswith(mount["mountPath"])


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
    template = manifests("ray.yaml")[0]["spec"]["workerGroupSpecs"][0]["template"]
    template["spec"]["containers"][0]["resources"]["limit"] = {}
    assert mistake(pod_template(template), VERSIONS[-1]) is not None
    cron = manifests("follow.yaml")[0]
    cron["spec"]["concurrencypolicy"] = "Forbid"
    assert mistake(cron, VERSIONS[-1]) is not None


def names(items: list[dict]) -> set[str]:
    return {item["name"] for item in items}


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


def test_the_ray_cluster_runs_the_pinned_ray() -> None:
    (cluster,) = manifests("ray.yaml")
    constraints = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['spec']['rayVersion']}" in constraints
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            assert names(container["volumeMounts"]) <= names(pod["volumes"])


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
