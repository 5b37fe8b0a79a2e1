"""The programs of this process, and whether the nodes of a Ray cluster have the same ones."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .cluster import ClusterError

NODE_SECONDS = 60.0  # for the nodes' answers


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


def check_nodes(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Compare the programs of these nodes, as ray.nodes() has them, with those of this process.

    Returns Ray's ids of those that have the same: some may be lost or too busy to answer. Raises ClusterError that
    names the others. Nodes without CPUs and GPUs run nothing of ours.
    """
    import ray
    from ray import cloudpickle
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here, same, differing = programs(), set[str](), []
    module, asked = sys.modules[__name__], {}
    cloudpickle.register_pickle_by_value(module)
    try:
        for node in nodes:
            if any(node["Resources"].get(name, 0) for name in ("CPU", "GPU")):
                on = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                task = ray.remote(num_cpus=0, max_retries=0)(programs).options(scheduling_strategy=on)
                asked[task.remote()] = node
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    for future in ray.wait(list(asked), num_returns=len(asked), timeout=NODE_SECONDS)[0] if asked else ():
        node = asked[future]
        where = f"node {node['NodeManagerAddress']}"
        try:
            there: Any = ray.get(future)
        except RayTaskError as error:
            differing.append(f"{where} cannot say which: {error.cause!r}")
            continue
        except RayError:  # lost meanwhile
            continue
        if others := [f"{name} {there.get(name)}, here {here[name]}" for name in here if there.get(name) != here[name]]:
            differing.append(f"{where} has {' and '.join(others)}")
        else:
            same.add(node["NodeID"])
    if differing:
        raise ClusterError(
            f"other programs on the Ray cluster: {'; '.join(differing)}. Results would differ: install the same ddetr "
            "and torch on every node and here"
        )
    return same
