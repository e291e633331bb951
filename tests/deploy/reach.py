"""Who may open a connection to whom, by the rules of Kubernetes' NetworkPolicy (networking.k8s.io/v1).

A pod that no policy selects for a direction is open in it. Else a connection needs a rule of one of those policies, and
leave in both directions: of the pod that opens it and of the pod that it goes to. Addresses (``ipBlock``) are refused
here, since no manifest has any.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Labels = Mapping[str, str]
Policies = Sequence[Mapping[str, Any]]
DIRECTIONS = {"Ingress": ("ingress", "from"), "Egress": ("egress", "to")}


@dataclass(frozen=True)
class Pod:
    """One pod, as policies see it. ``namespace_labels`` have the name of the namespace too."""

    name: str
    namespace: str
    labels: Labels
    namespace_labels: Labels


def reaches(
    policies: Policies,
    source: Pod,
    target: Pod,
    port: int,
    protocol: str = "TCP",
    heeded: Collection[str] = tuple(DIRECTIONS),
) -> bool:
    """Whether ``source`` may open a connection to a port of ``target``, where rules of some directions are heeded."""
    ends = {"Egress": (source, target), "Ingress": (target, source)}
    return all(_allowed(policies, direction, *ends[direction], port, protocol) for direction in heeded)


def _allowed(policies: Policies, direction: str, own: Pod, other: Pod, port: int, protocol: str) -> bool:
    isolating = [policy["spec"] for policy in policies if _isolates(policy, own, direction)]
    if not isolating:
        return True
    rules, peers = DIRECTIONS[direction]
    return any(
        _port_in(rule.get("ports"), port, protocol) and _peer_in(rule.get(peers), other, own.namespace)
        for spec in isolating
        for rule in spec.get(rules) or ()
    )


def _isolates(policy: Mapping[str, Any], pod: Pod, direction: str) -> bool:
    spec = policy["spec"]
    types = spec.get("policyTypes") or ["Ingress", *(["Egress"] if "egress" in spec else [])]
    return (
        policy["metadata"]["namespace"] == pod.namespace
        and direction in types
        and selects(spec["podSelector"], pod.labels)
    )


def _port_in(ports: Sequence[Mapping[str, Any]] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    return any(
        one.get("protocol", "TCP") == protocol
        and ("port" not in one or one["port"] <= port <= one.get("endPort", one["port"]))
        for one in ports
    )


def _peer_in(peers: Sequence[Mapping[str, Any]] | None, other: Pod, own_namespace: str) -> bool:
    if not peers:
        return True
    return any(_is_peer(peer, other, own_namespace) for peer in peers)


def _is_peer(peer: Mapping[str, Any], other: Pod, own_namespace: str) -> bool:
    if unknown := peer.keys() - {"podSelector", "namespaceSelector"}:
        raise NotImplementedError(f"a peer by {unknown}")
    near = (
        selects(peer["namespaceSelector"], other.namespace_labels)
        if "namespaceSelector" in peer
        else other.namespace == own_namespace
    )
    return near and selects(peer.get("podSelector") or {}, other.labels)


def selects(selector: Mapping[str, Any], labels: Labels) -> bool:
    """A label selector; an empty one selects everything."""
    if unknown := selector.keys() - {"matchLabels", "matchExpressions"}:
        raise NotImplementedError(f"a selector with {unknown}")
    return all(labels.get(name) == value for name, value in (selector.get("matchLabels") or {}).items()) and all(
        _holds(one, labels) for one in selector.get("matchExpressions") or ()
    )


def _holds(expression: Mapping[str, Any], labels: Labels) -> bool:
    key, values = expression["key"], expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return labels.get(key) in values
        case "NotIn":
            return labels.get(key) not in values
        case "Exists":
            return key in labels
        case "DoesNotExist":
            return key not in labels
    raise NotImplementedError(expression["operator"])


def connections(
    policies: Policies,
    pairs: Sequence[tuple[Pod, Pod]],
    ports: Sequence[tuple[int, str]],
    heeded: Collection[str] = tuple(DIRECTIONS),
) -> Iterator[tuple[str, str, str]]:
    """Those of these pairs that may be opened: source, target, and port with protocol."""
    for source, target in pairs:
        for port, protocol in ports:
            if reaches(policies, source, target, port, protocol, heeded):
                yield source.name, target.name, f"{port}/{protocol}"
