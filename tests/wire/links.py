"""One way to open each transport, so that a test can be run over all of them."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from tests.commands import LIMIT_S
from tests.wire.fake_cuda import FakeIpc
from tsqp.wire.channel import Arrival, Channel, Departure, Frames, Listener
from tsqp.wire.device_memory import DeviceMemory
from tsqp.wire.transport import connect, listen
from tsqp.wire.transport.cuda.driver import IpcDriver
from tsqp.wire.transport.cuda.listener import CudaListener
from tsqp.wire.transport.keys import ClientKeys, KeyPair, WorkerKeys

WAIT_S = LIMIT_S  # far longer than anything here takes: only a failure waits that long


@dataclass(frozen=True)
class Link:
    """A transport under test. Options given here go to every ``listen`` and ``connect``."""

    name: str
    address: Callable[[], str]
    worker_options: dict[str, Any]
    client_options: dict[str, Any]

    def listen(self, **options: Any) -> Listener:
        return listen(self.address(), **self.worker_options, **options)

    def connect(self, listener: Listener, **options: Any) -> Channel:
        return connect(listener.address, **self.client_options, **options)


def make_link(name: str, directory: Path) -> Link:
    """``directory`` must be private; sockets of ipc go there."""
    numbers = iter(range(1_000_000))
    if name == "mem":
        return Link(name, lambda: f"mem:test-{next(numbers)}", {}, {})
    if name.startswith("shm"):
        arena = {"arena": "file"} if name == "shm-file" else {}
        return Link(name, lambda: f"shm://{directory}/{next(numbers)}.sock", {}, arena)
    if name == "cuda":
        return Link(
            name, lambda: f"cuda://{directory}/{next(numbers)}.sock", {"driver": FakeIpc()}, {"driver": FakeIpc()}
        )
    if name == "ipc":
        return Link(name, lambda: f"ipc://{directory}/{next(numbers)}.sock", {}, {})
    if name == "tcp":
        return Link(name, lambda: "tcp://127.0.0.1:0", {}, {})
    worker, client = new_key_pair(), new_key_pair()
    return Link(
        name,
        lambda: "tcp://127.0.0.1:0",
        {"security": WorkerKeys(worker, frozenset([client.public]))},
        {"security": ClientKeys(client, worker.public)},
    )


def new_key_pair() -> KeyPair:
    public, secret = zmq.curve_keypair()
    return KeyPair(public, secret)


def tensor(data: bytes | bytearray) -> memoryview:
    return memoryview(data)


def arrived(listener: Listener) -> Arrival:
    """The next message at a listener, which must come; connections that end on the way are passed over.

    What lies on a device is copied from there.
    """
    event = listener.receive(WAIT_S)
    while isinstance(event, Departure):
        event = listener.receive(WAIT_S)
    assert event is not None
    if event.device is not None:
        assert isinstance(listener, CudaListener)
        assert not event.frames.tensors
        copies = tuple(on_the_host(listener._driver, memory) for memory in event.device.tensors)
        return event._replace(frames=Frames(event.frames.control, copies))
    return event


def on_the_host(driver: IpcDriver, memory: DeviceMemory) -> memoryview:
    """A copy of a tensor."""
    copy = bytearray(memory.nbytes)
    if copy:
        driver.copy_out(ctypes.addressof(ctypes.c_char.from_buffer(copy)), memory.address, len(copy))
        driver.synchronise()
    return memoryview(copy)


def contents(frames: Frames) -> tuple[bytes, list[bytes]]:
    """A message as plain bytes, to compare."""
    return frames.control, [bytes(part) for part in frames.tensors]
