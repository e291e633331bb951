"""The manifests for Kubernetes: its own schemas take them, pods give up what they can, and their commands are ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.deploy.manifests import KUBERNETES, Manifest, containers, documents, name_of, of_kind, templates
from tests.deploy.recipes import of
from tsqp.checkpoint.synthetic import SHAPES
from tsqp.cli.commands import app
from tsqp.cli.serve import ServeOptions
from tsqp.config.shard import Shard, check_tiling
from tsqp.config.worker_options import parse_worker_options
from tsqp.private_path import DIRECTORY, FILE, problem_with
from tsqp.server.health import OPEN_PATHS
from tsqp.untrusted.front import front_options
from tsqp.wire.roster import read_roster

FOUND = documents("trusted", "untrusted")
PODS = templates(FOUND)
RAY = templates(documents("ray"))
VERSIONS = ("1.31", "1.37")  # the oldest that somebody may still run, and the newest that the schemas have
IMAGES = {"server": "server", **dict.fromkeys(("left", "right", "front"), "worker"), **dict.fromkeys(RAY, "cluster")}
each_pod = pytest.mark.parametrize("name", PODS | RAY)
prepared = pytest.mark.parametrize("name", ["server", "left", "right", *RAY])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", FOUND, ids=name_of)
def test_kubernetes_knows_every_field(manifest: Manifest, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_field_that_there_is_not_is_noticed() -> None:
    (policy, *_) = of_kind(FOUND, "NetworkPolicy")
    spec = {**policy["spec"], "policyType": ["Ingress"]}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**policy, "spec": spec}, VERSIONS[-1], strict=True)


def test_every_file_is_applied() -> None:
    for directory in ("trusted", "untrusted", "untrusted-base", "ray"):
        listed = yaml.safe_load((KUBERNETES / directory / "kustomization.yaml").read_text("utf-8"))["resources"]
        here = {name for name in listed if not name.startswith("../")}
        assert {*here, "kustomization.yaml"} == {path.name for path in (KUBERNETES / directory).glob("*.yaml")}


def test_each_side_has_a_namespace_that_refuses_privilege() -> None:
    assert {name: namespace for name, (namespace, _) in PODS.items()} == {
        "server": "tsqp",
        **dict.fromkeys(("left", "right", "front"), "tsqp-untrusted"),
    }
    for namespace in of_kind(FOUND, "Namespace"):
        assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"


@each_pod
def test_a_pod_is_confined(name: str) -> None:
    template = (PODS | RAY)[name][1]
    spec = template["spec"]
    (user,) = of("server" if name == "server" else "worker", "final", "USER")
    pod = spec["securityContext"]
    assert f"{pod['runAsUser']}:{pod['runAsGroup']}" == user
    assert pod["runAsNonRoot"] is True
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace"} & spec.keys()
    for container in containers(template):
        assert container["image"] == f"tsqp-{IMAGES[name]}"
        assert container["securityContext"] == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert container["resources"]["requests"] == container["resources"]["limits"], "guaranteed, not overcommitted"


@each_pod
def test_nothing_can_be_written_to_but_memory(name: str) -> None:
    template = (PODS | RAY)[name][1]
    spec = template["spec"]
    kinds = {volume["name"]: (volume.keys() - {"name"}).pop() for volume in spec["volumes"]}
    assert set(kinds.values()) <= {"emptyDir", "persistentVolumeClaim", "secret", "configMap"}
    for volume in spec["volumes"]:
        if "emptyDir" in volume:
            assert volume["emptyDir"]["medium"] == "Memory"
            assert "sizeLimit" in volume["emptyDir"]
    for container in containers(template):
        for mount in container.get("volumeMounts", ()):
            assert kinds[mount["name"]] == "emptyDir" or mount["readOnly"] is True
            # An emptyDir itself is open to all users; what is below it is the pod's own.
            below = "subPath" in mount or container["name"] == "prepare" or mount["mountPath"] == "/dev/shm"
            assert kinds[mount["name"]] != "emptyDir" or below


@prepared
def test_what_is_prepared_is_private_enough_for_keys_and_compiled_code(name: str, tmp_path: Path) -> None:
    """The very command, on a directory that is open to all as an emptyDir is, and secrets that are not ours alone."""
    template = (PODS | RAY)[name][1]
    (prepare,) = template["spec"]["initContainers"]
    *python, script, private = expanded(prepare["command"], name)[:5]
    files = expanded(prepare["command"], name)[5:]
    assert (*python, private) == ("/opt/tsqp/bin/python", "-I", "-c", "/private")
    volume = tmp_path / "private"
    volume.mkdir()
    volume.chmod(0o2777)
    secrets = []
    for path in files:
        secrets.append(tmp_path / path.lstrip("/"))
        secrets[-1].parent.mkdir(parents=True, exist_ok=True)
        secrets[-1].write_text(path)
        secrets[-1].chmod(0o440)
    for _ in range(2):  # a pod's preparation may run again
        subprocess.run([sys.executable, "-I", "-c", script, volume, *secrets], check=True)
    used = {mount["subPath"] for mount in template["spec"]["containers"][0]["volumeMounts"] if "subPath" in mount}
    assert all(problem_with(path.lstat(), DIRECTORY) is None for path in volume.iterdir())
    assert used <= {path.name for path in volume.iterdir()}
    assert all(problem_with(path.lstat(), FILE) is None for path in (volume / "keys").iterdir())
    assert {path.read_text() for path in (volume / "keys").iterdir()} == set(files)


def test_preparation_is_the_same_everywhere() -> None:
    every = (PODS | RAY).values()
    scripts = [one["command"][3] for _, pod in every for one in pod["spec"].get("initContainers", ())]
    assert len(scripts) == 5
    assert len(set(scripts)) == 1


def expanded(words: list[str], pod: str) -> list[str]:
    """What Kubernetes makes of ``$(NAME)``: the name of the first pod of a StatefulSet."""
    return [word.replace("$(NAME)", f"{pod}-0") for word in words]


def keys_of(template: Manifest, pod: str) -> set[str]:
    """Files that preparation leaves in ``/keys``."""
    (prepare,) = template["spec"]["initContainers"]
    return {f"/keys/{Path(word).name}" for word in expanded(prepare["command"], pod)[5:]}


def test_the_server_is_told_what_the_manifests_have() -> None:
    template = PODS["server"][1]
    (server,) = template["spec"]["containers"]
    assert "command" not in server, "the image starts it"
    _, bound, _ = app.parse_args(["serve", *server["args"]], exit_on_error=False, print_error=False)
    run, options = bound.arguments["run"], bound.arguments["server"]
    assert run.protection == "masked"
    (address,) = run.worker.addresses
    assert address == f"roster+tcp://{service_address('front')}"
    assert run.worker.server_key is None, "the roster has the keys"
    assert {str(path) for path in (run.worker.key, options.api_keys, options.tls_cert, options.tls_key)} == keys_of(
        template, "server"
    )
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"https": options.port, "metrics": options.metrics_port}
    assert options.host == options.metrics_host == "0.0.0.0"
    assert not options.insecure_exposed
    assert run.model == mounted(server, "model")


@pytest.mark.parametrize("name", ["left", "right"])
def test_a_worker_is_told_what_the_manifests_have(name: str) -> None:
    template = PODS[name][1]
    (worker,) = template["spec"]["containers"]
    assert "command" not in worker
    options = parse_worker_options(expanded(worker["args"], name))
    assert options.dtype == "field"
    assert options.listen == f"tcp://0.0.0.0:{worker['ports'][0]['containerPort']}"
    assert {str(path) for path in (options.key, *options.allow)} == keys_of(template, name)
    assert not options.insecure_plain_tcp
    assert options.model == mounted(worker, "model")


def mounted(container: Manifest, volume: str) -> str:
    (path,) = (mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == volume)
    return str(path)


def service_address(name: str) -> str:
    (service,) = (one for one in of_kind(FOUND, "Service") if one["metadata"]["name"] == name)
    (port,) = service["spec"]["ports"]
    return f"{name}.{service['metadata']['namespace']}.svc.cluster.local:{port['port']}"


def test_the_front_is_started_as_the_program_that_it_is() -> None:
    (front,) = PODS["front"][1]["spec"]["containers"]
    python, *options = front["command"]
    (entry,) = of("worker", "final", "ENTRYPOINT")
    assert [python, *options[:-1]] == json.loads(entry)[:-1]
    assert options[-1] == "tsqp.untrusted.front"
    told = front_options(front["args"])
    assert told.listen == f"tcp://0.0.0.0:{front['ports'][0]['containerPort']}"
    assert str(told.roster) == f"{mounted(front, 'roster')}/roster.json"


def test_the_roster_is_of_these_workers_and_they_are_one_model() -> None:
    roster = read_roster((KUBERNETES / "untrusted" / "roster.example.json").read_bytes())
    shards = {}
    for name in ("left", "right"):
        (worker,) = PODS[name][1]["spec"]["containers"]
        address = f"tcp://{name}-0.workers.tsqp-untrusted.svc.cluster.local:7000"
        shards[address] = str(parse_worker_options(expanded(worker["args"], name)).shard)
    assert {member.address: member.shard for member in roster.workers} == shards
    assert all(member.key is not None for member in roster.workers)
    check_tiling([Shard.parse(text) for text in shards.values()], SHAPES["llama-3.2-1b"])


def test_services_and_budgets_select_pods_that_there_are() -> None:
    for one in of_kind(FOUND, "Service", "PodDisruptionBudget"):
        selector = one["spec"]["selector"]
        wanted = selector.get("matchLabels", selector).items()
        chosen = [
            template
            for namespace, template in PODS.values()
            if namespace == one["metadata"]["namespace"] and wanted <= template["metadata"]["labels"].items()
        ]
        assert chosen, name_of(one)
        for port in one["spec"].get("ports", ()):
            named = {port["name"] for pod in chosen for port in pod["spec"]["containers"][0]["ports"]}
            assert port["targetPort"] in named
    budgets = {one["metadata"]["name"] for one in of_kind(FOUND, "PodDisruptionBudget")}
    assert budgets == {"server", "workers", "front"}


def test_health_is_asked_for_where_it_is_told_and_a_missing_worker_restarts_nothing() -> None:
    (server,) = PODS["server"][1]["spec"]["containers"]
    paths = {kind: server[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/livez", "liveness": "/livez", "readiness": "/readyz"}
    assert set(paths.values()) <= set(OPEN_PATHS)
    for kind in paths:
        assert server[f"{kind}Probe"]["httpGet"]["scheme"] == "HTTPS"
        assert server[f"{kind}Probe"]["httpGet"]["port"] == "https"
    startup = server["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 15 * 60  # as the units wait
    assert server["readinessProbe"]["timeoutSeconds"] > 5  # the round trip to the worker
    for name in ("left", "right", "front"):
        (container,) = PODS[name][1]["spec"]["containers"]
        assert "livenessProbe" not in container, "its process ends when it is broken"


def test_there_is_time_for_answers_under_way() -> None:
    assert PODS["server"][1]["spec"]["terminationGracePeriodSeconds"] > ServeOptions().drain_s + 15


def test_servers_share_no_node_with_the_untrusted_side() -> None:
    """Twice: by the labels of nodes, and by what runs on them."""
    domains = {name: template["spec"]["nodeSelector"]["tsqp/domain"] for name, (_, template) in PODS.items()}
    assert domains == {"server": "trusted", "left": "untrusted", "right": "untrusted", "front": "untrusted"}
    (apart,) = PODS["server"][1]["spec"]["affinity"]["podAntiAffinity"][
        "requiredDuringSchedulingIgnoredDuringExecution"
    ]
    assert apart["topologyKey"] == "kubernetes.io/hostname"
    assert apart["namespaces"] == ["tsqp-untrusted"]
    wanted = apart["labelSelector"]["matchLabels"].items()
    for name in ("left", "right", "front"):
        assert wanted <= PODS[name][1]["metadata"]["labels"].items()


def test_no_secret_is_in_a_file_and_the_page_says_how_each_is_made() -> None:
    assert not of_kind([*FOUND, *documents("ray")], "Secret", "ConfigMap")
    page = (KUBERNETES / "README.md").read_text("utf-8")
    for _, template in (PODS | RAY).values():
        for volume in template["spec"]["volumes"]:
            for kind, name in (("secret", "secretName"), ("configMap", "name")):
                if kind in volume:
                    assert re.search(rf"create {kind.lower()}( \w+)? {volume[kind][name]} ", page), volume


def test_the_confidential_servers_are_the_same_in_a_vm() -> None:
    overlay = yaml.safe_load((KUBERNETES / "confidential" / "kustomization.yaml").read_text("utf-8"))
    assert overlay["resources"] == ["../trusted"]
    (patch,) = overlay["patches"]
    assert patch["target"] == {"kind": "Deployment", "name": "server", "namespace": "tsqp"}
    (change,) = yaml.safe_load(patch["patch"])
    assert (change["op"], change["path"]) == ("add", "/spec/template/spec/runtimeClassName")
    (server,) = of_kind(documents("trusted"), "Deployment")
    server["spec"]["template"]["spec"]["runtimeClassName"] = change["value"]
    kubernetes_validate.validate(server, VERSIONS[-1], strict=True)


def test_no_secret_is_an_argument() -> None:
    """Every user of a machine reads the arguments of every process."""
    page = (KUBERNETES / "README.md").read_text("utf-8")
    secrets = re.findall(r"(?m)^kubectl .*create secret generic (\S+) (.*)$", page)
    assert {name for name, _ in secrets} >= {"server-line", "server-api", "worker-line", "ray-token"}
    for name, rest in secrets:
        assert all(word.startswith("--from-file=") for word in rest.split()), name
    (made,) = re.findall(r"(?m)^\(umask 077; .*> (keys/ray-token)\)", page)
    assert f"--from-file=auth_token={made}" in page


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
@pytest.mark.parametrize("directory", sorted(path.parent for path in KUBERNETES.glob("*/kustomization.yaml")))
def test_kustomize_builds_it(directory: Path) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", directory],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HOME": "/"},
    )
    assert done.returncode == 0, done.stderr
    built: list[Any] = list(yaml.safe_load_all(done.stdout))
    found = [name_of(one) for one in built]
    assert len(found) == len(set(found))
