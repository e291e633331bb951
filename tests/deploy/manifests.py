"""The manifests for Kubernetes, as tests read them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.unit_files import DEPLOY

KUBERNETES = DEPLOY / "kubernetes"
Manifest = dict[str, Any]


def documents(*directories: str) -> list[Manifest]:
    """The objects of these directories of ``deploy/kubernetes``, as their kustomizations list them, each once."""
    found = [one for directory in directories for one in _listed(KUBERNETES / directory)]
    return list({name_of(one): one for one in found}.values())


def _listed(directory: Path) -> Iterator[Manifest]:
    for name in yaml.safe_load((directory / "kustomization.yaml").read_text("utf-8"))["resources"]:
        path = directory / name
        if path.is_dir():
            yield from _listed(path)
        else:
            yield from (one for one in yaml.safe_load_all(path.read_text("utf-8")) if one is not None)


def of_kind(found: list[Manifest], *kinds: str) -> list[Manifest]:
    return [one for one in found if one["kind"] in kinds]


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata'].get('namespace', '')}/{manifest['metadata']['name']}"


def templates(found: list[Manifest]) -> dict[str, tuple[str, Manifest]]:
    """Namespace and pod template of each workload, by its name. Of a RayCluster those of its head and its groups."""
    pods: dict[str, tuple[str, Manifest]] = {}
    for one in found:
        namespace = one["metadata"].get("namespace", "")
        if one["kind"] in ("Deployment", "StatefulSet"):
            pods[one["metadata"]["name"]] = namespace, one["spec"]["template"]
        elif one["kind"] == "RayCluster":
            pods["head"] = namespace, one["spec"]["headGroupSpec"]["template"]
            for group in one["spec"]["workerGroupSpecs"]:
                pods[group["groupName"]] = namespace, group["template"]
    return pods


def containers(template: Manifest) -> Iterator[Manifest]:
    """Those of a pod, the ones that prepare it first."""
    yield from template["spec"].get("initContainers", ())
    yield from template["spec"]["containers"]
