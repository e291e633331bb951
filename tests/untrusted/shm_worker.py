"""A worker on a thread that serves real shared memory by a backend over the fake driver, and calls to it from slots.

With an address of ``cuda`` it serves the device memory of a fake.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch

from tests.untrusted.calls import CHECKPOINT
from tests.untrusted.fake_driver import FakeDriver
from tests.wire.links import WAIT_S
from tsqp.config.dtype import NumericPath, WireDtype
from tsqp.untrusted.backends.base import Backend
from tsqp.untrusted.backends.cuda import CudaBackend
from tsqp.untrusted.backends.host_memory import Arenas
from tsqp.untrusted.backends.many import ManyDevices
from tsqp.untrusted.store import ManyStore, WeightStore
from tsqp.untrusted.worker import Worker
from tsqp.wire.channel import Channel, Frames, Listener
from tsqp.wire.codec import decode_handshake, decode_reply, encode
from tsqp.wire.messages import PROTOCOL_VERSION, Call, Done, Failed, Hello, Welcome
from tsqp.wire.transport import connect, listen, new_shm_address

ARENA_BYTES = 1 << 20
WINDOW_BYTES = 1 << 14  # so that payloads lie in several
STORE = WeightStore(CHECKPOINT, "float32", torch.device("cpu"), backend=CudaBackend(FakeDriver()))

CLIENT = """
import sys
from tsqp.wire.channel import Frames
from tsqp.wire.codec import encode
from tsqp.wire.messages import PROTOCOL_VERSION, Hello, Product
from tsqp.wire.transport import connect
address, fingerprint, size, reply = sys.argv[1:]
channel = connect(address, arena_bytes=1 << 20)
channel.send(Frames(encode(Hello(PROTOCOL_VERSION, fingerprint, "float32", "field"))))
channel.receive(100)
slot = channel.slot(int(size), int(reply))
channel.send_from(slot, encode(Product(1, "qkv", 0, 1, 4)))
channel.receive(100)
print("answered", flush=True)
sys.stdin.read()
"""


class Watched(Worker):
    """Says when a connection has been let go of."""

    def __init__(self, store: WeightStore | ManyStore) -> None:
        super().__init__(store)
        self.left = threading.Semaphore(0)
        detach = self._backend.detach

        def watched(peer: bytes) -> None:
            detach(peer)
            self.left.release()

        self._backend.detach = watched  # type: ignore[method-assign]


def fake_backend(driver: FakeDriver, *, window_bytes: int = WINDOW_BYTES, locked_bytes: int = 1 << 30) -> CudaBackend:
    return CudaBackend(driver, arenas=Arenas(driver, window_bytes=window_bytes, locked_bytes=locked_bytes))


@contextmanager
def serving(
    backend: Backend | ManyDevices,
    address: str | None = None,
    store: WeightStore | ManyStore = STORE,
    **options: Any,
) -> Iterator[tuple[Listener, Watched]]:
    """A worker in float32, and where it listens, with these options."""
    store = copy.copy(store)  # with the same weights
    store.backend = backend
    worker, failures = Watched(store), list[BaseException]()

    def serve() -> None:
        try:
            worker.serve(listener)
        except BaseException as error:
            failures.append(error)
            listener.close()  # nobody waits for what does not come

    with closing(listen(address or new_shm_address(), **options)) as listener, closing(backend):
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener, worker
        finally:
            listener.interrupt()
            thread.join(WAIT_S)
            assert not thread.is_alive()
            if failures:
                raise failures[0]


@contextmanager
def connected(listener: Listener, path: NumericPath = "float", **options: Any) -> Iterator[Channel]:
    """A connection past its handshake, with floats as the path computes in; ``options`` are those of ``connect``."""
    wire: WireDtype = "bfloat16" if path == "int8" else "float32"
    arena_bytes = ARENA_BYTES if listener.address.startswith("shm:") else None
    with closing(connect(listener.address, **{"arena_bytes": arena_bytes, **options})) as channel:
        channel.send(Frames(encode(Hello(PROTOCOL_VERSION, CHECKPOINT.fingerprint(), wire, path))))
        assert isinstance(decode_handshake(channel.receive(WAIT_S).control), Welcome)
        yield channel


def product(channel: Channel, call: Call, payload: bytes, reply_bytes: int, times: int = 1) -> list[bytes]:
    """The answers to a call that is sent so many times from one slot."""
    slot, answers = channel.slot(len(payload), reply_bytes), []
    for _ in range(times):
        slot.tensor[:] = payload
        channel.send_from(slot, encode(call))
        frames = channel.receive(WAIT_S)
        assert isinstance(decode_reply(frames.control), Done)
        answers.append(b"".join(bytes(tensor) for tensor in frames.tensors))
    return answers


def failure(channel: Channel, call: Call, payload: bytes, reply_bytes: int) -> str:
    """Why a call has failed."""
    slot = channel.slot(len(payload), reply_bytes)
    slot.tensor[:] = payload
    channel.send_from(slot, encode(call))
    reply = decode_reply(channel.receive(WAIT_S).control)
    assert isinstance(reply, Failed)
    return reply.reason
