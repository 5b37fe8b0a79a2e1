"""The manifests of the Ray cluster, of evaluations on it and of its Redis: valid, and consistent with each other.

No package carries KubeRay's schemas: the pod templates of a RayCluster and of a RayJob are checked like any pod's, and
the few fields around them against the tables below.
"""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.launch.manifests import REPOSITORY, VERSIONS, manifests, mistake, names, pod_template
from tests.launch.parsing import parse
from tests.processes import finished

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


def with_redis() -> dict:
    """The Ray cluster with what is commented out in its manifest."""
    lines = (REPOSITORY / "launch/kubernetes/ray.yaml").read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  # gcsFaultToleranceOptions:"))
    last = next(number for number in range(first, len(lines)) if not lines[number].startswith("  #"))
    lines[first:last] = [line.replace("# ", "", 1) for line in lines[first:last]]
    return yaml.safe_load("\n".join(lines))


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


def test_the_schemas_find_mistakes() -> None:
    template = manifests("ray.yaml")[0]["spec"]["workerGroupSpecs"][0]["template"]
    template["spec"]["containers"][0]["resources"]["limit"] = {}
    assert mistake(pod_template(template), VERSIONS[-1]) is not None
    cron = manifests("follow.yaml")[0]
    cron["spec"]["concurrencypolicy"] = "Forbid"
    assert mistake(cron, VERSIONS[-1]) is not None


def test_only_clients_reach_the_ray_cluster() -> None:
    """Besides its own pods, the operator, and Prometheus."""
    of_ray = manifests("network.yaml")[1]
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


def test_the_ray_cluster_runs_the_pinned_ray() -> None:
    (cluster,) = manifests("ray.yaml")
    constraints = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"ray=={cluster['spec']['rayVersion']}" in constraints
    for group in (cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            assert names(container["volumeMounts"]) <= names(pod["volumes"])


@pytest.mark.integration
def test_each_job_of_the_schedule_evaluates_what_is_new_and_ends(run_directory: Path, tmp_path: Path) -> None:
    """The container's arguments; different are only the run, which is not there at first, and that it is done here."""
    (container,) = manifests("follow.yaml")[0]["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    run = tmp_path / "r50"
    arguments = [str(run) if part.startswith("/data") else part for part in container["args"]]
    arguments = [part for part in arguments if not part.startswith("--ray")]
    for steps in ([], [10], [10, 20], [10, 20]):
        for step in steps:
            name = f"checkpoints/step_{step:08d}"
            if not (run / name).exists():
                shutil.copytree(run_directory / name, run / name)
        before = {file: file.stat().st_mtime_ns for file in run.glob("eval/*/evaluation.json")}
        done = finished(*arguments)
        assert done.returncode == 0, done.stderr
        results = {file: file.stat().st_mtime_ns for file in run.glob("eval/*/evaluation.json")}
        assert [int(file.parent.name.removeprefix("step_")) for file in sorted(results)] == steps
        assert before.items() <= results.items(), "what has a result is left alone"
