"""The programs of this process, and whether the nodes of a Ray cluster have the same ones."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

NODE_SECONDS = 60.0  # for a node's answer


def programs() -> dict[str, str]:
    """Versions of ddetr, with a digest of its code, and of torch.

    A node runs it as it is here, whatever ddetr it has: it uses the standard library alone.
    """
    import hashlib
    from importlib import metadata, util
    from pathlib import Path

    found, code = {}, hashlib.sha256()
    for name in ("ddetr", "torch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    for name in ("core", "data", "launch", "monitoring", "ops") if found["ddetr"] != "none" else ():
        spec = util.find_spec(f"ddetr.{name}")
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            for file in sorted(Path(folder).glob("**/*.py")):
                code.update(file.read_bytes())
    return found | {"ddetr": f"{found['ddetr']} ({code.hexdigest()[:8]})"}


def check_nodes(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Compare the programs of these nodes, as ray.nodes() has them, with those of this process.

    Raises ConnectionError that names the nodes with other ones. Nodes without CPUs and GPUs run nothing of ours.
    """
    import ray
    from ray import cloudpickle
    from ray.exceptions import GetTimeoutError, RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here, differing = programs(), []
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    try:
        asked = {}
        for node in nodes:
            if not any(node["Resources"].get(name, 0) for name in ("CPU", "GPU")):
                continue
            on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0)(programs).options(scheduling_strategy=on)
            asked[task.remote()] = node
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    for future, node in asked.items():
        try:
            there: Any = ray.get(future, timeout=NODE_SECONDS)
        except GetTimeoutError:
            continue  # it is busy: what comes to run there is looked at again
        except RayError:
            continue  # lost meanwhile
        if others := [f"{name} {there[name]}, here {here[name]}" for name in here if there.get(name) != here[name]]:
            differing.append(f"node {node['NodeManagerAddress']} has {' and '.join(others)}")
    if differing:
        raise ConnectionError(
            f"{'; '.join(differing)}. Results would differ: install the same on every node of the Ray cluster and here"
        )
