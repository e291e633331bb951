"""A worker on several fake devices of one host, each with weights of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from typing import Any

import torch

from tests.untrusted.calls import CHECKPOINT
from tests.untrusted.fake_driver import FakeDriver, FakeHost
from tests.untrusted.shm_worker import WINDOW_BYTES, Watched, serving
from tsqp.arith.product import BlockedKernel
from tsqp.config.dtype import NumericPath
from tsqp.config.shard import Shard
from tsqp.untrusted.backends.columns import ColumnsBackend
from tsqp.untrusted.backends.host_memory import Arenas
from tsqp.untrusted.backends.many import ManyDevices
from tsqp.untrusted.paths.many_weights import ManyWeights
from tsqp.untrusted.store import ManyStore
from tsqp.wire.channel import Listener


class OwnStore(ManyStore):
    """Weights of the tiny model, of which each device has its own memory."""

    def _load(self, path: NumericPath) -> ManyWeights:
        return _loaded(len(self.backend.backends), path, self._shard)


@cache
def _loaded(count: int, path: NumericPath, shard: Shard | None) -> ManyWeights:
    # In torch's operators, which the fake sees; a kernel with loops of its own would go past it.
    store = ManyStore(CHECKPOINT, "float32", fake_devices(count), kernel=BlockedKernel(), shard=shard)
    weights = store.prepare(path)
    whole: Sequence[Any] = weights.parts
    parts: Any = [
        replace(part, groups={key: _changed(one, torch.Tensor.clone) for key, one in part.groups.items()})
        for part in whole
    ]
    return replace(weights, parts=parts)


def fake_devices(count: int, refusal: str | None = None, window_bytes: int = WINDOW_BYTES) -> ManyDevices:
    """Devices without a GPU, named as CUDA's are."""
    host = FakeHost()
    return devices_of([FakeDriver(host=host, refusal=refusal) for _ in range(count)], window_bytes)


def devices_of(drivers: Sequence[FakeDriver], window_bytes: int = WINDOW_BYTES) -> ManyDevices:
    """The devices of these drivers, which have one host."""
    arenas = Arenas(drivers[0], window_bytes=window_bytes)
    backends = [ColumnsBackend(driver, arenas=arenas) for driver in drivers]
    return ManyDevices(backends, [f"cuda:{n}" for n in range(len(drivers))])


def drivers_of(devices: ManyDevices) -> list[FakeDriver]:
    return [backend._driver for backend in devices.backends]  # type: ignore[misc]


def owned_store(devices: ManyDevices, *paths: NumericPath, shard: Shard | None = None) -> OwnStore:
    """A store whose weights of these paths are known to be on their devices."""
    store = OwnStore(CHECKPOINT, "float32", devices, shard=shard)
    for path in paths:
        parts: Sequence[Any] = store.prepare(path).parts
        for driver, part in zip(drivers_of(devices), parts, strict=True):
            for group in part.groups.values():
                _changed(group, driver.owns)
    return store


@contextmanager
def serving_on(
    devices: ManyDevices, *paths: NumericPath, address: str | None = None
) -> Iterator[tuple[Listener, Watched]]:
    """See ``serving``."""
    with serving(devices, address, owned_store(devices, *paths)) as found:
        yield found


def _changed(group: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A group's weights with each of its tensors changed."""
    tensors = {f.name: getattr(group, f.name) for f in fields(group)}
    return replace(group, **{name: change(one) for name, one in tensors.items() if isinstance(one, torch.Tensor)})
