"""The Kubernetes manifests as tests read them, and what an API server says of them. The schemas are Kubernetes' own."""

from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent.parent
VERSIONS = ("1.29", "1.37")  # the oldest that these manifests are meant for, and the newest that is known here


def manifests(name: str) -> list[dict]:
    return list(yaml.safe_load_all((REPOSITORY / "launch/kubernetes" / name).read_text()))


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


def names(items: list[dict]) -> set[str]:
    return {item["name"] for item in items}
