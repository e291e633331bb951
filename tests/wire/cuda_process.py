"""Either end of a CUDA IPC connection in a process of its own, over the fake driver.

Usage: python -m tests.wire.cuda_process worker|client ADDRESS. Each says in JSON what it has done. The worker answers
with the inverse of what it was sent, but for ``b"silence"``, which it announces, and says what it has open once a
client has left. The client makes one call and waits.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tests.wire.fake_cuda import FakeIpc
from tests.wire.links import on_the_host
from tsqp.wire.channel import Departure, Frames
from tsqp.wire.transport import connect, listen


def say(**facts: Any) -> None:
    """One line for the test that started this process."""
    print(json.dumps(facts), flush=True)  # noqa: T201


def inverted(payload: memoryview) -> memoryview:
    return memoryview(bytes(byte ^ 0xFF for byte in payload))


def work(address: str) -> None:
    driver = FakeIpc(opens_own_handles=False)
    listener = listen(address, driver=driver, watch_fd=0)
    say(address=listener.address)
    while (event := listener.receive(None)) is not None:
        if isinstance(event, Departure):
            say(left=event.peer.decode(), open=len(driver.opened))
        elif event.frames.control == b"silence" or event.device is None:
            say(busy=True, open=len(driver.opened))
        else:
            products = tuple(inverted(on_the_host(driver, memory)) for memory in event.device.tensors)
            listener.send(event, Frames(event.frames.control, products))
    listener.close()
    say(open=len(driver.opened))


def call(address: str) -> None:
    channel = connect(address, driver=FakeIpc(), arena_bytes=1 << 21)
    channel.send(Frames(b"call", (memoryview(b"from another process"),)), 20)
    say(answer=channel.receive(100.0).tensors[0].hex())
    sys.stdin.read()
    channel.close()


if __name__ == "__main__":
    {"worker": work, "client": call}[sys.argv[1]](sys.argv[2])
