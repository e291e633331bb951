"""Who reaches whom in Kubernetes: the whole list, by a small model of NetworkPolicy (``reach.py``)."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import permutations
from typing import Any

import pytest

from tests.deploy.manifests import Manifest, documents, name_of, of_kind, templates
from tests.deploy.reach import DIRECTIONS, Pod, connections, reaches, selects

Connections = set[tuple[str, str, str]]
PEERS = {"ingress": "from", "egress": "to"}
# Those of the manifests; those of Ray, of ssh and of the cluster's API; and those that nobody listens at.
TCP = (22, 53, 80, 443, 6379, 6380, 6443, 7000, 7001, 7100, 8000, 8265, 9100, 10002, 19999, 20000, 29999, 30000, 65535)
UDP = (53, 7000, 8000, 20000)
PORTS = [*((port, "TCP") for port in TCP), *((port, "UDP") for port in UDP)]
SERVERS = ("server", "second server")
RAY_NODES = ("head", "workers", "second of workers")
TO_SERVERS = {
    *(("gateway", server, "8000/TCP") for server in SERVERS),
    *(("monitoring", server, "9100/TCP") for server in SERVERS),
    *((server, "name server", f"53/{protocol}") for server in SERVERS for protocol in ("UDP", "TCP")),
}
EXPECTED: dict[str, Connections] = {
    "untrusted": TO_SERVERS
    | {(server, worker, "7000/TCP") for server in SERVERS for worker in ("left", "right")}
    | {(server, "front", "7100/TCP") for server in SERVERS},
    "ray": TO_SERVERS
    | {(server, worker, f"{port}/TCP") for server in SERVERS for worker in RAY_NODES[1:] for port in (20000, 29999)}
    | {(server, "head", "7100/TCP") for server in SERVERS}
    | {(*pair, f"{port}/{protocol}") for pair in permutations(RAY_NODES, 2) for port, protocol in PORTS}
    | {(node, "name server", f"53/{protocol}") for node in RAY_NODES for protocol in ("UDP", "TCP")},
}


@dataclass(frozen=True)
class Cluster:
    """Both sides, with the untrusted one of a directory, among pods that are others' or pretend."""

    directory: str

    @cached_property
    def found(self) -> list[Manifest]:
        return documents("trusted", self.directory)

    @cached_property
    def policies(self) -> list[Manifest]:
        return of_kind(self.found, "NetworkPolicy")

    @cached_property
    def pods(self) -> list[Pod]:
        ours = {name: (space, pod["metadata"]["labels"]) for name, (space, pod) in templates(self.found).items()}
        server = ours["server"][1]
        more = {
            "second server": ours["server"],
            "name server": ("kube-system", {"k8s-app": "kube-dns"}),
            "api": ("kube-system", {"component": "kube-apiserver"}),
            "stranger": ("default", {}),
            "server elsewhere": ("default", server),
            "stranger among the trusted": ("tsqp", {}),
            "stranger among the untrusted": ("tsqp-untrusted", {}),
            "server among the untrusted": ("tsqp-untrusted", server),
            "name server elsewhere": ("default", {"k8s-app": "kube-dns"}),
        }
        if "workers" in ours:
            more |= {"second of workers": ours["workers"], "node elsewhere": ("default", ours["workers"][1])}
        known = {one["metadata"]["name"]: one["metadata"]["labels"] for one in of_kind(self.found, "Namespace")}
        pods = [pod(name, space, labels, known.get(space, {})) for name, (space, labels) in (ours | more).items()]
        return [
            *pods,
            pod("gateway", "edge", {}, {"tsqp/gateway": "true"}),
            pod("monitoring", "watch", {}, {"tsqp/monitoring": "true"}),
        ]

    def names_in(self, namespace: str) -> set[str]:
        return {one.name for one in self.pods if one.namespace == namespace}

    def seen(self, policies: list[Manifest], *heeded: str) -> Connections:
        """All connections of which one end is ours, where rules of these directions are heeded; of both by default."""
        ours = self.names_in("tsqp") | self.names_in("tsqp-untrusted")
        pairs = [pair for pair in permutations(self.pods, 2) if ours & {one.name for one in pair}]
        return set(connections(policies, pairs, PORTS, heeded or tuple(DIRECTIONS)))

    def ends(self, policies: list[Manifest]) -> list[Connections]:
        """What each of the two ends lets through. One end alone would mostly do, so a fault at one shows only here."""
        return [self.seen(policies, direction) for direction in DIRECTIONS]

    @cached_property
    def own_ends(self) -> list[Connections]:
        return self.ends(self.policies)


def pod(name: str, namespace: str, labels: dict[str, str], of_namespace: dict[str, str]) -> Pod:
    return Pod(name, namespace, labels, {"kubernetes.io/metadata.name": namespace, **of_namespace})


@cache
def cluster(directory: str) -> Cluster:
    return Cluster(directory)


def own_policies(directory: str) -> list[Manifest]:
    """Those that this directory needs: with Ray, what the trusted side has for workers without Ray plays no part."""
    every = cluster(directory).policies
    if directory == "untrusted":
        return every
    without = {name_of(policy) for policy in cluster("untrusted").policies}
    return [policy for policy in every if name_of(policy) not in without]


each_cluster = pytest.mark.parametrize("directory", EXPECTED)
POLICIES = [(directory, name_of(policy)) for directory in EXPECTED for policy in own_policies(directory)]
PARTS = [
    (directory, name_of(policy), direction, index, part)
    for directory in EXPECTED
    for policy in own_policies(directory)
    for direction in PEERS
    for index, rule in enumerate(policy["spec"].get(direction, ()))
    for part in ("rule", "peers", *(["ports"] if "ports" in rule else []), *rule[PEERS[direction]][0])
]


@each_cluster
def test_the_whole_list(directory: str) -> None:
    one = cluster(directory)
    assert one.seen(one.policies) == EXPECTED[directory]


@each_cluster
def test_nothing_of_the_untrusted_side_reaches_the_trusted_one(directory: str) -> None:
    """Said once more without the list: by the trusted side's own rules, as a node that is taken over heeds none."""
    one = cluster(directory)
    own = [policy for policy in one.policies if policy["metadata"]["namespace"] == "tsqp"]
    wrong = [
        way for way in one.seen(own) if way[0] in one.names_in("tsqp-untrusted") and way[1] in one.names_in("tsqp")
    ]
    assert not wrong


@each_cluster
def test_both_ends_of_the_line_say_the_same_ports(directory: str) -> None:
    one = cluster(directory)
    ours = {name for name, (space, _) in templates(one.found).items() if space == "tsqp-untrusted"}
    let_in, let_out = ({way for way in end if way[0] == "server" and way[1] in ours} for end in one.own_ends)
    assert let_in == let_out != set()


@pytest.mark.parametrize(("directory", "removed"), POLICIES)
def test_each_policy_is_needed(directory: str, removed: str) -> None:
    one = cluster(directory)
    assert one.ends([policy for policy in one.policies if name_of(policy) != removed]) != one.own_ends


@pytest.mark.parametrize(("directory", "name", "direction", "index", "part"), PARTS)
def test_each_part_of_each_rule_is_needed(directory: str, name: str, direction: str, index: int, part: str) -> None:
    """Without it one end lets more through, or less."""
    one = cluster(directory)
    changed = copy.deepcopy(one.policies)
    (policy,) = (other for other in changed if name_of(other) == name)
    rules = policy["spec"][direction]
    if part == "rule":
        del rules[index]
    elif part in ("ports", "peers"):
        del rules[index]["ports" if part == "ports" else PEERS[direction]]
    else:
        del rules[index][PEERS[direction]][0][part]
    assert one.ends(changed) != one.own_ends


@pytest.mark.parametrize(
    ("selector", "labels", "found"),
    [
        ({}, {}, True),
        ({"matchLabels": {"a": "1"}}, {"a": "1", "b": "2"}, True),
        ({"matchLabels": {"a": "1", "b": "1"}}, {"a": "1"}, False),
        ({"matchExpressions": [{"key": "a", "operator": "In", "values": ["1", "2"]}]}, {"a": "2"}, True),
        ({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["1"]}]}, {}, True),
        ({"matchExpressions": [{"key": "a", "operator": "Exists"}]}, {}, False),
        ({"matchExpressions": [{"key": "a", "operator": "DoesNotExist"}]}, {"a": "1"}, False),
    ],
)
def test_selectors(selector: dict[str, Any], labels: dict[str, str], found: bool) -> None:
    assert selects(selector, labels) is found


def test_the_model_knows_what_is_open_and_what_a_range_is() -> None:
    one, two, three = pod("one", "a", {}, {}), pod("two", "b", {}, {}), pod("three", "b", {}, {})
    assert reaches([], one, two, 1)
    rule: dict[str, Any] = {"from": [{"namespaceSelector": {}}], "ports": [{"port": 10, "endPort": 20}]}
    policy: dict[str, Any] = {"metadata": {"namespace": "b"}, "spec": {"podSelector": {}, "ingress": [rule]}}
    assert [port for port in (9, 10, 20, 21) if reaches([policy], one, two, port)] == [10, 20]
    assert not reaches([policy], one, two, 10, "UDP")
    assert reaches([policy], two, one, 99)  # without policyTypes it is for ingress alone
    policy["spec"]["ingress"] = [{"from": [{"podSelector": {}}]}]  # pods of the policy's own namespace
    assert not reaches([policy], one, two, 10)
    assert reaches([policy], three, two, 10)
