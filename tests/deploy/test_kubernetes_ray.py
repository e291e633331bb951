"""Nodes of Ray for Kubernetes. KubeRay's own schema is in no package, so what is used of it is listed here by hand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest

from tests.commands import LIMIT_S, wait_until
from tests.deploy.manifests import Manifest, documents, name_of, of_kind, templates
from tests.deploy.reach import selects
from tests.deploy.unit_files import DEPLOY
from tsqp.cli.commands import app
from tsqp.untrusted.front import front_options

FOUND = documents("ray")
(CLUSTER,) = of_kind(FOUND, "RayCluster")
PODS = templates(FOUND)
VERSIONS = ("1.31", "1.37")
# ray.io/v1, KubeRay 1.7: the fields that the manifest may have. Ray takes options of `ray start` as strings.
SPEC = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "headGroupSpec", "workerGroupSpecs"}
HEAD = {"rayStartParams", "template"}
GROUP = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
PORTS = {
    "node-manager-port",
    "object-manager-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "min-worker-port",
    "max-worker-port",
}


def groups() -> list[Manifest]:
    return [CLUSTER["spec"]["headGroupSpec"], *CLUSTER["spec"]["workerGroupSpecs"]]


def test_the_cluster_has_fields_that_kuberay_knows() -> None:
    assert CLUSTER.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert CLUSTER["apiVersion"] == "ray.io/v1"
    head, *workers = groups()
    assert CLUSTER["spec"].keys() == SPEC
    assert head.keys() == HEAD
    assert all(group.keys() == GROUP for group in workers)
    assert head["rayStartParams"].keys() == {*PORTS, "num-cpus", "include-dashboard", "port"}
    assert all(group["rayStartParams"].keys() == PORTS for group in workers)
    assert all(isinstance(value, str) for group in groups() for value in group["rayStartParams"].values())


def test_the_manifest_names_the_ray_of_the_image() -> None:
    lock = (DEPLOY.parent / "requirements" / "cluster.lock").read_text("utf-8")
    assert f"\nray=={CLUSTER['spec']['rayVersion']} " in lock


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", [one for one in FOUND if one["kind"] != "RayCluster"], ids=name_of)
def test_kubernetes_knows_every_other_object(manifest: Manifest, version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", PODS)
def test_kubernetes_knows_every_field_of_a_node(name: str, version: str) -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": PODS[name][1]["spec"]}
    kubernetes_validate.validate(pod, version, strict=True)


def test_ray_asks_for_a_token_and_has_no_dashboard() -> None:
    spec = CLUSTER["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert tuple(map(int, spec["rayVersion"].split("."))) >= (2, 52, 0)  # which knows of tokens
    assert spec["headGroupSpec"]["rayStartParams"]["include-dashboard"] == "false"
    for _, template in PODS.values():
        ray = template["spec"]["containers"][0]
        assert {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"} in ray["env"]
        # The operator's own ask the dashboard, and are left out where there are others.
        assert {"readinessProbe", "livenessProbe"} <= ray.keys()


def test_ports_of_ray_are_none_that_a_server_may_reach() -> None:
    """Workers listen at any port that the kernel gives, so Ray's own are fixed, outside of that range."""
    (policy,) = (one for one in FOUND if one["metadata"]["name"] == "to-ray-workers")
    (ports,) = policy["spec"]["ingress"][0]["ports"]
    for _, template in PODS.values():
        assert template["spec"]["securityContext"]["sysctls"] == [
            {"name": "net.ipv4.ip_local_port_range", "value": f"{ports['port']} {ports['endPort']}"}
        ]
    for group in groups():
        told = {name: int(value) for name, value in group["rayStartParams"].items() if name.endswith("port")}
        assert not [port for port in told.values() if ports["port"] <= port <= ports["endPort"]]
        assert len(set(told.values())) == len(told)
        probed = {group["template"]["spec"]["containers"][0]["readinessProbe"]["tcpSocket"]["port"]}
        assert probed <= {told.get("port", told["node-manager-port"])}


def hook() -> str:
    """What is run once the head's container is there."""
    ray = PODS["head"][1]["spec"]["containers"][0]
    shell, option, script = ray["lifecycle"]["postStart"]["exec"]["command"]
    assert (shell, option) == ("/bin/bash", "-c")
    return str(script)


def commands() -> list[str]:
    """Each line of ``tsqp`` in it."""
    return re.findall(r"(?m)^ *(?:until )?(tsqp .*)$", hook().replace("\\\n", " "))


def test_the_commands_are_ours() -> None:
    if "cluster" not in app:
        pytest.skip("there is no tsqp cluster here")
    down, up = commands()
    for command in (down, up):
        app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    _, bound, _ = app.parse_args(shlex.split(up)[1:], exit_on_error=False, print_error=False)
    told = bound.arguments
    assert told["workers"] == CLUSTER["spec"]["workerGroupSpecs"][0]["replicas"]
    assert [str(path) for path in (told["token"], *told["allow"])] == ["/keys/auth_token", "/keys/server.key"]


def test_workers_are_placed_again_until_they_are_there_and_nobody_waits_for_that(tmp_path: Path) -> None:
    """The hook in bash, with commands that write down how they were called: nodes come once the hook has ended."""
    log, nodes = tmp_path / "log", tmp_path / "nodes"
    said = f'echo "${{0##*/}} $1 $2" >>{log}; '
    scripts = {
        "ray": said + f"[ $(wc -l <{log}) -gt 1 ]",
        "tsqp": said + f"[ $2 = up ] && [ -e {nodes} ] && echo there >>{log}",
        "sleep": "exec /bin/sleep 0.01",
    }
    for name, script in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    bash = shutil.which("bash")
    assert bash is not None
    script = re.sub(r"/proc/1/fd/[12]", str(tmp_path / "out"), hook())
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "IP": "10.0.0.1"}
    subprocess.run([bash, "-c", script], env=environment, check=True, timeout=LIMIT_S)
    wait_until(lambda: log.exists() and log.read_text().count(" up\n") > 1)
    nodes.touch()
    wait_until(lambda: "there" in log.read_text())
    health, health_again, down, *ups, there = log.read_text().splitlines()
    assert {health, health_again} == {"ray health-check --address"}
    assert (down, set(ups), there) == ("tsqp cluster down", {"tsqp cluster up"}, "there")


def test_the_front_reads_the_roster_of_that_cluster() -> None:
    head, front = PODS["head"][1]["spec"]["containers"]
    told = front_options(front["args"])
    (name,) = {word for command in commands() for word in re.findall(r"--name (\S+)", command)}
    (directory,) = (mount["mountPath"] for mount in front["volumeMounts"] if mount.get("subPath") == "state")
    assert str(told.roster) == f"{directory}/tsqp/clusters/{name}/roster.json"
    assert told.listen == f"tcp://0.0.0.0:{front['ports'][0]['containerPort']}"
    assert {"name": "XDG_STATE_HOME", "value": directory} in head["env"]
    assert {"name": "private", "mountPath": directory, "subPath": "state"} in head["volumeMounts"]


def test_servers_ask_for_the_roster_where_they_ask_without_ray() -> None:
    (with_ray,), (without,) = (
        [one for one in of_kind(documents(directory), "Service") if one["metadata"]["name"] == "front"]
        for directory in ("ray", "untrusted")
    )
    assert with_ray["metadata"] == without["metadata"]
    assert with_ray["spec"]["ports"] == without["spec"]["ports"]
    assert selects({"matchLabels": with_ray["spec"]["selector"]}, PODS["head"][1]["metadata"]["labels"])


def test_a_node_can_be_drained() -> None:
    """Of pods that a controller makes which Kubernetes does not know, it counts those that are there: a share of the
    wanted ones, or a number that may be missing, lets it evict none.
    """
    (budget,) = of_kind(FOUND, "PodDisruptionBudget")
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    assert selects(budget["spec"]["selector"], group["template"]["metadata"]["labels"])
    assert budget["spec"].keys() == {"minAvailable", "selector"}
    assert budget["spec"]["minAvailable"] == group["replicas"] - 1
