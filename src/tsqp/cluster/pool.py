"""What of Ray is used: a registry, placement groups, an actor for each worker. The rest knows ``Pool`` alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import msgspec

from tsqp.cluster.holder import Holder, Task
from tsqp.cluster.processes import MARK
from tsqp.cluster.registry import Registry, View
from tsqp.cluster.state import ClusterDirectory, Group, Record
from tsqp.errors import ClusterError
from tsqp.wire.transport.address import in_brackets

REGISTRY = "registry"
ANSWER_S = 30.0  # of the registry
OWN_ROOM_S = 30.0  # a Ray of ours has its room from the beginning, or never


class Pool(Protocol):
    """Where workers are placed. Each method raises ClusterError."""

    def open_registry(self) -> str:
        """Start the registry and its front, beside this process; returns the front's address."""

    def reload(self) -> None:
        """Tell the registry that the cluster's directory has changed."""

    def view(self) -> View:
        """What the registry knows."""

    def place(self, groups: tuple[Group, ...], shards: dict[int, str], timeout_s: float) -> None:
        """Start workers, by number, each in the place that a group has for it, and wait until all of them listen.

        Groups that are not there are made.
        """

    def end(self, numbers: tuple[int, ...]) -> None:
        """End these workers. One that is not there is no error."""

    def remove_groups(self, groups: tuple[Group, ...]) -> None:
        """Give their places back."""

    def close_registry(self) -> None:
        """End the registry and its front."""


@contextmanager
def _translated() -> Iterator[None]:
    """For a method of ``RayPool``: whatever Ray raises in it is a ClusterError outside of it."""
    import ray

    try:
        yield
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:  # Ray's own, and what it lets through
        raise ClusterError(f"Ray: {_last_line(error)}") from None


class RayPool:
    """A ``Pool`` by Ray. This process is connected to it already."""

    def __init__(self, directory: ClusterDirectory, record: Record) -> None:
        self._directory = directory
        self._record = record

    @_translated()
    def open_registry(self) -> str:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=False)
        actor: Any = ray.remote(Registry)
        options = {"name": REGISTRY, "lifetime": "detached", "max_restarts": -1, "num_cpus": 0}
        registry = actor.options(**options, scheduling_strategy=here).remote(
            self._directory.name, str(self._directory.path)
        )
        return str(_answer(registry.front.remote(), "the registry", timeout_s=90.0))

    @_translated()
    def reload(self) -> None:
        _answer(self._registry().reload.remote(), "the registry")

    @_translated()
    def view(self) -> View:
        return msgspec.json.decode(_answer(self._registry().view.remote(), "the registry"), type=View)

    @_translated()
    def place(self, groups: tuple[Group, ...], shards: dict[int, str], timeout_s: float) -> None:
        import ray

        until = time.monotonic() + timeout_s
        waiting = {}
        for group in groups:
            wanted = [number for number in group.numbers if number in shards]
            places = self._group(group, until) if wanted else None
            for number in wanted:
                waiting[self._start(number, shards[number], group, places).ready.remote()] = number
        while waiting:
            left = max(0.0, until - time.monotonic())
            done, _ = ray.wait(list(waiting), num_returns=1, timeout=left)
            if not done:
                raise ClusterError(f"worker {min(waiting.values())} was not ready within {timeout_s:.0f} s")
            number = waiting.pop(done[0])
            failed = _answer(done[0], f"worker {number}")
            if failed:
                raise ClusterError(f"worker {number}, shard {shards[number]}: {failed}")

    @_translated()
    def end(self, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            _kill(f"worker-{number}")

    @_translated()
    def remove_groups(self, groups: tuple[Group, ...]) -> None:
        import ray.util

        for group in groups:
            try:
                ray.util.remove_placement_group(ray.util.get_placement_group(group.name))
            except ValueError:  # it is not there
                continue

    @_translated()
    def close_registry(self) -> None:
        with suppress(ClusterError):  # one that is gone took its front with it
            _answer(self._registry().close.remote(), "the registry")
        _kill(REGISTRY)

    def _registry(self) -> Any:
        import ray

        try:
            return ray.get_actor(REGISTRY)
        except ValueError:
            raise ClusterError(
                f"cluster {self._record.name} has lost its registry: tsqp cluster down, then up"
            ) from None

    def _group(self, group: Group, until_s: float) -> Any:
        """The placement group, made where it is not there."""
        import ray.util

        try:
            return ray.util.get_placement_group(group.name)
        except ValueError:
            pass
        bundles = [self._resources() for _ in group.numbers]
        places = ray.util.placement_group(bundles, strategy="SPREAD", name=group.name, lifetime="detached")
        left = max(1.0, until_s - time.monotonic())
        patience_s = min(left, OWN_ROOM_S) if self._record.own else left  # a node may join somebody else's
        if not places.wait(timeout_seconds=patience_s):
            wanted = ", ".join(f"{count:g} {name}" for name, count in self._resources().items())
            raise ClusterError(
                f"Ray has no room for {len(bundles)} workers more, of {wanted} each: none came in {patience_s:.0f} s"
            )
        return places

    def _start(self, number: int, shard: str, group: Group, places: Any) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        place = PlacementGroupSchedulingStrategy(places, placement_group_bundle_index=group.numbers.index(number))
        resources = self._resources()
        started = self._record.started
        mark = {MARK: str(self._directory.path)} if self._record.own else {}
        whole, ip = len(self._record.shards) == 1, started.interface if self._record.own else ""
        task = Task(number, shard, whole, ip, started, mark)
        return (
            _holder()
            .options(
                name=f"worker-{number}",
                lifetime="detached",
                max_restarts=-1,
                num_cpus=resources["CPU"],
                num_gpus=resources.get("GPU", 0),
                scheduling_strategy=place,
            )
            .remote(msgspec.json.encode(task), self._registry())
        )

    def _resources(self) -> dict[str, float]:
        """Of one worker, as Ray counts."""
        started = self._record.started
        gpus = 0 if started.device == "cpu" else started.device.count(",") + 1
        return {"CPU": float(started.threads or 1), **({"GPU": float(gpus)} if gpus else {})}


class RayHolder:
    """A ``Holder`` that asks Ray what it has to know, in the actor's process."""

    def __init__(self, task: bytes, registry: Any) -> None:
        import ray

        context = ray.get_runtime_context()
        told = msgspec.json.decode(task, type=Task)
        if not told.ip:
            told = msgspec.structs.replace(told, ip=in_brackets(ray.util.get_node_ip_address()))
        self._holder = Holder(
            msgspec.json.encode(told),
            registry.announce.remote,
            context.get_node_id()[:12],
            again=context.was_current_actor_reconstructed,
        )

    def ready(self) -> str:
        return self._holder.ready()


def _holder() -> Any:
    import ray

    return ray.remote(RayHolder)


def _answer(reference: Any, who: str, timeout_s: float = ANSWER_S) -> Any:
    import ray

    try:
        return ray.get(reference, timeout=timeout_s)
    except ray.exceptions.GetTimeoutError:
        raise ClusterError(f"{who} did not answer within {timeout_s:.0f} s") from None
    except ray.exceptions.RayError as error:
        raise ClusterError(f"{who} failed: {_last_line(error)}") from None


def _kill(name: str) -> None:
    """End an actor. One that is not there is no error."""
    import ray

    try:
        ray.kill(ray.get_actor(name))
    except ValueError:  # it is not there any more
        return


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:300]
